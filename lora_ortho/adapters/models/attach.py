"""Run-time merging in models that hold PEFT LoRA layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lora_ortho import backends
from lora_ortho.adapters.components import Named, components
from lora_ortho.mask_stream import SAMPLE_LIMIT, check_in_range, check_seed, check_strata
from lora_ortho.problem import check_method, finite_numbers

from . import injected, peft_layers
from .attention_scale import ScaleHook
from .passes import FirstPass, Mark, Passes, remove_hooks
from .peft_checks import (
    layer_problems,
    merged_on,
    model_problems,
    pick,
    raise_problems,
    tuner_layers,
    uncalled_problems,
    warn_of_changed_bases,
)
from .peft_layers import LayerMerge, Shared
from .report import SKIPPED, Handle, LayerReport, Layers, served_how

_KEEP: Any = object()  # "leave this setting as it is"; None means something else


class Attachment(Handle):
    """Run-time merging inside a model; a context manager that takes it out at the end.

    Attributes:
        model: the model or pipeline that was attached.
        layers: the attached layers by qualified name, in name order.
        report: a `LayerReport` for each, and for each one that was skipped, in name order.
    """

    def __init__(
        self,
        model: Any,
        layers: Mapping[str, nn.Module],
        report: Sequence[LayerReport],
        shared: Shared,
        activated: list[tuple[Any, Any]],
    ) -> None:
        marked: dict[str, tuple[nn.Module, Mark]] = {}
        for name, layer in layers.items():
            merge = peft_layers.of(layer)
            if merge is not None:
                marked[name] = (layer, merge.mark)
        super().__init__(report, Passes(components(model), marked))
        self.model = model
        self.layers: Mapping[str, nn.Module] = Layers(layers)
        self._shared = shared
        self._activated = activated  # layers, and what was active on them before

    def set(
        self,
        *,
        method: str = _KEEP,
        seed: int | None = _KEEP,
        sample: int = _KEEP,
        strata: int = _KEEP,
        p: Sequence[float] | None = _KEEP,
        weights: Sequence[float] | None = _KEEP,
    ) -> Attachment:
        """Changes settings of all layers at once; those not given stay as they are.

        Args:
            method: "orthogonal", "dropout" or "direct".
            seed: None for a new one at every forward, or an int.
            sample: which Monte Carlo draw, in [0, 2**24).
            strata: how many samples in a row share the elements out among the adapters in
                proportion, in [1, 65536]; see `fused_ortho_lora`.
            p, weights: a rate and a merge weight for each adapter, in the order of `attach`.
        Raises:
            TypeError, ValueError: by name; then nothing has changed.
        """
        given: dict[str, Any] = {
            "method": method,
            "seed": seed,
            "sample": sample,
            "strata": strata,
            "p": p,
            "weights": weights,
        }
        changes = {name: value for name, value in given.items() if value is not _KEEP}
        for name in {"p", "weights"} & set(changes):
            changes[name] = _by_adapter(name, changes[name], self._shared.order)
        fresh = dataclasses.replace(self._shared, **changes)
        _check(fresh, {name: fresh.names(layer) for name, layer in self.layers.items()})
        for name in changes:
            setattr(self._shared, name, getattr(fresh, name))
        for layer, merge in self._merges():
            merge.prepare(layer, self._shared.names(layer))
        return self

    def refresh(self) -> None:
        """Packs all factors again, after a change that no check notices: a few elements written
        through ``.data``; on a GPU, frozen factors written without a version counter moving."""
        for layer, merge in self._merges():
            merge.refresh(layer)

    def _merges(self) -> Iterator[tuple[Any, LayerMerge]]:
        """The layers that are still attached by this handle."""
        for layer in self.layers.values():
            merge = peft_layers.of(layer)
            if merge is not None and merge.shared is self._shared:
                yield layer, merge

    def detach(self) -> None:
        """Restores the forward of every layer; a second call does nothing."""
        self._passes.remove()
        for layer, _ in self._merges():
            peft_layers.take(layer)
        for layer, before in self._activated:
            if layer._active_adapter == list(self._shared.order):  # else changed since
                layer._active_adapter = before
        self._activated = []

    def __repr__(self) -> str:
        skipped = sum(entry.how == SKIPPED for entry in self.report)
        names = ", ".join(self._shared.order)
        return f"Attachment({len(self.layers)} layers, {skipped} skipped, adapters: {names})"


def attach(
    model: Any,
    adapters: Sequence[str] | None = None,
    *,
    p: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    method: str = "orthogonal",
    seed: int | None = None,
    backend: str | None = None,
    on_unsupported: str = "error",
    strata: int = 1,
    keep_zero_weights: bool = False,
) -> Attachment:
    """Merges the active adapters of every PEFT LoRA layer at run time, in place.

    Layers change their class and nothing else: parameters, state_dict keys, save_pretrained,
    deepcopy, disable_adapter, merge and unmerge, set_adapter and changes of scale work as before.
    A layer's masks depend on its name in the model without PEFT, the seed and the sample, not on
    which other layers are adapted. Gradients reach the active adapters' parameters. Layers that
    are added afterwards are not attached.

    Args:
        model: a module with PEFT LoRA layers (a PeftModel, a transformers or diffusers model with
            adapters loaded), or a diffusers pipeline, whose parts are all attached.
        adapters: names in merge order; they are made active until `detach`. None takes the
            active ones.
        p: a dropout rate for each of them; None gives 1 - 1/K on a layer where K are active.
        weights: a merge weight for each of them; None is 1. PEFT's scaling applies as well. An
            adapter of weight 0 is off: it owns no element and does not count in K.
        method, seed, backend: as for `FusedOrthoLoRALinear`.
        on_unsupported: "error", or "skip" to leave a layer that cannot be merged to PEFT; the
            report then says why.
        strata: how many samples in a row, as `set(sample=...)` counts them, share the elements out
            among the adapters in proportion, in [1, 65536]; see `fused_ortho_lora`. The samples of
            such a block need the same seed.
        keep_zero_weights: adapters of weight 0 keep their share of the elements.
    Returns:
        A handle with `report`, `set` and `detach`; `with attach(...)` detaches at the end.
    Raises:
        TypeError, ValueError: an argument, a layer or an adapter that does not fit, by name; then
            the model is as it was.
    """
    if on_unsupported not in ("error", "skip"):
        raise ValueError(f'on_unsupported must be "error" or "skip", got {on_unsupported!r}')
    layers = tuner_layers(model)
    order, activate = pick(adapters, layers), adapters is not None
    rates, merge_weights = _by_adapter("p", p, order), _by_adapter("weights", weights, order)
    shared = Shared(
        order, rates, merge_weights, method, seed, 0, strata, backend, bool(keep_zero_weights)
    )
    problems = [*model_problems(model, order), *layer_problems(layers, order, activate)]
    known = {id(problem.entry.module) for problem in problems}
    idle = uncalled_problems(model, layers, order, activate)
    problems += [problem for problem in idle if id(problem.entry.module) not in known]
    if on_unsupported == "error":
        raise_problems([problem for problem in problems if problem.adapters])
    left_out = {id(problem.entry.module) for problem in problems}
    chosen = [entry for entry in layers if id(entry.module) not in left_out]
    members = {e.name: merged_on(e.module, order, activate) for e in chosen}
    if not any(members.values()):
        raise_problems(problems)
    _check(shared, members)
    warn_of_changed_bases(model, order)
    report = [_report(entry, members[entry.name], shared) for entry in chosen]
    report += [problem.report() for problem in problems]
    merges = []
    for entry in chosen:
        merge = LayerMerge(type(entry.module), entry.name, entry.stream, shared)
        merge.prepare(entry.module, members[entry.name])
        merges.append((entry.module, merge))
    for layer, merge in merges:
        peft_layers.put(layer, merge)
    activated = _activate(layers, order) if activate else []
    return Attachment(model, {e.name: e.module for e in chosen}, report, shared, activated)


def detach(model: Any) -> int:
    """Takes out what `attach` and `inject` put into a model, or into what it is a copy of.

    Adapters that `attach` made active stay so; a handle's own `detach` puts that back too.

    Returns:
        How many layers it was in.

    Raises:
        TypeError: model is no torch module and no pipeline.
    """
    roots = components(model).values()
    modules = {id(module): module for root in roots for module in root.modules()}
    remove_hooks(modules.values(), (FirstPass, ScaleHook))
    attached = [module for module in modules.values() if peft_layers.of(module) is not None]
    for layer in attached:
        peft_layers.take(layer)
    adapters = [found for module in modules.values() if (found := injected.of(module)) is not None]
    for found in adapters:
        found.take()
    return len(attached) + len(adapters)


def _activate(layers: Sequence[Named], order: Sequence[str]) -> list[tuple[Any, Any]]:
    """Makes adapters active, whatever trains or not; each layer with what was active before."""
    before = [(entry.module, entry.module._active_adapter) for entry in layers]
    for layer, _ in before:
        layer._active_adapter = list(order)
    return before


def _by_adapter(
    name: str, values: Sequence[float] | None, order: Sequence[str]
) -> dict[str, float] | None:
    """Numbers by adapter; None for None."""
    if values is None:
        return None
    return dict(zip(order, finite_numbers(name, values, len(order)), strict=True))


def _check(shared: Shared, members: Mapping[str, tuple[str, ...]]) -> None:
    """Raises unless the settings work on layers with these adapters, naming what does not."""
    check_method(shared.method)
    if shared.seed is not None:
        shared.seed = _int_seed(shared.seed)
    shared.sample = check_in_range("sample", shared.sample, SAMPLE_LIMIT)
    shared.strata = check_strata(shared.strata)
    backends.check_name(shared.backend)
    reason = None if shared.backend is None else backends.available()[shared.backend]
    if reason is not None:
        raise ValueError(f"backend {shared.backend!r} does not work here: {reason}")
    for layer, names in members.items():
        if not names:
            continue
        try:
            shared.choice(names, [1.0] * len(names)).mix()
        except ValueError as error:
            raise ValueError(f"layer {layer}: {error}") from error


def _int_seed(seed: Any) -> int:
    checked = check_seed(seed)
    if not isinstance(checked, int):
        raise TypeError("seed must be an int or None, got a tensor")
    return checked


def _report(entry: Named, names: tuple[str, ...], shared: Shared) -> LayerReport:
    layer: Any = entry.module
    mix = shared.choice(names, [1.0] * len(names)).mix()
    names = tuple(names[j] for j in mix.members)
    ranks = tuple(layer.r[name] for name in names)
    how, why = served_how(layer.base_layer)
    return LayerReport(entry.name, entry.stream, names, ranks, mix.p, how, why)
