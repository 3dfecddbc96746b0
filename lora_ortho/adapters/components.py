"""The modules of a model under one set of names, whoever wrapped them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from .streams import assign_part_streams

# Modules that stand for the one inside them, by their class: the child that they hold. By name, so
# that nothing is imported; where a package was not imported, no model holds anything of it.
_COMPILED = "torch._dynamo.eval_frame.OptimizedModule"
_WRAPPERS = {
    _COMPILED: "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": (
        "_fsdp_wrapped_module"
    ),
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": (
        "_checkpoint_wrapped_module"
    ),
    "torch.optim.swa_utils.AveragedModel": "module",
    "deepspeed.runtime.engine.DeepSpeedEngine": "module",
}
ADAPTERS = "_lora_ortho"  # under this name a layer holds what was put beside its own weights
_LORA_PARTS = "_lora_loadable_modules"  # the parts for which diffusers itself reads adapters


def is_pipeline(model: object) -> bool:
    """True for what holds several models under names, as the pipelines of diffusers do."""
    if isinstance(model, nn.Module):
        return False
    names = getattr(model, _LORA_PARTS, None)
    return isinstance(names, (list, tuple)) or isinstance(
        getattr(model, "components", None), Mapping
    )


class Parts(dict[str, nn.Module]):
    """Modules by the names of the parts that they are.

    Attributes:
        first: those for which diffusers itself reads adapters; their streams do not depend on
            the others.
    """

    first: frozenset[str] = frozenset()


def components(model: object, argument: str = "model") -> Parts:
    """A torch module under the name "", or the modules of a diffusers pipeline by name.

    A module that is two parts of a pipeline comes once.

    Raises:
        TypeError: model is neither.
    """
    if isinstance(model, nn.Module):
        return Parts({"": model})
    if not is_pipeline(model):
        kind = type(model).__name__
        raise TypeError(f"{argument} must be a torch module or a diffusers pipeline, got {kind}")
    names = list(getattr(model, _LORA_PARTS, ()))
    places = {**{name: getattr(model, name, None) for name in names}, **_components_of(model)}
    found = Parts()
    found.first = frozenset(names)
    for part, module in places.items():
        if isinstance(module, nn.Module) and all(module is not known for known in found.values()):
            found[part] = module
    return found


def _components_of(model: object) -> Mapping[str, object]:
    held = getattr(model, "components", None)
    return held if isinstance(held, Mapping) else {}


def missing_parts(model: object) -> frozenset[str]:
    """What a pipeline has a place for and does not hold: None there."""
    places = {*getattr(model, _LORA_PARTS, ()), *_components_of(model)}
    return frozenset(part for part in places if getattr(model, part, None) is None)


@dataclass(frozen=True)
class Named:
    """One module of a model.

    Attributes:
        name: qualified name without containers and wrappers, in a pipeline after the part's name.
        stream: number of its mask stream.
        module: the module; for a layer that PEFT replaced, PEFT's.
    """

    name: str
    stream: int
    module: Any


def named(parts: Parts) -> list[Named]:
    """Every module of `components`, in name order; a module with two names comes twice."""
    found = {
        (name, part): module for part, root in parts.items() for name, module in base_modules(root)
    }
    streams = assign_part_streams(found, parts.first)
    modules = [Named(join(part, name), streams[name, part], m) for (name, part), m in found.items()]
    return sorted(modules, key=lambda entry: entry.name)


def join(*parts: str) -> str:
    """A qualified name of parts that may be empty."""
    return ".".join(part for part in parts if part)


def base_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under the name that it has in the plain model.

    PEFT's containers of a whole model and wrappers (torch.compile, data parallel, checkpointing)
    are no level, and what adapters bring along is left out. A layer that PEFT replaced comes as
    PEFT's layer, then what is inside its base layer. Without any of these the names are those of
    `named_modules(remove_duplicate=False)`.
    """
    return _walk("", root)


def _walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    module = containers(module)[-1]
    yield name, module
    for child, below in containers(_base_of(module))[-1]._modules.items():
        if below is not None and child != ADAPTERS:
            yield from _walk(join(name, child), below)


def containers(module: nn.Module) -> list[nn.Module]:
    """A module, what it is a container or wrapper of, and so on; the module of the model last."""
    chain = [module]
    while (inside := _container_of(chain[-1])) is not None:
        chain.append(inside)
    return chain


def _container_of(module: Any) -> nn.Module | None:
    """What a PeftModel, a tuner or a wrapper contains; None for anything else."""
    found: nn.Module | None = None
    kind: type = type(module)
    child, peft = _wrapped_child(kind), peft_package()
    if child is not None:
        found = module._modules[child]
    elif peft is None:
        found = None
    elif isinstance(module, peft.PeftModel):
        found = module.base_model
    elif isinstance(module, peft.tuners.tuners_utils.BaseTuner):
        found = module.model
    return found


def is_compiled(module: nn.Module) -> bool:
    """True for what torch.compile made of a module, and for one that runs a compiled function."""
    compiled = getattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable", None)
    kind: type = type(module)
    wrapper = _wrapped_child(kind) == _WRAPPERS[_COMPILED]
    return wrapper or compiled is not None or module._compiled_call_impl is not None


@cache
def _wrapped_child(kind: type) -> str | None:
    """The child that modules of a class are wrappers of; None where they are none."""
    names = (f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__)
    return next((_WRAPPERS[name] for name in names if name in _WRAPPERS), None)


def _base_of(module: Any) -> nn.Module:
    """The layer that PEFT wrapped, or the module itself."""
    found: nn.Module = module
    if (peft := peft_package()) is None:
        return found
    if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
        found = module.get_base_layer()
    elif isinstance(module, peft.utils.other.AuxiliaryTrainingWrapper):
        found = module.original_module
    return found


def peft_package() -> Any:
    """PEFT where it was imported: where it was not, no model holds anything of it."""
    return sys.modules.get("peft")
