"""Loaded adapters into a plain torch model, and out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from torch import nn

from lora_ortho.adapters.components import components, named
from lora_ortho.adapters.loaded import LoadedAdapter, checked_adapters
from lora_ortho.adapters.shapes import Shape
from lora_ortho.mixing import Mix
from lora_ortho.module import Adapter
from lora_ortho.problem import check_method, finite_numbers

from .attention_scale import scale_hooks
from .injected import ConvolutionAdapters, LayerAdapters
from .passes import Passes
from .report import FUSED, SKIPPED, Handle, LayerReport, Layers, served_how
from .sites import Site, Sites

_KEEP: Any = object()  # "leave this setting as it is"; None means something else


class Injection(Handle):
    """Adapters inside a model; a context manager that takes them out at the end.

    Attributes:
        model: the model, changed in place.
        layers: the adapters of each layer by its qualified name, in name order: callable as the
            layer, with the settings of a `FusedOrthoLoRALinear`.
        report: a `LayerReport` for each, and for each one that was skipped.
    """

    def __init__(
        self,
        model: Any,
        layers: dict[str, LayerAdapters],
        members: dict[str, tuple[int, ...]],
        report: Sequence[LayerReport],
    ) -> None:
        parts = components(model)
        marked = {name: (one.layer, one.mark) for name, one in layers.items()}
        super().__init__(report, Passes(parts, marked))
        self.model = model
        self.layers: Mapping[str, LayerAdapters] = Layers(layers)
        self._members = members  # which adapters, by index, each layer has
        self._count = 1 + max(index for indices in members.values() for index in indices)
        self._scales = scale_hooks(parts, layers)
        self._attached = True

    def set(
        self,
        *,
        method: str = _KEEP,
        seed: int | None = _KEEP,
        sample: int = _KEEP,
        strata: int = _KEEP,
        p: Sequence[float] | None = _KEEP,
        weights: Sequence[float] | None = _KEEP,
    ) -> Injection:
        """Changes settings of all layers at once; those not given stay as they are.

        Args:
            method: "orthogonal", "dropout" or "direct".
            seed: None for a new one at every forward, or an int.
            sample: which Monte Carlo draw, in [0, 2**24).
            strata: how many samples in a row share the elements out among the adapters in
                proportion, in [1, 65536]; see `fused_ortho_lora`.
            p, weights: a rate and a merge weight for each adapter given to `inject`; None is
                1 - 1/K on a layer where K take part, and 1.
        Raises:
            TypeError, ValueError: by name; then no layer has changed.
        """
        given: dict[str, Any] = {
            "method": method,
            "seed": seed,
            "sample": sample,
            "strata": strata,
        }
        changes = {name: value for name, value in given.items() if value is not _KEEP}
        each: dict[str, Sequence[float]] = {}
        for name, numbers in (("p", p), ("weights", weights)):
            if numbers is not _KEEP:
                changes[name] = numbers
                if numbers is not None or name == "weights":
                    each[name] = finite_numbers(name, numbers, self._count)
        plans = []
        for name, layer in self.layers.items():
            own = {
                setting: [each[setting][index] for index in self._members[name]]
                if setting in each
                else value
                for setting, value in changes.items()
            }
            try:
                plans.append((layer, layer.planned(**own)))
            except ValueError as error:
                raise ValueError(f"layer {name}: {error}") from error
        for layer, plan in plans:
            layer.adopt(plan)
        return self

    def refresh(self) -> None:
        """Packs all factors again, after a change that no check notices: a few elements written
        through ``.data``; on a GPU, frozen factors written without a version counter moving."""
        for layer in self.layers.values():
            layer.refresh()

    def detach(self) -> None:
        """Restores the forward of every layer, whatever has been wrapped around it since.

        Layers that the model has replaced since are not touched. A second call does nothing.
        """
        self._passes.remove()
        for hook in self._scales:
            hook.remove()
        for layer in self.layers.values():
            layer.take()
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
    on_unsupported: str = "error",
    strata: int = 1,
    keep_zero_weights: bool = False,
) -> Injection:
    """Adds adapters to the linear layers and convolutions of a model, in place.

    Layers change their class and nothing else: parameters, state_dict, save_pretrained, tied
    weights, hooks and isinstance are those of the plain model. Factors move to the device of the
    layer they adapt and keep their dtype. A layer's masks depend on its qualified name in the plain
    model, the seed and the sample, not on which other layers are adapted.

    Args:
        model: any torch module that has the adapters' layers under their names, or a diffusers
            pipeline whose parts have; wrapped (torch.compile, data parallel) or not.
        adapters: from `load_adapter`; their order is the merge order.
        p: a dropout rate for each adapter; None gives 1 - 1/K on a layer that K of them adapt.
        weights: a merge weight for each adapter; None is 1. An adapter of weight 0 is off.
        method, seed, backend, keep_zero_weights: as for `FusedOrthoLoRALinear`.
        on_unsupported: "error", or "skip" to leave a layer that cannot be adapted as it is; the
            report then says why.
        strata: how many samples in a row, as `set(sample=...)` counts them, share the elements out
            among the adapters in proportion, in [1, 65536]; see `fused_ortho_lora`. The samples of
            such a block need the same seed.
    Returns:
        A handle with `report`, `set` and `detach`; `with inject(...)` detaches at the end.
    Raises:
        TypeError, ValueError: an argument or a layer that does not fit, by name; then the model is
            as it was.
    """
    if on_unsupported not in ("error", "skip"):
        raise ValueError(f'on_unsupported must be "error" or "skip", got {on_unsupported!r}')
    check_method(method)
    adapters = checked_adapters(adapters)
    sites = Sites(named(components(model)))
    rates = None if p is None else finite_numbers("p", p, len(adapters))
    merge_weights = finite_numbers("weights", weights, len(adapters))
    layers: dict[str, LayerAdapters] = {}
    members: dict[str, tuple[int, ...]] = {}
    report = []
    for name, parts in sites.by_layer(adapters).items():
        site, chosen = sites.find(name), tuple(parts)
        if site.reason:
            if on_unsupported == "error":
                raise ValueError(site.problem(adapters[chosen[0]].name))
            report.append(_skipped(site, [adapters[j].name for j in chosen]))
            continue
        found = [
            _placed(adapters[j], parts[j], site, merge_weights[j], rates[j] if rates else None)
            for j in chosen
        ]
        kind = ConvolutionAdapters if site.shape.kernel else LayerAdapters
        try:
            layers[name] = kind(
                name,
                site.module,
                found,
                method=method,
                seed=seed,
                stream=site.stream,
                backend=backend,
                keep_zero_weights=keep_zero_weights,
            )
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
        layers[name].strata = strata
        layers[name].train(site.module.training)
        members[name] = chosen
        report.append(_report(site, found, layers[name].mix))
    if not layers:
        raise ValueError(f"adapters: no layer of them can be adapted; {report[0]}")
    for layer in layers.values():
        layer.put()
    return Injection(model, layers, members, report)


def _placed(
    adapter: LoadedAdapter, name: str, site: Site, weight: float, p: float | None
) -> Adapter:
    """One layer's part of an adapter, on the layer's device, with its weight and rate."""
    part = adapter.layers[name]
    kernel = adapter.kernels.get(name, ())
    found = Shape(part.lora_A.shape[1] // prod(kernel), part.lora_B.shape[0], kernel)
    if not site.shape.takes(found):
        raise ValueError(
            f"adapter {adapter.name!r} takes {found} on {name}, the layer takes {site.shape}"
        )
    device = site.device
    return replace(
        part,
        lora_A=part.lora_A.to(device),
        lora_B=part.lora_B.to(device),
        bias=None if part.bias is None else part.bias.to(device),
        weight=weight,
        p=p,
        name=adapter.name,
    )


def _report(site: Site, adapters: Sequence[Adapter], mix: Mix) -> LayerReport:
    chosen = [adapters[j] for j in mix.members]
    ranks = tuple(adapter.lora_A.shape[0] for adapter in chosen)
    names = tuple(str(adapter.name) for adapter in chosen)
    # Hooks on the layer see what it gives with its adapters, so they are in nobody's way.
    how, why = (FUSED, "") if type(site.module) is nn.Linear else served_how(site.module)
    return LayerReport(site.name, site.stream, names, ranks, mix.p, how, why)


def _skipped(site: Site, names: Sequence[str]) -> LayerReport:
    nothing = (0,) * len(names)
    return LayerReport(site.name, site.stream, tuple(names), nothing, nothing, SKIPPED, site.reason)
