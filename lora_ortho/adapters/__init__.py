"""Adapters for whole models: files to adapters, adapters into a model and out again."""

from __future__ import annotations

from .export import Exported, export
from .files.errors import AdapterFileError
from .files.load import load_adapter
from .loaded import LoadedAdapter
from .merge import adapters_of, merge_adapters
from .models.attach import Attachment, attach, detach
from .models.inject import Injection, inject
from .models.report import LayerReport
from .streams import assign_streams

__all__ = [
    "AdapterFileError",
    "Attachment",
    "Exported",
    "Injection",
    "LayerReport",
    "LoadedAdapter",
    "adapters_of",
    "assign_streams",
    "attach",
    "detach",
    "export",
    "inject",
    "load_adapter",
    "merge_adapters",
]
