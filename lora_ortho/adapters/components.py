"""The modules of a model under one set of names, whether PEFT wrapped them or not."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .streams import assign_part_streams


def components(model: object, argument: str = "model") -> dict[str, nn.Module]:
    """A torch module under the name "", or the adaptable parts of a diffusers pipeline by name.

    Raises:
        TypeError: model is neither.
    """
    if isinstance(model, nn.Module):
        return {"": model}
    parts = getattr(model, "_lora_loadable_modules", None)
    if not isinstance(parts, (list, tuple)):
        kind = type(model).__name__
        raise TypeError(f"{argument} must be a torch module or a diffusers pipeline, got {kind}")
    found = {part: getattr(model, part, None) for part in parts}
    return {part: module for part, module in found.items() if isinstance(module, nn.Module)}


@dataclass(frozen=True)
class Named:
    """One module of a model.

    Attributes:
        name: qualified name without PEFT's containers, in a pipeline after the part's name.
        stream: number of its mask stream.
        module: the module; for a layer that PEFT replaced, PEFT's.
    """

    name: str
    stream: int
    module: Any


def named(parts: Mapping[str, nn.Module]) -> list[Named]:
    """Every module of `components`, in name order; a module with two names comes twice."""
    found = {
        (name, part): module for part, root in parts.items() for name, module in base_modules(root)
    }
    streams = assign_part_streams(found)
    modules = [Named(join(part, name), streams[name, part], m) for (name, part), m in found.items()]
    return sorted(modules, key=lambda entry: entry.name)


def join(*parts: str) -> str:
    """A qualified name of parts that may be empty."""
    return ".".join(part for part in parts if part)


def base_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under the name that it has in the model without PEFT.

    PEFT's containers of a whole model are no level, and what adapters bring along is left out. A
    layer that PEFT replaced comes as PEFT's layer, then what is inside its base layer. Without
    PEFT these are the names of `named_modules(remove_duplicate=False)`.
    """
    return _walk("", root)


def _walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    while (inside := _container_of(module)) is not None:
        module = inside
    yield name, module
    for child, below in _base_of(module)._modules.items():
        if below is not None:
            yield from _walk(join(name, child), below)


def _container_of(module: Any) -> nn.Module | None:
    """What a PeftModel or a tuner contains; None for anything else."""
    found: nn.Module | None = None
    if (peft := peft_package()) is None:
        return None
    if isinstance(module, peft.PeftModel):
        found = module.base_model
    elif isinstance(module, peft.tuners.tuners_utils.BaseTuner):
        found = module.model
    return found


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
