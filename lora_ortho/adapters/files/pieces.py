"""One layer's tensors in a file, of whatever layout: their shapes, and the adapter they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lora_ortho.module import Adapter

from .errors import AdapterFileError


@dataclass(frozen=True)
class Piece:
    """One layer's tensors in a file, by their keys.

    Attributes:
        layer: its name in the adapter that is made.
        lora_A, lora_B, bias: keys; bias None where there is none.
        kernel: of a convolution; empty for a linear layer.
        scaling: as a configuration has it; 1 where there is none.
        alpha: key of a tensor that holds alpha, for a scaling of alpha/r; None where there is none.
    """

    layer: str
    lora_A: str
    lora_B: str
    bias: str | None
    kernel: tuple[int, ...]
    scaling: float = 1.0
    alpha: str | None = None


def check_shapes(
    file: Path,
    keys: tuple[str, str, str | None],
    shapes: Mapping[str, tuple[int, ...]],
    rank: int | None = None,
    said_by: str = "",
) -> None:
    """AdapterFileError unless the shapes of one layer's tensors fit one another.

    lora_A is (r, d_in) and lora_B (d_out, r), or, of a convolution, (r, c_in, *kernel) and
    (d_out, r, 1, ...); a bias is (d_out,).

    Args:
        keys: of lora_A, lora_B, and the bias or None.
        rank: what a configuration says; None where there is none.
        said_by: that configuration.
    """
    key_A, key_B, key_bias = keys
    for key in (key_A, key_B):
        shape = shapes[key]
        if not 2 <= len(shape) <= 5 or 0 in shape:
            problem = f"expected 2 to 5 dimensions, none of them 0, found shape {list(shape)}"
            raise AdapterFileError(file, problem, key)
    a, b = shapes[key_A], shapes[key_B]
    if rank is not None and a[0] != rank:
        raise AdapterFileError(file, f"rank {a[0]}, but {said_by} says {rank}", key_A)
    if len(b) != len(a) or any(size != 1 for size in b[2:]):
        problem = f"shape {list(b)} does not fit lora_A's {list(a)}"
        raise AdapterFileError(file, problem, key_B)
    if b[1] != a[0]:
        raise AdapterFileError(file, f"rank {b[1]}, but lora_A has {a[0]}", key_B)
    if key_bias is not None and shapes[key_bias] != b[:1]:
        problem = f"shape {list(shapes[key_bias])} does not fit lora_B's {list(b)}"
        raise AdapterFileError(file, problem, key_bias)


def assemble(
    file: Path, name: str, pieces: Sequence[Piece], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Adapter], dict[str, tuple[int, ...]]]:
    """Adapters by layer in name order, and the kernels of those that are convolutions."""
    layers: dict[str, Adapter] = {}
    kernels: dict[str, tuple[int, ...]] = {}
    for piece in sorted(pieces, key=lambda piece: piece.layer):
        if piece.layer in layers:
            raise AdapterFileError(file, f"adapts layer {piece.layer!r} twice", piece.lora_A)
        lora_A, lora_B = tensors[piece.lora_A], tensors[piece.lora_B]
        if piece.kernel:
            kernels[piece.layer] = piece.kernel
        alpha = None if piece.alpha is None else float(tensors[piece.alpha])
        layers[piece.layer] = Adapter(
            lora_A.flatten(1),
            lora_B.flatten(1),
            scaling=piece.scaling if alpha is None else alpha / lora_A.shape[0],
            bias=None if piece.bias is None else tensors[piece.bias],
            name=name,
        )
    return layers, kernels
