"""Adapters folded into the weights of a base model, one layer at a time.

A mask that changes from token to token is no weight, so a library that merges weights gets the
three merges that are: `direct`, `ortho_rows` (every output feature belongs to one adapter) and
`element_disjoint` (every element of the weight does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_ortho import mask_stream
from lora_ortho.adapters import LoadedAdapter, assign_streams, fold
from lora_ortho.module import Adapter

METHODS = (*fold.METHODS, "element_disjoint")


def check_method(method: str) -> None:
    """Raise ValueError unless a merge by this name is a weight."""
    if method not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}, got {method!r}; masks that change from "
            f"token to token are no weight, lora_ortho.attach and inject run them"
        )


def members(
    layer: str,
    adapters: Sequence[LoadedAdapter],
    p: Sequence[float] | None,
    weights: Sequence[float] | None,
) -> list[Adapter]:
    """The parts of adapters that adapt one layer, in merge order, with their weights and rates.

    Args:
        layer: qualified name.
        adapters: any of which may leave the layer alone.
        p: a dropout rate for each adapter; None is 1 - 1/K of those on this layer.
        weights: a merge weight for each; None is 1.
    Raises:
        ValueError: not as many rates or weights as adapters.
    """
    for name, values in (("p", p), ("weights", weights)):
        if values is not None and len(values) != len(adapters):
            count = len(adapters)
            raise ValueError(f"{name} must have a value for each of {count} adapters, got {values}")
    return [
        replace(
            adapter.layers[layer],
            weight=1.0 if weights is None else weights[j],
            p=None if p is None else p[j],
            name=adapter.name,
        )
        for j, adapter in enumerate(adapters)
        if layer in adapter.layers
    ]


def check(weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter], method: str) -> None:
    """Raise ValueError, naming what does not fit, wherever `merged` would."""
    check_method(method)
    sizes = tuple(weight.shape)
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
    if method != "direct":
        mask_stream.thresholds(fold.rates(adapters), "orthogonal")


def merged(
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    method: str,
    *,
    seed: int,
    stream: int,
    sample: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """One layer's weight and bias with its adapters merged in; the given ones are not modified.

    Args:
        weight: (d_out, d_in) of the base layer.
        bias: (d_out,), or None for a layer without.
        adapters: of this layer, see `members`.
        method: one of ``METHODS``. The coordinates of an owner are, for `ortho_rows`, row 0 and
            the output feature as column; for `element_disjoint` the output feature as row and the
            input feature as column, a bias being column d_in (`adapters.fold`).
        seed, stream, sample: of the mask stream.
    Returns:
        Both in the dtype of the given ones, rounded once.
    Raises:
        ValueError: sizes that do not fit, Σ(1 - p) > 1, or an adapter with a bias on a layer
            without.
    """
    check(weight, bias, adapters, method)
    if method == "element_disjoint":
        delta, extra = fold.element_disjoint(adapters, seed=seed, stream=stream, sample=sample)
    else:
        folded = fold.fold(method, adapters, seed=seed, stream=stream, sample=sample)
        delta, extra = folded.lora_B @ folded.lora_A, folded.bias
    return _sum(weight, delta), bias if bias is None or extra is None else _sum(bias, extra)


def fold_into(
    model: nn.Module,
    adapters: Sequence[LoadedAdapter],
    method: str,
    p: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    *,
    seed: int = 0,
    sample: int = 0,
) -> nn.Module:
    """Adapters merged into the linear layers of a model, in place.

    Args:
        model: a plain torch model with the adapters' layers under their names.
        adapters: from `load_adapter`, in merge order.
        method: one of ``METHODS``.
        p: a dropout rate for each adapter; None is 1 - 1/K of those on a layer.
        weights: a merge weight for each; None is 1.
        seed, sample: of the masks. A layer's stream is that of its name.
    Returns:
        The model.
    Raises:
        TypeError, ValueError: by name, before the model is changed.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    problem = left_over(adapters, modules)
    if problem is not None:
        raise ValueError(problem)
    streams = assign_streams(modules)
    plan = []
    for name in sorted({name for adapter in adapters for name in adapter.layers}):
        layer = _linear(model, modules, name)
        parts = members(name, adapters, p, weights)
        try:
            check(layer.weight, layer.bias, parts, method)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
        plan.append((streams[name], layer, parts))
    with torch.no_grad():
        for stream, layer, parts in plan:
            weight, bias = merged(
                layer.weight, layer.bias, parts, method, seed=seed, stream=stream, sample=sample
            )
            layer.weight.copy_(weight)
            if bias is not None:
                layer.bias.copy_(bias)
    return model


def _linear(model: nn.Module, modules: Mapping[str, nn.Module], name: str) -> nn.Linear:
    """The layer of that name, if its weight can be changed without side effects."""
    layer = modules[name]
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"layer {name} is a {type(layer).__name__}; it must be an nn.Linear")
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
