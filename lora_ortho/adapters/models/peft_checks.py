"""What of a model with PEFT layers can be merged at run time, and what cannot, and why."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_ortho.adapters.components import Named, Parts, components, named, peft_package
from lora_ortho.adapters.files.peft_config import HARMLESS_INITS

from . import peft_layers
from .parents import uncalled
from .report import SKIPPED, LayerReport

_SHOWN = 5  # problems listed in one message


@dataclass(frozen=True)
class Problem:
    """A module that cannot be merged.

    Attributes:
        entry: where it is.
        adapters: which of the adapters to merge it has; none where it does not matter yet.
        reason: why not.
    """

    entry: Named
    adapters: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        names = ", ".join(map(repr, self.adapters))
        where = f"layer {self.entry.name}" if self.entry.name else "the model"
        return f"{where}, adapter {names}: {self.reason}"

    def report(self) -> LayerReport:
        """As an entry of the report; ranks and rates are those of nothing merged."""
        nothing = (0,) * len(self.adapters)
        return LayerReport(
            self.entry.name,
            self.entry.stream,
            self.adapters,
            nothing,
            nothing,
            SKIPPED,
            self.reason,
        )


def raise_problems(problems: Sequence[Problem], what: str = "attach") -> None:
    """ValueError with the first few of them; nothing where there are none."""
    if not problems:
        return
    lines = [str(problem) for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"and {len(problems) - _SHOWN} more")
    raise ValueError(f"cannot {what}: " + "; ".join(lines))


def tuner_layers(model: Any, *, attached: bool = False) -> list[Named]:
    """PEFT's layers in a model or pipeline, in name order, each once.

    Args:
        attached: take those that are attached too.
    Raises:
        TypeError: neither a module nor a pipeline.
        ValueError: there are none, or one is attached already.
    """
    found = {
        id(entry.module): entry
        for entry in reversed(named(components(model)))
        if hasattr(entry.module, "base_layer") and _is_tuner_layer(entry.module)
    }
    layers = sorted(found.values(), key=lambda entry: entry.name)
    if not layers:
        raise ValueError(
            "model holds no PEFT layers; load its adapters with PEFT first, or use "
            "load_adapter and inject"
        )
    for entry in layers:
        if not attached and peft_layers.of(entry.module) is not None:
            raise ValueError(
                f"layer {entry.name} is attached already; detach it first, with the handle's "
                f"detach() or lora_ortho.detach(model)"
            )
    return layers


def _is_tuner_layer(module: nn.Module) -> bool:
    peft = peft_package()
    return peft is not None and isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)


def pick(adapters: Sequence[str] | None, layers: Sequence[Named]) -> tuple[str, ...]:
    """The adapters to merge, in merge order: those named, or those active on any layer.

    Raises:
        TypeError, ValueError: not a list of different names that the model has; nothing is active.
    """
    present = sorted({name for entry in layers for name in _held(entry.module)})
    if adapters is None:
        active = [name for entry in layers for name in entry.module.active_adapters]
        order = tuple(dict.fromkeys(name for name in active if name in present))
        if not order:
            raise ValueError(f"model has no active adapter; it has {', '.join(present) or 'none'}")
        return order
    if isinstance(adapters, str) or not isinstance(adapters, Sequence):
        raise TypeError(f"adapters must be a list of names, got {type(adapters).__name__}")
    for name in adapters:
        if name not in present:
            raise ValueError(f"adapters: model has no {name!r}; it has {', '.join(present)}")
    if not adapters:
        raise ValueError("adapters must hold at least one name, got none")
    if len(set(adapters)) < len(adapters):
        raise ValueError(f"adapters must be different, got {', '.join(adapters)}")
    return tuple(adapters)


def merged_on(layer: Any, order: Sequence[str], activate: bool) -> tuple[str, ...]:
    """Which adapters of `order` count on a layer: those it has that are active or will be."""
    names = _held(layer)
    return tuple(n for n in order if n in names and (activate or n in layer.active_adapters))


def _held(layer: Any) -> set[str]:
    """Every adapter that one of PEFT's layers has, of whatever kind."""
    parts = (getattr(layer, name, None) for name in layer.adapter_layer_names)
    kinds = (nn.ModuleDict, nn.ParameterDict)
    return {name for part in parts if isinstance(part, kinds) for name in part}


def layer_problems(
    layers: Sequence[Named], order: Sequence[str], activate: bool
) -> Iterator[Problem]:
    """Layers that cannot be merged, whether or not an adapter is active there."""
    for entry in layers:
        names = merged_on(entry.module, order, activate)
        reason = peft_layers.why_not(entry.module, names)
        if reason is not None:
            yield Problem(entry, names, reason)


def uncalled_problems(
    model: Any, layers: Sequence[Named], order: Sequence[str], activate: bool
) -> Iterator[Problem]:
    """Layers that could be merged into their weights, but not in calls: there are none."""
    reasons = uncalled(named(components(model)))
    for entry in layers:
        if id(entry.module) in reasons:
            names = merged_on(entry.module, order, activate)
            yield Problem(entry, names, reasons[id(entry.module)])


def model_problems(model: Any, order: Sequence[str]) -> Iterator[Problem]:
    """What adapters change besides their layers, where that cannot be merged."""
    parts = components(model)
    for part, root in parts.items():
        here = Named(part, 0, root)
        configs = [(name, config) for name, config in configs_of(root).items() if name in order]
        for name, config in configs:
            if getattr(config, "layer_replication", None):
                yield Problem(here, (name,), "layer_replication repeats layers of the model")
        biases = tuple(n for n, c in configs if getattr(c, "bias", "none") != "none")
        if len(biases) > 1:
            reason = 'both replace biases of the model (bias is not "none")'
            yield Problem(here, biases, reason)
    for entry, savers in _savers(parts, order):
        wrapper = entry.module
        if len(savers) > 1:
            yield Problem(entry, savers, "both save this module; only one can be in its place")
        elif wrapper.disable_adapters or savers[0] not in wrapper.active_adapters:
            reason = "saves this module and is not active there; activate it with PEFT first"
            yield Problem(entry, savers, reason)


def saving_problems(model: Any, order: Sequence[str]) -> Iterator[Problem]:
    """What adapters change besides their layers, where only the layers are to be saved."""
    parts = components(model)
    for part, root in parts.items():
        for name, config in configs_of(root).items():
            if name in order and getattr(config, "bias", "none") != "none":
                reason = f"replaces biases of the model (bias={config.bias!r}), which would be lost"
                yield Problem(Named(part, 0, root), (name,), reason)
    for entry, savers in _savers(parts, order):
        yield Problem(entry, savers, "saves this module, which would be lost")


def _savers(parts: Parts, order: Sequence[str]) -> Iterator[tuple[Named, tuple[str, ...]]]:
    """Modules that adapters replace as a whole, and which of `order` do."""
    peft = peft_package()
    for entry in named(parts):
        if isinstance(entry.module, peft.utils.other.AuxiliaryTrainingWrapper):
            savers = tuple(name for name in order if name in entry.module._adapters)
            if savers:
                yield entry, savers


def warn_of_changed_bases(model: Any, order: Sequence[str]) -> None:
    """UserWarning for adapters whose initialisation took something out of the base weights."""
    for root in components(model).values():
        for name, config in configs_of(root).items():
            init = getattr(config, "init_lora_weights", True)
            if name in order and isinstance(init, str) and init not in HARMLESS_INITS:
                warnings.warn(
                    f"adapter {name!r} was made with init_lora_weights={init!r}, which changes "
                    f"the base weights: other adapters then meet a base they do not know",
                    stacklevel=3,
                )


def configs_of(root: nn.Module) -> Mapping[str, Any]:
    """The configurations of all adapters in a model, by name."""
    found: dict[str, Any] = {}
    for module in root.modules():
        configs = module.__dict__.get("peft_config")
        if isinstance(configs, dict):
            found.update(configs)
    return found
