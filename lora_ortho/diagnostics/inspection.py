"""Adapters compared with one another, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from lora_ortho.adapters import LoadedAdapter
from lora_ortho.mask_stream import SUM_SLACK, UNIT, default_rates, rates
from lora_ortho.module import Adapter

from .factors import Factorisation, Overlap, factorise
from .inputs import Inputs, check_inputs
from .records import Interference, Layer, Pair, Report, Summary

_DOMINANT = 2.0  # times as large as the updates of every other adapter


def inspect(
    adapters: Sequence[LoadedAdapter],
    *,
    p: Sequence[float] | None = None,
    inputs: Inputs | None = None,
    step: Callable[[str], object] = lambda layer: None,
) -> Report:
    """Compare adapters with one another, layer by layer.

    Args:
        adapters: from `load_adapter`, at least one, with names of their own.
        p: a dropout rate for each, to be checked for the orthogonal merge.
        inputs: inputs of an adapter's own task by adapter name and layer name, (samples, d_in);
            `collect_inputs` makes them.
        step: called with each layer's name before its turn.
    Raises:
        ValueError: no adapter, a name twice, or p or inputs that do not fit, by name.
    """
    named = _by_name(adapters)
    check_inputs(named, inputs or {})
    problems = _sizes_that_differ(adapters)
    layers, pairs, found = [], [], []
    norms = dict.fromkeys(named, 0.0)
    for name in sorted({layer for adapter in adapters for layer in adapter.layers}):
        step(name)
        parts = {a.name: factorise(a.layers[name]) for a in adapters if name in a.layers}
        for owner, part in parts.items():
            norms[owner] = math.hypot(norms[owner], part.norm)
        layers.append(_layer(name, parts, [named[owner].layers[name] for owner in parts]))
        if not any(problem.startswith(f"{name}:") for problem in problems):
            pairs += _pairs(name, parts)
            found += _interference(name, named, parts, inputs or {})
    smallest = max(layer.smallest_p for layer in layers)
    summaries = tuple(_summary(adapter, norms[adapter.name], layers) for adapter in adapters)
    return Report(
        summaries,
        tuple(layers),
        tuple(pairs),
        tuple(found),
        smallest,
        _dominant(summaries),
        (*problems, *_rates_that_fail(adapters, layers, p)),
        tuple(_remarks(adapters, norms)),
    )


def _by_name(adapters: Sequence[LoadedAdapter]) -> dict[str, LoadedAdapter]:
    if not adapters:
        raise ValueError("adapters must hold at least one adapter, got none")
    named = {adapter.name: adapter for adapter in adapters}
    if len(named) != len(adapters):
        names = [adapter.name for adapter in adapters]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"adapters must have names of their own, got {twice!r} twice")
    return named


def _sizes_that_differ(adapters: Sequence[LoadedAdapter]) -> list[str]:
    problems = []
    for name in sorted({layer for adapter in adapters for layer in adapter.layers}):
        sizes = {
            a.name: (a.layers[name].lora_A.shape[1], a.layers[name].lora_B.shape[0])
            for a in adapters
            if name in a.layers
        }
        if len(set(sizes.values())) > 1:
            parts = (f"{owner} {d_in} to {d_out}" for owner, (d_in, d_out) in sizes.items())
            problems.append(f"{name}: sizes differ: {', '.join(parts)}")
    return problems


def _layer(name: str, parts: Mapping[str, Factorisation], adapters: Sequence[Adapter]) -> Layer:
    first = adapters[0]
    return Layer(
        name,
        (first.lora_A.shape[1], first.lora_B.shape[0]),
        tuple(parts),
        tuple(adapter.lora_A.shape[0] for adapter in adapters),
        tuple(part.norm for part in parts.values()),
        default_rates(len(adapters))[0],
    )


def _pairs(layer: str, parts: Mapping[str, Factorisation]) -> list[Pair]:
    names = list(parts)
    found = []
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            one, two = parts[first], parts[second]
            product = one.norm * two.norm
            inner = float((one.C * (one.Q.T @ two.Q @ two.C @ (two.P.T @ one.P))).sum())
            found.append(
                Pair(
                    layer,
                    first,
                    second,
                    Overlap.between(one.outputs, two.outputs),
                    Overlap.between(one.Q, two.Q),
                    Overlap.between(one.inputs, two.inputs),
                    inner / product if product else 0.0,
                )
            )
    return found


def _interference(
    layer: str,
    named: Mapping[str, LoadedAdapter],
    parts: Mapping[str, Factorisation],
    inputs: Inputs,
) -> list[Interference]:
    found = []
    for task, tensors in inputs.items():
        if layer not in tensors or task not in parts:
            continue
        x = tensors[layer].double()
        sizes = {name: float((part.C @ (part.P.T @ x.T)).norm()) for name, part in parts.items()}
        own = sizes.pop(task)
        found += [
            Interference(layer, name, task, size / own if own else math.inf)
            for name, size in sizes.items()
        ]
    return found


def _rates_that_fail(
    adapters: Sequence[LoadedAdapter], layers: Sequence[Layer], p: Sequence[float] | None
) -> list[str]:
    if p is None:
        return []
    values = rates(p)
    if len(values) != len(adapters):
        raise ValueError(f"p must have a rate for each of {len(adapters)} adapters, got {len(p)}")
    rate = {adapter.name: value for adapter, value in zip(adapters, values, strict=True)}
    worst = max(layers, key=lambda layer: math.fsum(1.0 - rate[a] for a in layer.adapters))
    total = math.fsum(1.0 - rate[a] for a in worst.adapters)
    problems = [
        f"p[{j}]: {value!r} is above the largest rate that 16-bit draws resolve, {1 - 1 / UNIT!r}"
        for j, value in enumerate(values)
        if math.floor(UNIT * (1.0 - value) + 0.5) == 0
    ]
    if total > 1.0 + SUM_SLACK:
        problems.append(
            f"p: 1 - p sums to {total:.6g} in {worst.name}, the orthogonal merge needs at most 1; "
            f"a rate of {worst.smallest_p:.6g} for each of its {len(worst.adapters)} adapters works"
        )
    return problems


def _summary(adapter: LoadedAdapter, norm: float, layers: Sequence[Layer]) -> Summary:
    common = (layer for layer in layers if len(layer.adapters) > 1)
    shared = [layer for layer in common if adapter.name in layer.adapters]
    own = [layer.norms[layer.adapters.index(adapter.name)] for layer in shared]
    strongest = sum(norm == max(layer.norms) for norm, layer in zip(own, shared, strict=True))
    parts = list(adapter.layers.values())
    ranks = [part.lora_A.shape[0] for part in parts]
    scalings = [part.scaling for part in parts]
    tensors = [t for part in parts for t in (part.lora_A, part.lora_B, part.bias) if t is not None]
    return Summary(
        adapter.name,
        str(adapter.source),
        adapter.base_model,
        len(parts),
        sum(tensor.numel() for tensor in tensors),
        (min(ranks), max(ranks)),
        (min(scalings), max(scalings)),
        tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
        sum(part.bias is not None for part in parts),
        norm,
        len(shared),
        math.hypot(*own),
        strongest,
    )


def _dominant(summaries: Sequence[Summary]) -> str | None:
    order = sorted((s for s in summaries if s.shared_layers), key=lambda s: -s.shared_norm)
    if len(order) < 2 or order[0].shared_norm == 0.0:
        return None
    return order[0].name if order[0].shared_norm >= _DOMINANT * order[1].shared_norm else None


def _remarks(adapters: Sequence[LoadedAdapter], norms: Mapping[str, float]) -> list[str]:
    remarks = []
    bases = {a.base_model for a in adapters if a.base_model is not None}
    if len(bases) > 1:
        given = (f"{a.name}: {a.base_model}" for a in adapters if a.base_model is not None)
        remarks.append(f"they name different base models ({', '.join(given)})")
    everywhere = {layer for adapter in adapters for layer in adapter.layers}
    for adapter in adapters:
        missing = len(everywhere) - len(adapter.layers)
        if missing:
            remarks.append(f"{adapter.name} leaves {missing} of {len(everywhere)} layers alone")
        if norms[adapter.name] == 0.0:
            remarks.append(f"{adapter.name} changes nothing: its updates are all zero")
    for i, one in enumerate(adapters):
        for two in adapters[i + 1 :]:
            if _same(one, two):
                remarks.append(f"{one.name} and {two.name} hold the same factors")
            elif len(adapters) > 1 and not set(one.layers) & set(two.layers):
                remarks.append(f"{one.name} and {two.name} share no layer: nothing to interfere")
    return remarks


def _same(one: LoadedAdapter, two: LoadedAdapter) -> bool:
    return set(one.layers) == set(two.layers) and all(
        torch.equal(part.lora_A, two.layers[name].lora_A)
        and torch.equal(part.lora_B, two.layers[name].lora_B)
        and part.scaling == two.layers[name].scaling
        for name, part in one.layers.items()
    )
