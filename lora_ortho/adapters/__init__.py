"""Adapters for whole models: files to adapters, adapters into a model and out again."""

from __future__ import annotations

from lora_ortho.merges import merge_adapters

from .export import Exported, export
from .files.errors import AdapterFileError
from .files.load import load_adapter
from .loaded import LoadedAdapter
from .models.attach import Attachment, attach, detach
from .models.inject import Injection, inject
from .models.peft_adapters import adapters_of
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
