"""How tensors and problems are told to :mod:`lora_ortho._C`: addresses, numbers and names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_ortho.problem import Draw, Problem

DTYPE_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}
# lora_ortho.h has one of these words, and exclusive thresholds, in place of a draw and intervals.
METHODS = {Draw.SHARED: "orthogonal", Draw.OWN: "dropout", Draw.NONE: "direct"}


def layer(problem: Problem) -> tuple[str, str, int, int, list[int], list[int]]:
    """A problem as the extension's classes take it."""
    return (
        METHODS[problem.draw],
        DTYPE_NAMES[problem.dtype],
        problem.d_in,
        problem.d_out,
        list(problem.ranks),
        [last + 1 for _, last in problem.intervals],
    )


def matrix(tensor: Tensor) -> tuple[int, int, int]:
    """Address and strides, in elements, of a matrix."""
    return (tensor.data_ptr(), *tensor.stride())  # type: ignore[return-value]


def factors(tensors: Sequence[Tensor]) -> list[tuple[int, int, int, str]]:
    """Address, strides and dtype of each factor."""
    return [(*matrix(tensor), DTYPE_NAMES[tensor.dtype]) for tensor in tensors]
