"""A merge as an adapter on disk, for PEFT and for this package."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_ortho
from lora_ortho import mask_stream
from lora_ortho.merges import METHODS, merge_adapters
from lora_ortho.problem import DTYPES

from .base_weights import why_not_peft
from .components import components, named
from .export_source import Source, resolve
from .files.export_files import LOADABLE, export_files, stranger, with_equal_ranks
from .files.made import METADATA
from .loaded import LoadedAdapter


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the folder.
        ranks: of each layer.
        errors: relative error of each layer's reduction to a lower rank, in the Frobenius norm of
            its B A; 0 where nothing was reduced.
    """

    path: Path
    ranks: Mapping[str, int]
    errors: Mapping[str, float]

    def __str__(self) -> str:
        worst = max(self.errors.values())
        ranks = f"ranks {min(self.ranks.values())} to {max(self.ranks.values())}"
        return f"{self.path}: {len(self.ranks)} layers, {ranks}, relative error at most {worst:.3g}"


def export(
    source: Any,
    path: str | os.PathLike[str],
    method: str = "direct",
    *,
    adapters: Sequence[str] | None = None,
    p: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    seed: int | None = None,
    sample: int | None = None,
    strata: int | None = None,
    rank: int | None = None,
    equal_ranks: bool = False,
    keep_zero_weights: bool | None = None,
    dtype: torch.dtype | None = None,
    model: Any = None,
    force: bool = False,
    **parameters: Any,
) -> Exported:
    """Writes a merge of adapters as one ordinary adapter: a folder, whole or not at all.

    The adapter has no scaling of its own; of `direct` and `ortho_rows` it has rank Σ r_j, and the
    masks of `ortho_rows` are in its lora_B.
    Of a model it is a folder of PEFT; of a pipeline the file that diffusers writes, which
    `pipe.load_lora_weights(path)` reads (its header holds PEFT's configuration of every part), and
    beside it what PEFT writes for the part, in a subfolder for each where there are several. The
    header says too how it was made, under "lora_ortho": method, rates, weights, seed, versions,
    and SHA-256 of the inputs.

    Args:
        source: a module with PEFT layers or a pipeline that has such, attached or not; the handle
            of `attach` or `inject`; or a list of what `load_adapter` gave.
        path: of the new folder.
        method: a merge of `lora_ortho.merges.METHODS` that gives factors: "direct" (an exact
            concatenation) or "ortho_rows" (what the orthogonal method gives for row 0 of this seed
            and sample, for every token). The masks of the other methods change from token to token
            and are no weight.
        adapters: of a module: names in merge order; None takes those that are active.
        p: a dropout rate for each adapter; None takes those of the attachment or injection, else
            1 - 1/K on a layer that K of them adapt.
        weights: a merge weight for each adapter; None takes those of the attachment or injection,
            else 1. An adapter of weight 0 is left out before K is counted.
        seed, sample, strata: which masks `ortho_rows` draws; None takes those of the attachment or
            injection, else 0, 0 and 1.
        rank: reduces every layer to at most that rank; the errors are returned.
        equal_ranks: gives all layers the largest rank by rows of zeros, for readers that know no
            rank_pattern.
        keep_zero_weights: adapters of weight 0 keep their share of the elements; None is as the
            attachment or injection has it, else False.
        dtype: of the written factors; None is float32, or float64 where a factor has it.
        model: the base model or pipeline of loaded adapters: then their layers are looked up in it.
        force: replaces a folder that is there, if it is empty or an adapter and nothing else.
        parameters: of the merge itself, where it has some.
    Raises:
        TypeError, ValueError: an argument or adapter that does not fit, by name.
        FileExistsError: path exists, and force is not set or would delete something else.
        OSError: it could not be written; then nothing is left of it.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a path, got {type(path).__name__}")
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype must be None or a floating point dtype, got {dtype}")
    folder = Path(path)
    _check_free(folder, force)
    found = resolve(source, model, adapters, p, weights, seed, sample, strata, keep_zero_weights)
    _check_not_an_input(folder, found)
    parts = None if found.model is None else components(found.model)
    entries = [] if parts is None else named(parts)
    modules = {entry.name: entry.module for entry in entries}
    streams = None if parts is None else {entry.name: entry.stream for entry in entries}
    _check_layers(found, modules)
    merged, errors = merge_adapters(
        found.adapters,
        method,
        p=found.p,
        weights=found.weights,
        seed=found.seed,
        sample=found.sample,
        strata=found.strata,
        rank=rank,
        streams=streams,
        keep_zero_weights=found.keep_zero_weights,
        **parameters,
    )
    if equal_ranks:
        merged = with_equal_ranks(merged)
    made = _made(found, method, parameters, rank, max(errors.values()))
    files = export_files(merged, modules, dtype, {METADATA: json.dumps(made)})
    _write(folder, files, force)
    return Exported(folder, {n: a.lora_A.shape[0] for n, a in merged.layers.items()}, errors)


def _check_free(folder: Path, force: bool) -> None:
    """Raises where something is that must not be replaced."""
    if Path.cwd().is_relative_to(os.path.realpath(folder)):
        raise ValueError(
            f"path must be a folder to be made, got {str(folder)!r}: work goes on there"
        )
    if not os.path.lexists(folder):
        return
    if not force:
        raise FileExistsError(f"path {folder} exists; force=True replaces it")
    other = stranger(folder) if folder.is_dir() else folder
    if other is not None:
        raise FileExistsError(
            f"path {folder}: {other} is no part of an exported adapter, so force=True does not "
            f"replace it"
        )


def _check_not_an_input(folder: Path, source: Source) -> None:
    """ValueError where the folder to be replaced holds one of the adapters to be merged."""
    target = os.path.realpath(folder)
    for adapter in source.adapters:
        read = None if adapter.source is None else Path(os.path.realpath(adapter.source))
        if read is not None and read.is_relative_to(target):
            raise ValueError(
                f"path must not be one of the adapters to merge, got {str(folder)!r}: "
                f"{adapter.name!r} was read from there"
            )


def _check_layers(source: Source, modules: Mapping[str, nn.Module]) -> None:
    """ValueError for a layer whose adapter neither PEFT nor diffusers could read back."""
    loadable = getattr(source.model, "_lora_loadable_modules", None)
    for adapter in source.adapters:
        for name in adapter.layers:
            part = name.partition(".")[0]
            if adapter.parts and part not in (loadable or LOADABLE):
                raise ValueError(
                    f"layer {name}: diffusers loads no adapters of a pipeline's {part}; export "
                    f"that part alone, as a folder of PEFT: load_adapter(..., part={part!r}), "
                    f"export(..., model=pipeline.{part})"
                )
            if source.model is not None and name not in modules:
                raise ValueError(f"model has no layer {name}, which {adapter.name!r} adapts")
            reason = why_not_peft(modules.get(name))
            if reason is not None:
                raise ValueError(f"layer {name}, adapter {adapter.name!r}: {reason}")


def _made(
    source: Source,
    method: str,
    parameters: Mapping[str, Any],
    rank: int | None,
    largest_error: float,
) -> dict[str, Any]:
    """How it was made, for the metadata; what masks it has, where there are any."""
    drawn = METHODS[method].draws
    return {
        "method": method,
        **({"parameters": dict(parameters)} if parameters else {}),
        "adapters": _inputs(source),
        "mask_stream": mask_stream.VERSION if drawn else None,
        "seed": source.seed if drawn else None,
        "sample": source.sample if drawn else None,
        **({"strata": source.strata} if drawn and source.strata != 1 else {}),
        "rank": rank,
        "largest_error": largest_error,
        "versions": {
            "lora_ortho": lora_ortho.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _inputs(source: Source) -> list[dict[str, Any]]:
    """What was merged, for the metadata; rates and weights where they are the same everywhere."""
    return [
        {
            "name": adapter.name,
            "p": _one(adapter, "p") if source.p is None else float(source.p[j]),
            "weight": _one(adapter, "weight") if source.weights is None else source.weights[j],
            "sha256": dict(adapter.sha256),
        }
        for j, adapter in enumerate(source.adapters)
    ]


def _one(adapter: LoadedAdapter, field: str) -> float | None:
    values = {getattr(part, field) for part in adapter.layers.values()}
    return values.pop() if len(values) == 1 else None


def _write(folder: Path, files: Mapping[str, bytes], force: bool) -> None:
    """The files in a folder beside, which then takes its name in one step."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as scratch:
        fresh, old = Path(scratch) / "adapter", Path(scratch) / "replaced"
        fresh.mkdir()
        for name, data in files.items():
            (fresh / name).parent.mkdir(exist_ok=True)
            (fresh / name).write_bytes(data)
        if force and os.path.lexists(folder):
            os.replace(folder, old)
        try:
            os.rename(fresh, folder)
        except OSError:
            if os.path.lexists(old):
                os.replace(old, folder)
            raise
