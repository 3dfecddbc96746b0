"""Merges of adapters that are weights: by name, what each is, and how a whole model is merged.

A merge whose masks differ from token to token is no weight; `lora_ortho.attach` and `inject` run
those.
"""

from __future__ import annotations

from . import methods  # noqa: F401  each module in it registers its merge
from .registry import METHODS, Gives, Method, method_named, register
from .whole_model import merge_adapters, parts_of

__all__ = ["METHODS", "Gives", "Method", "merge_adapters", "method_named", "parts_of", "register"]
