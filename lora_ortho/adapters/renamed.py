"""Names of layers that a transformers model had under an earlier version, as PEFT renames them."""

from __future__ import annotations

import importlib
import sys
from functools import cached_property
from typing import Any

from torch import nn

_END = ".weight"  # the rules are for the keys of a state dict


class Renaming:
    """The rules by which transformers 5 reads older checkpoints into a model.

    PEFT applies them to adapters; where a model has none, or is not of transformers, no name has
    another.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = model

    def __call__(self, name: str) -> str | None:
        """Another name of the layer, or None."""
        if not self._rules:
            return None
        loading: Any = importlib.import_module("transformers.core_model_loading")
        key, _ = loading.rename_source_key(name + _END, self._rules, [])
        return key.removesuffix(_END) if key != name + _END else None

    @cached_property
    def _rules(self) -> list[Any]:
        transformers = sys.modules.get("transformers")  # or the model is none of its
        model: Any = self._model
        while hasattr(model, "get_base_model"):  # of PEFT
            model = model.get_base_model()
        if transformers is None or not isinstance(model, transformers.PreTrainedModel):
            return []
        try:
            mapping: Any = importlib.import_module("transformers.conversion_mapping")
            loading: Any = importlib.import_module("transformers.core_model_loading")
        except ImportError:  # transformers 4
            return []
        rules = mapping.get_model_conversion_mapping(model)
        return [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
