"""What adapters of convolutions need besides those of linear layers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn


class Sizes(nn.Module):
    """Stands for a base layer that somebody else calls."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features


def selectors(
    ranks: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Factors (r_j, Σ r) that pick each adapter's share of what the shrink step gave."""
    if torch.compiler.is_compiling():
        return _selectors(ranks, dtype, device)
    found = _remembered(ranks, dtype, device)
    if type(found[0]) is not Tensor:  # made while something traces: for that alone
        _remembered.cache_clear()
    return found


def _selectors(
    ranks: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):
        return torch.split(torch.eye(sum(ranks), dtype=dtype, device=device), list(ranks))


_remembered = lru_cache(maxsize=256)(_selectors)


def why_not_dilated(base: Any) -> str | None:
    """Why PEFT's layer of a dilated convolution cannot be called; None where it can.

    Its lora_A is not dilated, so the sizes of its outputs differ unless padding makes up for it.
    """
    grown = any(d != 1 and k != 1 for d, k in zip(base.dilation, base.kernel_size, strict=True))
    if grown and base.padding != "same":
        return f"a convolution with a dilation of {tuple(base.dilation)}, which PEFT's lora_A lacks"
    return None


def convolve(base: Any, x: Tensor, kernel: Tensor) -> Tensor:
    """What PEFT's lora_A does to x beside this base: its stride and padding, but of zeros.

    Dilated as the base is, where PEFT's, which is not, could not be called.
    """
    dilation = base.dilation if why_not_dilated(base) else 1
    name = {3: "conv1d", 4: "conv2d", 5: "conv3d"}[kernel.dim()]
    result: Tensor = getattr(nn.functional, name)(
        x, kernel, None, base.stride, base.padding, dilation
    )
    return result
