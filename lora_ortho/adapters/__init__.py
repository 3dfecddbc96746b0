"""Adapters for whole models: files to adapters, adapters into a model and out again."""

from __future__ import annotations

from .errors import AdapterFileError
from .inject import Injection, LayerReport, inject
from .peft_folder import LoadedAdapter, load_adapter
from .streams import assign_streams

__all__ = [
    "AdapterFileError",
    "Injection",
    "LayerReport",
    "LoadedAdapter",
    "assign_streams",
    "inject",
    "load_adapter",
]
