"""What every launch shares: the layer's packed factors, and where it stands in the mask stream."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .launch_config import INTERPRETER, Gpu, Sizes
from .mask_stream import signed

if TYPE_CHECKING:
    from lora_ortho.problem import Place


class Factors(NamedTuple):
    """The factors of K adapters as the kernels read them, in the dtype of x.

    Attributes:
        draw: the kind, "none", "shared" or "own".
        A: (Σr, d_in).
        B: (K, d_out, width), zero from each rank on.
        table: (K, 4) int32: the first and the last 32-bit word whose upper half is a draw of the
            adapter, its first column in s, its rank.
        rank: the rank of all adapters, or 0 where they differ.
        rank_sum: Σr.
    """

    draw: str
    A: Tensor
    B: Tensor
    table: Tensor
    rank: int
    rank_sum: int


class Launch(NamedTuple):
    """A kernel with all that it is called with; also what is compiled ahead of time."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> None:
        """Queue the kernel on the current stream of the current device."""
        self.kernel[(self.programs,)](**self.arguments, **self.constants, **self.options)


def sizes_of(factors: Factors, tokens: int) -> Sizes:
    """The sizes of a call, for the launch configuration."""
    K, d_out, width = factors.B.shape
    return Sizes(tokens, d_out, K, width, factors.B.element_size())


def common_arguments(
    factors: Factors, s: Tensor, gains: Tensor, seed: Tensor, place: Place
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments and constants that all kernels take alike."""
    K, d_out, width = factors.B.shape
    vector = vector_of(factors.rank or 1, s.element_size())
    arguments = {
        "s": s,
        "B": factors.B,
        "table": factors.table,
        "gains": gains,
        "seed": seed,
        "tokens": s.shape[0],
        "d_out": d_out,
        "s_stride": factors.rank_sum // vector,
        "stream": signed(place.stream),
        "sample": place.block,
        "rotation": place.rotation,
        "row_offset": signed(place.row_offset),
        "group_offset": signed(place.col_offset >> 3),
    }
    constants = {
        "DRAW": factors.draw,
        "K": K,
        "RANK": factors.rank,
        "WIDTH": width,
        "SHIFT": place.col_offset & 7,
        "S_VECTOR": vector,
    }
    return arguments, constants


def row_access(matrix: Tensor, place: Place, *beside: Tensor) -> tuple[int, int, int]:
    """How the rows of a (tokens, d_out) matrix are read.

    Args:
        beside: contiguous matrices that are accessed in the same tiles.
    Returns:
        the row stride, in vectors; the column stride; the elements of a vector.
    """
    tokens, d_out = matrix.shape
    row, column = matrix.stride()
    lengths = d_out, row if tokens > 1 else d_out, place.col_offset
    sizes = math.gcd(*lengths) if column == 1 else 1
    vector = vector_of(sizes, matrix.element_size(), matrix, *beside)
    return row // vector, column, vector


def vector_of(sizes: int, itemsize: int, *tensors: Tensor) -> int:
    """How many elements one access may take: 16 bytes if all that matters divides by them, else 1.

    Args:
        sizes: the greatest common divisor of all lengths, offsets and strides.
        tensors: whose addresses matter too.
    """
    elements = 16 // itemsize
    aligned = sizes % elements == 0 and all(t.data_ptr() % 16 == 0 for t in tensors)
    return elements if aligned else 1


def compile_options(gpu: Gpu, warps: int, max_registers: int | None = None) -> dict[str, Any]:
    """What Triton's compiler is told: tiles are loaded without pipelining, the least registers."""
    options: dict[str, Any] = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    if max_registers is not None and gpu.arch.startswith("sm_"):
        options["maxnreg"] = max_registers
    return options


def gpu_of(device: torch.device) -> Gpu:
    """The GPU behind a device; where Triton's interpreter stands in for one, a small one."""
    if device.type == "cpu":
        return Gpu(INTERPRETER, 1)
    return _gpu(device.index if device.index is not None else torch.cuda.current_device())


_known: dict[int, Gpu] = {}


def _gpu(index: int) -> Gpu:
    if index not in _known:
        properties = torch.cuda.get_device_properties(index)
        arch = getattr(properties, "gcnArchName", "").split(":")[0]
        if torch.version.hip is None:
            arch = f"sm_{properties.major}{properties.minor}"
        _known[index] = Gpu(arch, properties.multi_processor_count)
    return _known[index]
