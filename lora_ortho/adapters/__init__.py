"""Adapters for whole models: files to adapters, adapters into a model and out again."""

from __future__ import annotations

from .attach import Attachment, attach, detach
from .errors import AdapterFileError
from .inject import Injection, inject
from .load import load_adapter
from .loaded import LoadedAdapter
from .report import LayerReport
from .streams import assign_streams

__all__ = [
    "AdapterFileError",
    "Attachment",
    "Injection",
    "LayerReport",
    "LoadedAdapter",
    "assign_streams",
    "attach",
    "detach",
    "inject",
    "load_adapter",
]
