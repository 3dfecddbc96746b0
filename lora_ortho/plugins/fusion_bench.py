"""FusionBench (0.2): an algorithm that merges LoRA factors into the pretrained model of a pool.

The pool holds the base model as ``_pretrained_`` and adapters, read by `lora_ortho.load_adapter`;
no fine-tuned model is written or loaded. A Hydra configuration names it by ``_target_``:

    method: {_target_: lora_ortho.plugins.fusion_bench.LoraOrtho, merge_method: ortho_rows}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusion_bench.method.base_algorithm import BaseAlgorithm
from torch import nn

from lora_ortho.adapters import LoadedAdapter
from lora_ortho.merges import method_named

from .weights import fold_into


class LoraOrtho(BaseAlgorithm):  # type: ignore[misc]
    """A merge of a pool's adapters, by a name of `lora_ortho.merges.METHODS`.

    Args:
        merge_method: that name. (`method` is the key of the whole algorithm in FusionBench's
            files.)
        p: a dropout rate for each adapter, in the pool's order; None is 1 - 1/K of those on a
            layer.
        weights: a merge weight for each; None is 1.
        seed, sample, strata: of the masks. A layer's stream is that of its name.
    """

    _config_mapping = BaseAlgorithm._config_mapping | {
        name: name for name in ("merge_method", "p", "weights", "seed", "sample", "strata")
    }

    def __init__(
        self,
        merge_method: str = "ortho_rows",
        p: Sequence[float] | None = None,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        sample: int = 0,
        strata: int = 1,
        **kwargs: Any,
    ) -> None:
        unknown = kwargs.keys() - set(BaseAlgorithm._config_mapping.values())
        if unknown:  # FusionBench's own classes only log such a key
            known = ", ".join(key for key in self._config_mapping.values() if key[0] != "_")
            raise TypeError(f"method has unknown key {min(unknown)!r}; known are {known}")
        super().__init__(**kwargs)
        method_named(merge_method)
        self.merge_method = merge_method
        self.p = None if p is None else [float(rate) for rate in p]
        self.weights = None if weights is None else [float(weight) for weight in weights]
        self.seed, self.sample, self.strata = seed, sample, strata

    def run(self, modelpool: Any) -> nn.Module:
        """The pretrained model with every adapter of the pool merged in.

        Raises:
            TypeError, ValueError: by name, before the model is changed.
        """
        model: nn.Module = modelpool.load_pretrained_model()
        adapters = []
        for name in modelpool.model_names:
            adapter = modelpool.load_model(name)
            if not isinstance(adapter, LoadedAdapter):
                kind = type(adapter).__name__
                raise TypeError(
                    f"{name} of the pool must be an adapter (_target_: lora_ortho.load_adapter), "
                    f"got {kind}"
                )
            adapters.append(adapter)
        if not adapters:
            raise ValueError("the pool has no adapter beside _pretrained_")
        return fold_into(
            model,
            adapters,
            self.merge_method,
            self.p,
            self.weights,
            seed=self.seed,
            sample=self.sample,
            strata=self.strata,
        )
