"""What a layer of a model takes and gives, which factors must fit."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn

from lora_ortho.module import linear_sizes

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Shape:
    """What a layer takes and gives: features, and the kernel of a convolution (else empty)."""

    features: int
    out_features: int
    kernel: tuple[int, ...] = ()

    def takes(self, other: Shape) -> bool:
        """True if factors of the other shape fit; a kernel of ones may be there or not."""
        kernels = self.kernel == other.kernel or prod(self.kernel) == prod(other.kernel) == 1
        features = (self.features, self.out_features)
        return kernels and features == (other.features, other.out_features)

    def __str__(self) -> str:
        kernel = f" with a kernel of {'x'.join(map(str, self.kernel))}" if self.kernel else ""
        return f"{self.features} features to {self.out_features}{kernel}"


def shape_of(module: Any) -> Shape | None:
    """The shape of a linear layer or a convolution without groups, wrapped by PEFT or not."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    if isinstance(base, _CONVOLUTIONS):
        if base.groups != 1:
            return None
        return Shape(base.in_channels, base.out_channels, tuple(base.kernel_size))
    features, out_features = linear_sizes(base)
    if features is None or out_features is None:
        return None
    return Shape(features, out_features)
