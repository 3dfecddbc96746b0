"""What base layers allow: what their weight is, and whether PEFT has a layer for them."""

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


def why_not_peft(module: Any) -> str | None:
    """Why PEFT's layer of a convolution cannot hold its adapter; None where it can, or no layer.

    PEFT's lora_A is a convolution with the base's stride and padding, and nothing else of it.
    """
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    if not isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return None
    if base.padding_mode != "zeros":
        return f"PEFT's convolutions pad with zeros, this one with {base.padding_mode!r}"
    if any(size != 1 for size in base.dilation):
        return f"PEFT's convolutions have no dilation, this one has {tuple(base.dilation)}"
    return None


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
    reason = why_not_plain(weight)
    return _others(layer) if reason is None else f"cannot be changed: its weight {reason}"


def why_not_plain(weight: Tensor) -> str | None:
    """Why a tensor is not W itself, number by number, as a predicate; None where it may be."""
    if type(weight.data) is not Tensor:
        return f"is a {type(weight.data).__name__}, not a plain tensor"
    if weight.is_meta:
        return "is on the meta device (offloaded, or not loaded)"
    if weight.layout is not torch.strided:
        return f"has the layout {weight.layout}"
    if weight.dtype not in _PLAIN:
        return f"is {weight.dtype}: codes of a quantiser instead of values"
    return None


def _others(layer: nn.Module) -> str | None:
    """A scale, zero point or mask beside the weight."""
    state = {**layer._parameters, **layer._buffers}
    found = [n for n, t in state.items() if t is not None and n not in ("weight", "bias")]
    if found:
        return f"has {', '.join(found)} besides its weight, which may scale it"
    return None
