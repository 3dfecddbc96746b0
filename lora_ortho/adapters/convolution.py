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


def convolve(base: Any, x: Tensor, kernel: Tensor) -> Tensor:
    """What the base does to x, with another kernel and no bias."""
    if base.padding_mode != "zeros":
        x = nn.functional.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
    padding = base.padding if base.padding_mode == "zeros" else 0
    name = {3: "conv1d", 4: "conv2d", 5: "conv3d"}[kernel.dim()]
    result: Tensor = getattr(nn.functional, name)(
        x, kernel, None, base.stride, padding, base.dilation
    )
    return result
