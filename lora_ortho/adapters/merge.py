"""Several adapters of a whole model folded into one, layer by layer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_ortho.module import Adapter
from lora_ortho.problem import finite_numbers

from . import fold
from .components import components, named
from .loaded import LoadedAdapter, checked_adapters
from .peft_checks import (
    layer_problems,
    merged_on,
    model_problems,
    pick,
    raise_problems,
    saving_problems,
    tuner_layers,
    warn_of_changed_bases,
)
from .streams import assign_streams


def adapters_of(model: Any, adapters: Sequence[str] | None = None) -> list[LoadedAdapter]:
    """The adapters that a model with PEFT layers holds, as if they had been loaded.

    Args:
        model: as for `attach`; attached or not.
        adapters: names, in merge order; None takes those that are active.
    Returns:
        One for each name, with PEFT's present scaling; factors share memory with the model's.
    Raises:
        TypeError, ValueError: as for `attach`; an adapter that changes more than its layers.
    """
    layers = tuner_layers(model, attached=True)
    order, every = pick(adapters, layers), adapters is not None
    problems = [*model_problems(model, order), *layer_problems(layers, order, every)]
    problems += saving_problems(model, order)
    raise_problems([problem for problem in problems if problem.adapters], "take adapters")
    warn_of_changed_bases(model, order)
    found: dict[str, dict[str, Adapter]] = {name: {} for name in order}
    kernels: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in order}
    for entry in layers:
        for name in merged_on(entry.module, order, every):
            A, B = (part[name] for part in (entry.module.lora_A, entry.module.lora_B))
            bias = None if B.bias is None else B.bias.detach()
            found[name][entry.name] = Adapter(
                A.weight.detach().flatten(1),
                B.weight.detach().flatten(1),
                scaling=float(entry.module.scaling[name]),
                bias=bias,
                name=name,
            )
            if A.weight.dim() > 2:
                kernels[name][entry.name] = tuple(A.weight.shape[2:])
    return [
        LoadedAdapter(n, found[n], Path(n), None, kernels[n], {"tensors": _digest(found[n])})
        for n in order
    ]


def _digest(layers: Mapping[str, Adapter]) -> str:
    """SHA-256 over names, dtypes and bytes of all factors, in name order."""
    digest = hashlib.sha256()
    for name in sorted(layers):
        part = layers[name]
        digest.update(f"{name} {part.scaling!r} ".encode())
        for tensor in (part.lora_A, part.lora_B, part.bias):
            if tensor is not None:
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def merge_adapters(
    adapters: Sequence[LoadedAdapter],
    method: str = "direct",
    *,
    p: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    sample: int = 0,
    rank: int | None = None,
    model: Any = None,
) -> tuple[LoadedAdapter, dict[str, float]]:
    """One adapter that does what all do together: `fold.direct` or `fold.ortho_rows` by layer.

    Args:
        adapters: from `load_adapter` or `adapters_of`, in merge order.
        method: "direct" or "ortho_rows".
        p: a dropout rate for each adapter; None gives 1 - 1/K on a layer that K of them adapt.
        weights: a merge weight for each adapter; None is 1.
        seed, sample: which masks `ortho_rows` draws; each layer has its own stream.
        rank: reduces every layer to at most that rank.
        model: for exact streams where names of its modules clash; None numbers the layers alone.
    Returns:
        The adapter (scaling 1, float32 or float64), and the relative error of the reduction by
        layer, 0 where nothing was reduced.
    Raises:
        TypeError, ValueError: an argument that does not fit, by name; adapters that do not fit one
            another; a method that is no weight.
    """
    adapters = checked_adapters(adapters)
    rates = None if p is None else finite_numbers("p", p, len(adapters))
    merge_weights = finite_numbers("weights", weights, len(adapters))
    names = sorted({name for adapter in adapters for name in adapter.layers})
    if model is None:
        streams = assign_streams(names)
    else:
        streams = {entry.name: entry.stream for entry in named(components(model))}
    layers: dict[str, Adapter] = {}
    kernels: dict[str, tuple[int, ...]] = {}
    errors: dict[str, float] = {}
    for name in names:
        chosen = [j for j, adapter in enumerate(adapters) if name in adapter.layers]
        if name not in streams:
            raise ValueError(
                f"model has no layer {name}, which {adapters[chosen[0]].name!r} adapts"
            )
        parts = [
            replace(
                adapters[j].layers[name], weight=merge_weights[j], p=rates[j] if rates else None
            )
            for j in chosen
        ]
        shapes = {adapters[j].kernels.get(name, ()) for j in chosen}
        if len(shapes) > 1:
            raise ValueError(f"layer {name}: adapters have kernels of {sorted(shapes)}")
        kernels[name] = shapes.pop()
        try:
            merged = fold.fold(method, parts, seed=seed, stream=streams[name], sample=sample)
            errors[name] = 0.0
            if rank is not None:
                merged, errors[name] = fold.reduce_rank(merged, rank)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
        layers[name] = merged
    bases = {adapter.base_model for adapter in adapters}
    base = bases.pop() if len(bases) == 1 else None
    title = "+".join(adapter.name for adapter in adapters)
    kernels = {name: kernel for name, kernel in kernels.items() if kernel}
    return LoadedAdapter(title, layers, Path(title), base, kernels), errors
