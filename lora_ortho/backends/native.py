"""How tensors are told to :mod:`lora_ortho._C`, which knows addresses and names only."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}


def matrix(tensor: Tensor) -> tuple[int, int, int]:
    """Address and strides, in elements, of a matrix."""
    return (tensor.data_ptr(), *tensor.stride())  # type: ignore[return-value]
