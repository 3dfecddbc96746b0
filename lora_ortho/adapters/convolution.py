"""A drop-in for convolutions that adds LoRA adapters under disjoint random masks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lora_ortho.module import Adapter, FusedOrthoLoRALinear


class Sizes(nn.Module):
    """Stands for a base layer that somebody else calls."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features


@lru_cache(maxsize=256)
def selectors(
    ranks: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Factors (r_j, Σ r) that pick each adapter's share of what the shrink step gave."""
    with torch.inference_mode(False):
        return torch.split(torch.eye(sum(ranks), dtype=dtype, device=device), list(ranks))


class OrthoLoRAConvolution(FusedOrthoLoRALinear):
    """``base(x) + Σ_j gain_j · m_j ⊙ (B_j ⋆ A_j ⋆ x + bias_j)`` for a convolution.

    The shrink step is a convolution by all lora_A at once; draw and expand are those of the linear
    layer, with the places (n, h, w) of the output for tokens and its channels for features.

    Args:
        base: an ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` without groups.
        adapters: lora_A (r, c_in · kernel elements) and lora_B (c_out, r).
        The others as for ``FusedOrthoLoRALinear``.
    """

    def __init__(self, base: Any, adapters: Sequence[Adapter], **settings: Any) -> None:
        elements = base.weight[0].numel()
        super().__init__(Sizes(elements, base.out_channels), adapters, **settings)
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, ...) to (N, c_out, ...), in the dtype that base gives."""
        base: Any = self.base
        y: Tensor = base(x)
        lora_A = torch.cat(super()._tensors()[: len(self._ranks)]).to(y.dtype)
        kernel = lora_A.view(-1, *base.weight.shape[1:])
        s = _convolve(base, x.to(y.dtype), kernel)
        channel = y.dim() - base.weight.dim() + 1
        result = self.add(s.movedim(channel, -1), y.movedim(channel, -1)).movedim(-1, channel)
        return result.contiguous() if y.is_contiguous() else result

    def _tensors(self) -> list[Tensor]:
        found = super()._tensors()
        device = found[0].device
        return [*selectors(self._ranks, torch.float32, device), *found[len(self._ranks) :]]


def _convolve(base: Any, x: Tensor, kernel: Tensor) -> Tensor:
    """What the base does to x, with another kernel and no bias."""
    if base.padding_mode != "zeros":
        x = nn.functional.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
    padding = base.padding if base.padding_mode == "zeros" else 0
    name = {3: "conv1d", 4: "conv2d", 5: "conv3d"}[kernel.dim()]
    result: Tensor = getattr(nn.functional, name)(
        x, kernel, None, base.stride, padding, base.dilation
    )
    return result
