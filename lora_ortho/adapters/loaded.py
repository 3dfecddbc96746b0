"""Adapters read from files: what they are, and how factors on disk become them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_ortho.module import Adapter

from .files.errors import AdapterFileError
from .files.peft_config import CONFIG_FILE
from .files.tensor_file import Entry


@dataclass(frozen=True)
class LoadedAdapter:
    """One adapter for a whole model, read and checked.

    Attributes:
        name: for display; the folder's or file's name unless another was given.
        layers: an `Adapter` for each adapted layer, by the layer's qualified name in the base
            model (in a pipeline after the part: "unet.mid_block..."), in name order. Factors are
            on the CPU, in the file's dtype.
        source: the folder or file it came from.
        base_model: the model it says it was trained for, or None.
        kernels: of the layers that are convolutions, whose lora_A is (r, c_in · kernel elements).
        sha256: of the files it came from, by their names, in hexadecimal.
        settings: fields of PEFT's configuration that change nothing here, and that readers of an
            export go by: `peft_config.FOR_READERS`.
        parts: of a pipeline, with which the layers' names begin; empty for a single model.
        leaves: ends of names that select its layers in the model that it was made for, as PEFT's
            `target_modules` does; None where they are not known.
    """

    name: str
    layers: Mapping[str, Adapter]
    source: Path
    base_model: str | None = None
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    parts: frozenset[str] = frozenset()
    leaves: frozenset[str] | None = None

    def __repr__(self) -> str:
        return f"LoadedAdapter({self.name!r}, {len(self.layers)} layers, from {str(self.source)!r})"


def agreed(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields that all have, with one value."""
    first = settings[0] if settings else {}
    return {
        name: value
        for name, value in first.items()
        if all(other.get(name) == value for other in settings)
    }


def checked_adapters(adapters: object, argument: str = "adapters") -> list[LoadedAdapter]:
    """A list of at least one loaded adapter; TypeError or ValueError for anything else."""
    if isinstance(adapters, LoadedAdapter) or not isinstance(adapters, Sequence):
        kind = type(adapters).__name__
        raise TypeError(f"{argument} must be a list of what load_adapter returns, got {kind}")
    for j, adapter in enumerate(adapters):
        if not isinstance(adapter, LoadedAdapter):
            kind = type(adapter).__name__
            raise TypeError(f"{argument}[{j}] must come from load_adapter, got {kind}")
    if not adapters:
        raise ValueError(f"{argument} must hold at least one adapter, got none")
    return list(adapters)


@dataclass(frozen=True)
class Piece:
    """One layer's tensors in a file, by their keys.

    Attributes:
        layer: its name in the adapter that is made.
        lora_A, lora_B, bias: keys; bias None where there is none.
        scaling: alpha/r, or alpha/sqrt(r) for rsLoRA.
        kernel: of a convolution; empty for a linear layer.
    """

    layer: str
    lora_A: str
    lora_B: str
    bias: str | None
    scaling: float
    kernel: tuple[int, ...]


def check_shapes(
    file: Path,
    keys: tuple[str, str, str | None],
    entries: Mapping[str, Entry],
    rank: int | None = None,
) -> int:
    """The rank of one layer's factors, whose shapes must fit one another.

    lora_A is (r, d_in) and lora_B (d_out, r), or, of a convolution, (r, c_in, *kernel) and
    (d_out, r, 1, ...); a bias is (d_out,).

    Args:
        keys: of lora_A, lora_B, and the bias or None.
        rank: what adapter_config.json says; None where there is none.
    """
    key_A, key_B, key_bias = keys
    for key in (key_A, key_B):
        shape = entries[key].shape
        if not 2 <= len(shape) <= 5 or 0 in shape:
            problem = f"expected 2 to 5 dimensions, none of them 0, found shape {list(shape)}"
            raise AdapterFileError(file, problem, key)
    a, b = entries[key_A].shape, entries[key_B].shape
    if rank is not None and a[0] != rank:
        raise AdapterFileError(file, f"rank {a[0]}, but {CONFIG_FILE} says {rank}", key_A)
    if len(b) != len(a) or any(size != 1 for size in b[2:]):
        problem = f"shape {list(b)} does not fit lora_A's {list(a)}"
        raise AdapterFileError(file, problem, key_B)
    if b[1] != a[0]:
        raise AdapterFileError(file, f"rank {b[1]}, but lora_A has {a[0]}", key_B)
    if key_bias is not None and entries[key_bias].shape != b[:1]:
        shape = entries[key_bias].shape
        problem = f"shape {list(shape)} does not fit lora_B's {list(b)}"
        raise AdapterFileError(file, problem, key_bias)
    return a[0]


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
        layers[piece.layer] = Adapter(
            lora_A.flatten(1),
            lora_B.flatten(1),
            scaling=piece.scaling,
            bias=None if piece.bias is None else tensors[piece.bias],
            name=name,
        )
    return layers, kernels
