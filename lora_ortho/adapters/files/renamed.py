"""Layers whose names transformers changed: those of older files, looked up in newer models."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import nn

from lora_ortho.adapters.components import containers


class Renamings:
    """What transformers, since version 5, renames of a model's older checkpoints.

    PEFT does the same to the names in its files. A model of another package has none.
    """

    def __init__(self, root: nn.Module) -> None:
        self._renamings: list[Any] = []
        self._converters: list[Any] = []
        model, package = containers(root)[-1], sys.modules.get("transformers")
        if package is None or not isinstance(model, package.PreTrainedModel):
            return
        try:
            mapping: Any = importlib.import_module("transformers.conversion_mapping")
            self._loading: Any = importlib.import_module("transformers.core_model_loading")
        except ImportError:  # transformers 4, whose models have the older names
            return
        for entry in mapping.get_model_conversion_mapping(model):
            plain = isinstance(entry, self._loading.WeightRenaming)
            (self._renamings if plain else self._converters).append(entry)

    def of(self, name: str) -> tuple[str, bool]:
        """A layer's name in the model, and whether it is fused with others there."""
        if not self._renamings and not self._converters:
            return name, False
        key, fused = self._loading.rename_source_key(
            f"{name}.weight", self._renamings, self._converters
        )
        return key.removesuffix(".weight"), fused is not None
