"""What an export starts from: loaded adapters, a model, or a handle with its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_ortho.module import Adapter, FusedOrthoLoRALinear

from .components import components, is_pipeline
from .loaded import LoadedAdapter, checked_adapters
from .models import peft_layers
from .models.attach import Attachment
from .models.inject import Injection
from .models.peft_adapters import adapters_of
from .models.peft_checks import pick, tuner_layers
from .models.peft_layers import Shared


@dataclass(frozen=True)
class Source:
    """Adapters to merge, and what is known about how.

    Attributes:
        adapters: in merge order; where they were injected, with their rates and weights.
        model: the base they are for, or None.
        p, weights: one for each, or None.
        seed, sample, strata: of the masks.
        keep_zero_weights: adapters of weight 0 keep their share of the elements.
    """

    adapters: list[LoadedAdapter]
    model: Any
    p: Sequence[float] | None
    weights: Sequence[float] | None
    seed: int = 0
    sample: int = 0
    strata: int = 1
    keep_zero_weights: bool = False


def resolve(
    source: Any,
    model: Any,
    names: Sequence[str] | None,
    p: Sequence[float] | None,
    weights: Sequence[float] | None,
    seed: int | None,
    sample: int | None,
    strata: int | None,
    keep_zero_weights: bool | None,
) -> Source:
    """The adapters of a source; what is None is as the attachment or injection has it.

    Raises:
        TypeError, ValueError: source or names is not one of those that `export` takes.
    """
    if isinstance(source, Injection):
        if names is not None:
            raise ValueError("adapters: an injection is exported whole; leave the names out")
        one = next(iter(source.layers.values()))
        fixed = one.seed or 0, one.sample, one.strata, one.keep_zero_weights
        found = Source(_injected(source), source.model, p, weights, *fixed)
    elif isinstance(source, Attachment) or is_model(source):
        root = source.model if isinstance(source, Attachment) else source
        if root is not source and _attached(root) is None:
            raise ValueError("source: the handle is detached; give the model, p and weights")
        found = _of_model(root, names, p, weights)
    elif names is not None:
        raise ValueError("adapters can be chosen of a module only; give the list that you want")
    else:
        found = Source(checked_adapters(source, "source"), model, p, weights)
    given: dict[str, Any] = {
        "seed": seed,
        "sample": sample,
        "strata": strata,
        "keep_zero_weights": keep_zero_weights,
    }
    return replace(found, **{name: value for name, value in given.items() if value is not None})


def is_model(source: object) -> bool:
    """True for a torch module and for a pipeline."""
    return isinstance(source, nn.Module) or is_pipeline(source)


def _of_model(
    model: Any,
    names: Sequence[str] | None,
    p: Sequence[float] | None,
    weights: Sequence[float] | None,
) -> Source:
    """The adapters in PEFT's layers of a model, merged as they are attached."""
    modules = [module for root in components(model).values() for module in root.modules()]
    if any(isinstance(module, FusedOrthoLoRALinear) for module in modules):
        raise ValueError("source: model holds injected layers; give the handle that inject gave")
    shared = _attached(model)
    if shared is None:
        return Source(adapters_of(model, names), model, p, weights)
    order = pick(names, tuner_layers(model, attached=True))
    if names is None:  # as the attached layers merge them
        order = tuple(dict.fromkeys([*(n for n in shared.order if n in order), *order]))
    adapters = adapters_of(model, order) if names is not None else _in_order(model, order)
    choice = shared.choice(order, [1.0] * len(order))
    return Source(
        adapters,
        model,
        p if p is not None or shared.p is None else [float(rate or 0.0) for rate in choice.p],
        weights if weights is not None else choice.weights,
        shared.seed or 0,
        shared.sample,
        shared.strata,
        shared.keep_zero_weights,
    )


def _in_order(model: Any, order: Sequence[str]) -> list[LoadedAdapter]:
    """The active adapters of a model in another order than PEFT's."""
    found = {adapter.name: adapter for adapter in adapters_of(model)}
    return [found[name] for name in order]


def _attached(model: Any) -> Shared | None:
    """The settings with which a model is attached; None where it is not.

    Raises:
        ValueError: its parts are attached with different settings.
    """
    merges = [peft_layers.of(entry.module) for entry in tuner_layers(model, attached=True)]
    found = [merge.shared for merge in merges if merge is not None]
    if any(shared != found[0] for shared in found):
        raise ValueError(
            "source: parts of it are attached with different settings; export them one by one"
        )
    return found[0] if found else None


def _injected(handle: Injection) -> list[LoadedAdapter]:
    """The adapters in injected layers, as they are now."""
    parts: dict[int, dict[str, Adapter]] = {}
    kernels: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, layer in handle.layers.items():
        kernel = tuple(getattr(layer.base, "kernel_size", ()))
        for index, part in zip(handle._members[name], _parts_of(layer), strict=True):
            parts.setdefault(index, {})[name] = part
            if kernel:
                kernels.setdefault(index, {})[name] = kernel
    split = "" not in components(handle.model)
    made = []
    for index, layers in sorted(parts.items()):
        title = next(iter(layers.values())).name or str(index)
        path, own = Path(title), kernels.get(index, {})
        pieces = frozenset(name.partition(".")[0] for name in layers if split)
        made.append(LoadedAdapter(title, layers, path, kernels=own, parts=pieces))
    return made


def _parts_of(layer: FusedOrthoLoRALinear) -> list[Adapter]:
    """The adapters of an injected layer with its present factors, rates and weights."""
    factors: list[Any] = list(layer.adapters)
    return [
        Adapter(f.lora_A.detach(), f.lora_B.detach(), scaling, weight, p, _detached(f.bias), name)
        for f, scaling, weight, p, name in zip(
            factors, layer._choice.scaling, layer.weights, layer.p, layer._names, strict=True
        )
    ]


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()
