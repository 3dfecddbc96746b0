"""Several adapters of a whole model merged into one, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_ortho.adapters.loaded import LoadedAdapter, agreed, checked_adapters
from lora_ortho.adapters.streams import assign_streams
from lora_ortho.module import Adapter
from lora_ortho.problem import finite_numbers

from .low_rank import reduce_rank
from .registry import method_named


def merge_adapters(
    adapters: Sequence[LoadedAdapter],
    method: str = "direct",
    *,
    p: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    sample: int = 0,
    strata: int = 1,
    rank: int | None = None,
    streams: Mapping[str, int] | None = None,
    keep_zero_weights: bool = False,
    **parameters: Any,
) -> tuple[LoadedAdapter, dict[str, float]]:
    """One adapter that does what all do together, by a merge of `lora_ortho.merges.METHODS` that
    gives factors.

    An adapter of weight 0 is off: it is left out before K is counted, and a layer that only such
    adapters adapt is left out.

    Args:
        adapters: from `load_adapter` or `adapters_of`, in merge order.
        method: name of the merge.
        p: a dropout rate for each adapter; None takes what each has, which is None for those that
            were read: 1 - 1/K on a layer that K of them adapt.
        weights: a merge weight for each adapter; None takes what each has, 1 for those read.
        seed, sample, strata: which masks are drawn; each layer has its own stream.
        rank: reduces every layer to at most that rank.
        streams: of the layers in the model that they are for, which differ from those of the names
            alone where two modules' clash; None takes those of the names.
        keep_zero_weights: adapters of weight 0 keep their share of the elements.
        parameters: of the merge itself.
    Returns:
        The adapter (scaling 1, float32 or float64), and the relative error of the reduction by
        layer, 0 where nothing was reduced.
    Raises:
        TypeError, ValueError: an argument that does not fit, by name; adapters that do not fit one
            another; a method that is no weight, or a dense one; weights that are all 0.
    """
    adapters = checked_adapters(adapters)
    merge = method_named(method)
    count = len(adapters)
    rates = None if p is None else finite_numbers("p", p, count)
    gains = None if weights is None else finite_numbers("weights", weights, count)
    parts = _common_parts(adapters)
    names = sorted({name for adapter in adapters for name in adapter.layers})
    streams = assign_streams(names) if streams is None else streams
    layers: dict[str, Adapter] = {}
    kernels: dict[str, tuple[int, ...]] = {}
    errors: dict[str, float] = {}
    for name in names:
        kernel = _common_kernel(adapters, name)
        chosen = parts_of(name, adapters, rates, gains, keep_zero_weights)
        if not chosen:
            continue
        place = {"seed": seed, "stream": streams[name], "sample": sample, "strata": strata}
        try:
            layers[name], errors[name] = merge.factors(chosen, **place, **parameters), 0.0
            if rank is not None:
                layers[name], errors[name] = reduce_rank(layers[name], rank)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
        if kernel:
            kernels[name] = kernel
    if not layers:
        raise ValueError("weights: every adapter has weight 0, so nothing is left to merge")
    leaves = None if len(layers) < len(names) else _common_leaves(adapters)
    title = "+".join(adapter.name for adapter in adapters)
    made = LoadedAdapter(
        title,
        layers,
        Path(title),
        _common_base(adapters),
        kernels,
        {},
        _common_settings(adapters),
        parts,
        leaves,
    )
    return made, errors


def parts_of(
    layer: str,
    adapters: Sequence[LoadedAdapter],
    p: Sequence[float] | None,
    weights: Sequence[float] | None,
    keep_zero_weights: bool = False,
) -> list[Adapter]:
    """The parts of adapters that adapt one layer, in merge order, without those that are off.

    Args:
        p, weights: for each adapter, in place of what its part has; None leaves that.
        keep_zero_weights: an adapter of weight 0 is not off.
    """
    found = []
    for j, adapter in enumerate(adapters):
        if layer in adapter.layers:
            part = adapter.layers[layer]
            rate = part.p if p is None else p[j]
            weight = part.weight if weights is None else weights[j]
            if weight != 0 or keep_zero_weights:
                found.append(replace(part, p=rate, weight=weight, name=adapter.name))
    return found


def _common_kernel(adapters: Sequence[LoadedAdapter], layer: str) -> tuple[int, ...]:
    """The kernel that all of one layer's adapters have, empty for a linear layer."""
    found = {adapter.kernels.get(layer, ()) for adapter in adapters if layer in adapter.layers}
    if len(found) > 1:
        raise ValueError(f"layer {layer}: adapters have kernels of {sorted(found)}")
    return found.pop()


def _common_base(adapters: Sequence[LoadedAdapter]) -> str | None:
    """The base model that all name; None where they do not agree."""
    bases = {adapter.base_model for adapter in adapters}
    return bases.pop() if len(bases) == 1 else None


def _common_settings(adapters: Sequence[LoadedAdapter]) -> dict[str, Any]:
    settings = agreed([adapter.settings for adapter in adapters])
    if any(adapter.settings.get("fan_in_fan_out") for adapter in adapters):
        settings["fan_in_fan_out"] = True  # of some layers; PEFT looks at each
    return settings


def _common_leaves(adapters: Sequence[LoadedAdapter]) -> frozenset[str] | None:
    """The ends of names that select the layers of all; None where one's are not known."""
    found: set[str] = set()
    for adapter in adapters:
        if adapter.leaves is None:
            return None
        found |= adapter.leaves
    return frozenset(found)


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
