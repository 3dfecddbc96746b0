"""One adapter for a whole model: what readers give, and what injections and merges take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_ortho.module import Adapter


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
