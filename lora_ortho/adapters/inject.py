"""Loaded adapters into a plain torch model, and out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from types import MappingProxyType
from typing import Any

from torch import nn

from lora_ortho.mixing import Mix
from lora_ortho.module import Adapter, FusedOrthoLoRALinear
from lora_ortho.problem import finite_numbers

from .components import Named, components, named
from .convolution import OrthoLoRAConvolution
from .loaded import LoadedAdapter, checked_adapters
from .report import Handle, LayerReport, served_how
from .targets import Shape, shape_of

# Modules that read the weights of their linear layers instead of calling them.
_BYPASSING = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_KEEP: Any = object()  # "leave this setting as it is"; None means something else


class Injection(Handle):
    """Adapters inside a model; a context manager that takes them out at the end.

    Attributes:
        model: the model, changed in place.
        layers: the fused layers by qualified name, in name order.
        report: a `LayerReport` for each.
    """

    def __init__(
        self,
        model: Any,
        layers: dict[str, FusedOrthoLoRALinear],
        members: dict[str, tuple[int, ...]],
        report: tuple[LayerReport, ...],
    ) -> None:
        self.model = model
        self.layers: Mapping[str, FusedOrthoLoRALinear] = MappingProxyType(layers)
        self.report = report
        self._members = members  # which adapters, by index, each layer has
        self._count = 1 + max(index for indices in members.values() for index in indices)
        self._attached = True

    def set(
        self,
        *,
        method: str = _KEEP,
        seed: int | None = _KEEP,
        sample: int = _KEEP,
        p: Sequence[float] | None = _KEEP,
        weights: Sequence[float] | None = _KEEP,
    ) -> Injection:
        """Changes settings of all layers at once; those not given stay.

        Args:
            method: "orthogonal", "dropout" or "direct".
            seed: None for a fresh one at every forward, or an int.
            sample: which Monte Carlo draw, in [0, 2**24).
            p, weights: a rate and a merge weight for each adapter given to `inject`; None is
                1 - 1/K on a layer where K take part, and 1.
        Raises:
            TypeError, ValueError: by name; then no layer has changed.
        """
        given: dict[str, Any] = {"method": method, "seed": seed, "sample": sample}
        changes = {name: value for name, value in given.items() if value is not _KEEP}
        each: dict[str, Sequence[float]] = {}
        for name, numbers in (("p", p), ("weights", weights)):
            if numbers is not _KEEP:
                changes[name] = numbers
                if numbers is not None or name == "weights":
                    each[name] = finite_numbers(name, numbers, self._count)
        layers = self.layers.values()
        before = {layer: {name: getattr(layer, name) for name in changes} for layer in layers}
        try:
            for name, layer in self.layers.items():
                for setting, value in changes.items():
                    if setting in each:
                        value = [each[setting][index] for index in self._members[name]]
                    if getattr(layer, setting) != value:  # a change packs anew
                        setattr(layer, setting, value)
        except (TypeError, ValueError):
            for layer, values in before.items():
                for setting, value in values.items():
                    setattr(layer, setting, value)
            raise
        return self

    def refresh(self) -> None:
        """Packs all factors again, after a change that nothing shows: a few elements written
        through ``.data``; on a GPU, frozen factors written past their version counters."""
        for layer in self.layers.values():
            layer.refresh()

    def detach(self) -> None:
        """Puts the model's own layers back; a second call does nothing.

        Raises:
            RuntimeError: a fused layer is no longer where it was put; the model is left as it is.
        """
        if not self._attached:
            return
        for name, layer in self.layers.items():
            if _find(self.model, name) is not layer:
                raise RuntimeError(f"cannot detach: {name} was replaced after the injection")
        for name, layer in self.layers.items():
            _put(self.model, name, layer.base)
        self._attached = False

    def __repr__(self) -> str:
        state = "attached to" if self._attached else "detached from"
        return f"Injection({len(self.layers)} layers, {state} {type(self.model).__name__})"


def inject(
    model: Any,
    adapters: Sequence[LoadedAdapter],
    *,
    p: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    method: str = "orthogonal",
    seed: int | None = None,
    backend: str | None = None,
    keep_zero_weights: bool = False,
) -> Injection:
    """Replaces every adapted linear layer and convolution of a model by a fused one, in place.

    Factors move to the device of the layer they adapt and keep their dtype. A layer's masks depend
    on its qualified name, the seed and the sample, not on which other layers are adapted.

    Args:
        model: any torch module that has the adapters' layers under their names, or a diffusers
            pipeline whose parts have.
        adapters: from `load_adapter`; their order is the merge order.
        p: a dropout rate for each adapter; None gives 1 - 1/K on a layer that K of them adapt.
        weights: a merge weight for each adapter; None is 1. An adapter of weight 0 is off.
        method, seed, backend, keep_zero_weights: as for `FusedOrthoLoRALinear`.
    Returns:
        A handle with `report`, `set` and `detach`; `with inject(...)` detaches at the end.
    Raises:
        TypeError, ValueError: an argument or a layer that does not fit, by name; then the model is
            as it was.
    """
    adapters = checked_adapters(adapters)
    modules = _modules(model)
    rates = None if p is None else finite_numbers("p", p, len(adapters))
    merge_weights = finite_numbers("weights", weights, len(adapters))
    layers: dict[str, FusedOrthoLoRALinear] = {}
    members: dict[str, tuple[int, ...]] = {}
    report = []
    for name in sorted({name for adapter in adapters for name in adapter.layers}):
        chosen = tuple(j for j, adapter in enumerate(adapters) if name in adapter.layers)
        site, shape = _site(modules, name, adapters[chosen[0]].name)
        found = [
            _placed(adapters[j], site, shape, merge_weights[j], rates[j] if rates else None)
            for j in chosen
        ]
        kind: Any = OrthoLoRAConvolution if shape.kernel else FusedOrthoLoRALinear
        try:
            layers[name] = kind(
                site.module, found, method=method, seed=seed, stream=site.stream, backend=backend,
                keep_zero_weights=keep_zero_weights,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
        layers[name].train(site.module.training)
        members[name] = chosen
        report.append(_report(site, found, layers[name].mix))
    for name, layer in layers.items():
        _put(model, name, layer)
    return Injection(model, layers, members, tuple(report))


def _modules(model: object) -> dict[str, Named]:
    """Every module of a model or pipeline by its qualified name."""
    modules = {entry.name: entry for entry in named(components(model))}
    for name, entry in modules.items():
        if isinstance(entry.module, FusedOrthoLoRALinear):
            raise ValueError(f"model: {name} is adapted already; detach it first")
    return modules


def _parent(model: object, name: str) -> tuple[nn.Module, str]:
    """The module that holds the one of that name, and its name there."""
    parts = components(model)
    root = parts.get("")
    if root is None:
        part, _, name = name.partition(".")
        root = parts[part]
    parent, _, child = name.rpartition(".")
    return root.get_submodule(parent), child


def _find(model: object, name: str) -> nn.Module | None:
    try:
        parent, child = _parent(model, name)
    except (AttributeError, KeyError):
        return None
    return getattr(parent, child, None)


def _put(model: object, name: str, module: nn.Module) -> None:
    parent, child = _parent(model, name)
    setattr(parent, child, module)


def _site(modules: Mapping[str, Named], name: str, adapter: str) -> tuple[Named, Shape]:
    """The layer of that name and its shape, if it can be replaced without side effects."""
    entry = modules.get(name)
    if entry is None:
        raise ValueError(f"adapter {adapter!r} adapts {name}, which the model does not have")
    kind = type(entry.module).__name__
    if hasattr(entry.module, "get_base_layer"):
        raise ValueError(f"layer {name} is PEFT's already ({kind}); use attach for such models")
    shape = shape_of(entry.module)
    if shape is None:
        raise ValueError(
            f"adapter {adapter!r} adapts {name}, a {kind}; it must be a linear layer or a "
            f"convolution without groups"
        )
    parent = modules.get(name.rpartition(".")[0])
    if parent is not None and isinstance(parent.module, _BYPASSING):
        kind = type(parent.module).__name__
        raise ValueError(f"layer {name} is part of a {kind}, which does not call its linear layers")
    others = [n for n, e in modules.items() if e.module is entry.module and n != name]
    if others:
        raise ValueError(f"layer {name} is shared: it is also {', '.join(others)}")
    return entry, shape


def _placed(
    adapter: LoadedAdapter, site: Named, wanted: Shape, weight: float, p: float | None
) -> Adapter:
    """One layer's part of an adapter, on the layer's device, with its weight and rate."""
    part = adapter.layers[site.name]
    kernel = adapter.kernels.get(site.name, ())
    found = Shape(part.lora_A.shape[1] // prod(kernel), part.lora_B.shape[0], kernel)
    if not wanted.takes(found):
        raise ValueError(
            f"adapter {adapter.name!r} takes {found} on {site.name}, the layer takes {wanted}"
        )
    device = site.module.weight.device
    return replace(
        part,
        lora_A=part.lora_A.to(device),
        lora_B=part.lora_B.to(device),
        bias=None if part.bias is None else part.bias.to(device),
        weight=weight,
        p=p,
        name=adapter.name,
    )


def _report(site: Named, adapters: Sequence[Adapter], mix: Mix) -> LayerReport:
    chosen = [adapters[j] for j in mix.members]
    ranks = tuple(adapter.lora_A.shape[0] for adapter in chosen)
    names = tuple(str(adapter.name) for adapter in chosen)
    how, why = served_how(site.module)
    return LayerReport(site.name, site.stream, names, ranks, mix.p, how, why)
