"""Adapters merged into the weights of a base model, one layer at a time.

A mask that changes from token to token is no weight, so a library that merges weights gets the
merges of `lora_ortho.merges.METHODS`, factors multiplied out and dense weights alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_ortho.adapters import LoadedAdapter, assign_streams
from lora_ortho.adapters.base_weights import lies_transposed, why_not_changed, why_not_plain
from lora_ortho.merges import Method, method_named, parts_of
from lora_ortho.module import Adapter
from lora_ortho.problem import finite_numbers


def members(
    layer: str,
    adapters: Sequence[LoadedAdapter],
    p: Sequence[float] | None,
    weights: Sequence[float] | None,
) -> list[Adapter]:
    """The parts of adapters that adapt one layer, in merge order, with their weights and rates.

    An adapter of weight 0 is off, and not among them.

    Args:
        layer: qualified name.
        adapters: any of which may leave the layer alone.
        p: a dropout rate for each adapter; None takes what each has, which is None for those that
            were read: 1 - 1/K of those on this layer.
        weights: a merge weight for each; None takes what each has, 1 for those read.
    Raises:
        TypeError, ValueError: p or weights is not a finite number for each adapter.
    """
    rates = None if p is None else finite_numbers("p", p, len(adapters))
    gains = None if weights is None else finite_numbers("weights", weights, len(adapters))
    return parts_of(layer, adapters, rates, gains)


def merged(
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    method: str,
    *,
    seed: int,
    stream: int,
    sample: int = 0,
    strata: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One layer's weight and bias with its adapters merged in; the given ones are not modified.

    Args:
        weight: (d_out, d_in) of the base layer, or (d_in, d_out) where it lies transposed.
        bias: (d_out,), or None for a layer without.
        adapters: of this layer, see `members`.
        method: a name of ``lora_ortho.merges.METHODS``. The coordinates of an owner are, for
            `ortho_rows`, row 0 and the output feature as column; for `element_disjoint` the output
            feature as row and the input feature as column, a bias being column d_in.
        seed, stream, sample, strata: of the mask stream.
        transposed: the weight is that of a Conv1D of transformers, (d_in, d_out).
    Returns:
        Both in the dtype of the given ones, rounded once.
    Raises:
        ValueError: sizes that do not fit, Σ(1 - p) > 1, an adapter with a bias on a layer
            without, or a weight that is no W: quantised, on the meta device, a tensor subclass.
    """
    merge = method_named(method)
    _check(weight, bias, adapters, transposed)
    if not adapters:
        return weight.clone(), None if bias is None else bias.clone()
    place = {"seed": seed, "stream": stream, "sample": sample, "strata": strata}
    delta, extra = merge.difference(adapters, **place)
    delta = delta.T if transposed else delta
    return _sum(weight, delta), bias if bias is None or extra is None else _sum(bias, extra)


def _check(
    weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter], transposed: bool
) -> None:
    """ValueError, naming what does not fit, unless adapters can be merged into a layer."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        reason = None if tensor is None else why_not_plain(tensor)
        if reason is not None:
            raise ValueError(f"its {name} {reason}")
    sizes = tuple(weight.T.shape if transposed else weight.shape)
    for adapter in adapters:
        own = adapter.lora_B.shape[0], adapter.lora_A.shape[1]
        if own != sizes:
            raise ValueError(
                f"adapter {adapter.name!r} is for a weight of {own}, the base has {sizes}"
            )
        if adapter.bias is not None and bias is None:
            raise ValueError(
                f"adapter {adapter.name!r} has a bias (lora_bias), and the base layer none that "
                f"it could be added to"
            )


def fold_into(
    model: nn.Module,
    adapters: Sequence[LoadedAdapter],
    method: str,
    p: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    *,
    seed: int = 0,
    sample: int = 0,
    strata: int = 1,
) -> nn.Module:
    """Adapters merged into the linear layers of a model, in place.

    An adapter of weight 0 is left out before K is counted. Of transformers' Conv1D, as GPT-2 has
    it, the transposed difference is added.

    Args:
        model: a plain torch model with the adapters' layers under their names.
        adapters: from `load_adapter`, in merge order.
        method: a name of ``lora_ortho.merges.METHODS``.
        p: a dropout rate for each adapter; None is 1 - 1/K of those on a layer.
        weights: a merge weight for each; None is 1.
        seed, sample, strata: of the masks. A layer's stream is that of its name.
    Returns:
        The model.
    Raises:
        TypeError, ValueError: by name, before the model is changed. A layer whose weight is not W
            (quantised, offloaded, with a scale besides, made from other parameters, or used by a
            forward of its own) is refused.
    """
    merge = method_named(method)
    plan = _plan(model, adapters, merge, p, weights)
    with torch.no_grad():
        for layer, parts, stream in plan:
            weight, bias = merged(
                layer.weight,
                layer.bias,
                parts,
                method,
                seed=seed,
                stream=stream,
                sample=sample,
                strata=strata,
                transposed=lies_transposed(layer),
            )
            layer.weight.copy_(weight)
            if bias is not None:
                layer.bias.copy_(bias)
    return model


def _plan(
    model: nn.Module,
    adapters: Sequence[LoadedAdapter],
    merge: Method,
    p: Sequence[float] | None,
    weights: Sequence[float] | None,
) -> list[tuple[Any, list[Adapter], int]]:
    """Every layer to be changed with its adapters and its stream, all of them checked."""
    modules = dict(model.named_modules(remove_duplicate=False))
    problem = left_over(adapters, modules)
    if problem is not None:
        raise ValueError(problem)
    streams = assign_streams(modules)
    found = []
    for name in sorted({name for adapter in adapters for name in adapter.layers}):
        layer = _linear(model, modules, name)
        parts = members(name, adapters, p, weights)
        try:
            _check(layer.weight, layer.bias, parts, lies_transposed(layer))
            if parts:
                merge.check(parts)
                found.append((layer, parts, streams[name]))
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
    return found


def _linear(model: nn.Module, modules: Mapping[str, nn.Module], name: str) -> Any:
    """The layer of that name, if its weight can be changed without side effects."""
    layer = modules[name]
    reason = why_not_changed(layer)
    if reason is not None:
        raise ValueError(f"layer {name} {reason}")
    own = {id(parameter) for parameter in layer.parameters()}
    users = [n for n, q in model.named_parameters(remove_duplicate=False) if id(q) in own]
    if len(users) > len(own):
        raise ValueError(f"layer {name} shares its weight: {', '.join(users)}")
    return layer


def _sum(base: Tensor, delta: Tensor) -> Tensor:
    wide = torch.promote_types(base.dtype, delta.dtype)
    return (base.to(wide) + delta.to(base.device, wide)).to(base.dtype)


def left_over(adapters: Sequence[LoadedAdapter], layers: Mapping[str, object]) -> str | None:
    """What is wrong if an adapter has a layer that is not among `layers`; None if none has."""
    for adapter in adapters:
        missing = sorted(set(adapter.layers) - set(layers))
        if missing:
            return (
                f"adapter {adapter.name!r} adapts {missing[0]}, which the base model does not have"
                + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
            )
    return None
