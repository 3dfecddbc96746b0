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
from .files.peft_config import reader_settings
from .loaded import LoadedAdapter, agreed, checked_adapters
from .models.peft_checks import (
    configs_of,
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
            bias = None if B.bias is None else _whole(B.bias, entry.name, 1)
            found[name][entry.name] = Adapter(
                _whole(A.weight, entry.name, 2).flatten(1),
                _whole(B.weight, entry.name, 2).flatten(1),
                scaling=float(entry.module.scaling[name]),
                bias=bias,
                name=name,
            )
            if A.weight.dim() > 2:
                kernels[name][entry.name] = tuple(A.weight.shape[2:])
    split = "" not in components(model)
    made = []
    for n in order:
        layers_of, digest = dict(sorted(found[n].items())), {"tensors": _digest(found[n])}
        base, settings = _told(model, n)
        parts = frozenset(name.partition(".")[0] for name in layers_of if split)
        made.append(LoadedAdapter(n, layers_of, Path(n), base, kernels[n], digest, settings, parts))
    return made


def _told(model: Any, name: str) -> tuple[str | None, dict[str, Any]]:
    """Base model and reader's fields that PEFT's configurations of an adapter agree on."""
    roots = components(model).values()
    fields = [configs_of(root)[name].to_dict() for root in roots if name in configs_of(root)]
    bases = {field.get("base_model_name_or_path") for field in fields}
    base = bases.pop() if len(bases) == 1 else None
    return base or None, agreed([reader_settings(field) for field in fields])


def _whole(tensor: Any, layer: str, least: int) -> torch.Tensor:
    """A tensor of an adapter, gathered where FSDP2 or tensor parallelism split it."""
    found: torch.Tensor = tensor.detach()
    if hasattr(found, "full_tensor"):
        found = found.full_tensor()
    if found.dim() < least or 0 in found.shape:
        raise ValueError(
            f"layer {layer}: its adapters are split among processes; export inside of "
            f"FullyShardedDataParallel.summon_full_params(model)"
        )
    return found


def _digest(layers: Mapping[str, Adapter]) -> str:
    """SHA-256 over names, dtypes and bytes of all factors, in name order."""
    digest = hashlib.sha256()
    for name in sorted(layers):
        part = layers[name]
        digest.update(f"{name} {part.scaling!r} ".encode())
        for tensor in (part.lora_A, part.lora_B, part.bias):
            if tensor is not None:
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
                # A copy: memory that numpy saw cannot be freed by those who own it, as FSDP does.
                copy = tensor.cpu().contiguous().view(torch.uint8).clone()
                digest.update(copy.numpy().tobytes())
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
    keep_zero_weights: bool = False,
) -> tuple[LoadedAdapter, dict[str, float]]:
    """One adapter that does what all do together: `fold.direct` or `fold.ortho_rows` by layer.

    An adapter of weight 0 is off: it is left out before K is counted, and a layer that only such
    adapters adapt is left out.

    Args:
        adapters: from `load_adapter` or `adapters_of`, in merge order.
        method: "direct" or "ortho_rows".
        p: a dropout rate for each adapter; None takes what each has, which is None for those that
            were read: 1 - 1/K on a layer that K of them adapt.
        weights: a merge weight for each adapter; None takes what each has, 1 for those read.
        seed, sample: which masks `ortho_rows` draws; each layer has its own stream.
        rank: reduces every layer to at most that rank.
        model: for exact streams where names of its modules clash; None numbers the layers alone.
        keep_zero_weights: adapters of weight 0 keep their share of the elements.
    Returns:
        The adapter (scaling 1, float32 or float64), and the relative error of the reduction by
        layer, 0 where nothing was reduced.
    Raises:
        TypeError, ValueError: an argument that does not fit, by name; adapters that do not fit one
            another; a method that is no weight; weights that are all 0.
    """
    adapters = checked_adapters(adapters)
    count = len(adapters)
    rates = None if p is None else finite_numbers("p", p, count)
    merge_weights = None if weights is None else finite_numbers("weights", weights, count)
    parts = _common_parts(adapters)
    names = sorted({name for adapter in adapters for name in adapter.layers})
    if model is None:
        streams = assign_streams(names)
    else:
        streams = {entry.name: entry.stream for entry in named(components(model))}
    layers: dict[str, Adapter] = {}
    kernels: dict[str, tuple[int, ...]] = {}
    errors: dict[str, float] = {}
    for name in names:
        holders = [j for j, adapter in enumerate(adapters) if name in adapter.layers]
        if name not in streams:
            raise ValueError(
                f"model has no layer {name}, which {adapters[holders[0]].name!r} adapts"
            )
        shapes = {adapters[j].kernels.get(name, ()) for j in holders}
        if len(shapes) > 1:
            raise ValueError(f"layer {name}: adapters have kernels of {sorted(shapes)}")
        chosen = [_with(adapters[j].layers[name], j, rates, merge_weights) for j in holders]
        chosen = [part for part in chosen if keep_zero_weights or not fold.is_off(part)]
        if not chosen:
            continue
        try:
            merged = fold.fold(method, chosen, seed=seed, stream=streams[name], sample=sample)
            errors[name] = 0.0
            if rank is not None:
                merged, errors[name] = fold.reduce_rank(merged, rank)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
        layers[name] = merged
        if kernel := shapes.pop():
            kernels[name] = kernel
    if not layers:
        raise ValueError("weights: every adapter has weight 0, so nothing is left to merge")
    title = "+".join(adapter.name for adapter in adapters)
    settings = agreed([adapter.settings for adapter in adapters])
    if any(adapter.settings.get("fan_in_fan_out") for adapter in adapters):
        settings["fan_in_fan_out"] = True  # of some layers; PEFT looks at each
    bases = {adapter.base_model for adapter in adapters}
    base = bases.pop() if len(bases) == 1 else None
    leaves = None if len(layers) < len(names) else _common_leaves(adapters)
    result = LoadedAdapter(title, layers, Path(title), base, kernels, {}, settings, parts, leaves)
    return result, errors


def _common_leaves(adapters: Sequence[LoadedAdapter]) -> frozenset[str] | None:
    """The ends of names that select the layers of all; None where one's are not known."""
    found: set[str] = set()
    for adapter in adapters:
        if adapter.leaves is None:
            return None
        found |= adapter.leaves
    return frozenset(found)


def _with(
    part: Adapter, j: int, rates: Sequence[float] | None, weights: Sequence[float] | None
) -> Adapter:
    """One layer's part of adapter j with its rate and weight, where they are given."""
    return replace(
        part,
        p=part.p if rates is None else rates[j],
        weight=part.weight if weights is None else weights[j],
    )


def _common_parts(adapters: Sequence[LoadedAdapter]) -> frozenset[str]:
    """The parts of a pipeline that the adapters are for; all are for one, or none is.

    Raises:
        ValueError: some are for a pipeline, others for a single model.
    """
    whole = [adapter.name for adapter in adapters if not adapter.parts]
    split = [adapter.name for adapter in adapters if adapter.parts]
    if whole and split:
        raise ValueError(
            f"adapter {split[0]!r} is for parts of a pipeline, {whole[0]!r} for one model; load "
            f"both through the pipeline, or both with part="
        )
    return frozenset(part for adapter in adapters for part in adapter.parts)
