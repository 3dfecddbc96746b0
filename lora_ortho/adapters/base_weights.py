"""What the weight of a base layer is: W, W transposed, or something else than W."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def lies_transposed(layer: Any) -> bool:
    """True for a layer whose weight is (d_in, d_out): the Conv1D of transformers (GPT-2).

    A square weight does not show it, so the layer is asked; one that PEFT wrapped by its base.
    """
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    return type(base).__name__ == "Conv1D" and hasattr(base, "nf")


def why_not_changed(layer: nn.Module) -> str | None:
    """Why a difference of weights cannot be added to a layer's weight; None where it can."""
    kind = type(layer).__name__
    if not lies_transposed(layer):
        if not isinstance(layer, nn.Linear):
            return f"is a {kind}; it must be an nn.Linear"
        if type(layer).forward is not nn.Linear.forward:
            return f"is a {kind} with a forward of its own, which may use its weight otherwise"
    weight = layer._parameters.get("weight")
    if weight is None:
        return f"is a {kind} that makes its weight from others (a parametrization)"
    return why_not_plain(weight) or _others(layer)


def why_not_plain(weight: Tensor) -> str | None:
    """Why a tensor is not W itself, number by number; None where it may be."""
    if type(weight.data) is not Tensor:
        return f"keeps its weight as a {type(weight.data).__name__}, not as plain numbers"
    if weight.is_meta:
        return "has its weight on the meta device (offloaded, or not loaded)"
    if weight.layout is not torch.strided:
        return f"has a weight of layout {weight.layout}"
    if weight.dtype not in _PLAIN:
        return f"is quantised: its weight is {weight.dtype}, codes instead of values"
    return None


def _others(layer: nn.Module) -> str | None:
    """A scale, zero point or mask beside the weight."""
    state = {**layer._parameters, **layer._buffers}
    found = [n for n, t in state.items() if t is not None and n not in ("weight", "bias")]
    if found:
        return f"has {', '.join(found)} besides its weight, which may scale it"
    return None
