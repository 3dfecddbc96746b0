"""Which layer of a model a name in an adapter file means, and whether the factors fit it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lora_ortho.adapters.components import base_modules, components, join, missing_parts
from lora_ortho.adapters.shapes import Shape, shape_of

from .errors import AdapterFileError
from .renamed import Renamings

# What diffusers' pipelines call the models that adapters are made for; a pipeline that is given has
# its own names besides.
PARTS = [
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "controlnet",
    "connectors",
    "prior",
    "text_conditioner",
    "transformer_ref",
]


@dataclass(frozen=True)
class Target:
    """A layer that a file names.

    Attributes:
        name: qualified in the model that was given, else as in the file.
        shape: of the model's layer; None where no model was given.
    """

    name: str
    shape: Shape | None


class Targets:
    """Finds layers by the names that files use.

    Args:
        model: a module, a diffusers pipeline, or None to take names as they are.
        part: which part of a file or pipeline ("unet", ...) to take; None for all.
    Raises:
        TypeError, ValueError: model or part is not one.
    """

    def __init__(self, model: object, part: str | None) -> None:
        parts = None if model is None else components(model)
        choices = PARTS if parts is None or "" in parts else list(parts)
        if part is not None and part not in choices:
            known = ", ".join(choices)
            raise ValueError(f"part must be None or one of {known}, got {part!r}")
        self.part = part
        self.model = model
        self._parts = parts
        self._names: dict[str, dict[str, Any]] = {}
        self._flat: dict[str, dict[str, list[str]]] = {}
        self._renamings: dict[str, Renamings] = {}
        self.known_parts = frozenset([*PARTS, *choices, *missing_parts(model)])

    @property
    def is_pipeline(self) -> bool:
        """True if the model is one of several parts."""
        return self._parts is not None and "" not in self._parts

    def wanted(self, file: Path, parts: Iterable[str]) -> frozenset[str]:
        """Which parts of a file to read, of those that it has.

        Raises:
            AdapterFileError: none, or several where the model is a single module.
        """
        found = frozenset(parts)
        if self.part is not None:
            if found and self.part not in found:
                problem = f"has no part {self.part!r}, but {_list(found)}"
                if self.is_pipeline:
                    problem += (
                        f"; to load one of them there, give the module: load_adapter(path, "
                        f"pipe.{self.part}, part={max(found)!r}), or load it with diffusers and "
                        f"attach"
                    )
                raise AdapterFileError(file, problem)
            return frozenset([self.part])
        if self._parts is not None and not self.is_pipeline and len(found) > 1:
            problem = f"is for {_list(found)}: give the pipeline as model, or choose with part="
            raise AdapterFileError(file, problem)
        return found

    def root(self, part: str) -> nn.Module | None:
        """The module of a part; for a single module itself."""
        if self._parts is None:
            return None
        return self._parts.get(part if self.is_pipeline else "")

    def by_name(self, file: Path, key: str, part: str, name: str) -> Target:
        """The layer of that name in a part ("" for files that name none)."""
        if self._parts is None:
            return Target(name if self.part is not None else join(part, name), None)
        modules = self._modules(file, key, part)
        for candidate in _spellings(name):
            if candidate in modules:
                return self._target(file, key, part, candidate, modules[candidate])
        newer, fused = self._renamed(part, name)
        if fused:
            problem = f"the model holds {name!r} fused with others, as {newer!r}"
            raise AdapterFileError(file, problem, key)
        if newer in modules:
            return self._target(file, key, part, newer, modules[newer])
        raise AdapterFileError(file, f"the model has no layer {name!r}", key)

    def _renamed(self, part: str, name: str) -> tuple[str, bool]:
        """What transformers calls a layer today, and whether it is fused with others."""
        if part not in self._renamings:
            root = self.root(part)
            assert root is not None  # or there would be no modules to look in
            self._renamings[part] = Renamings(root)
        return self._renamings[part].of(name)

    def by_flat_name(self, file: Path, key: str, part: str, flat: str) -> Target | None:
        """The layer whose name with "_" for "." is that; None where there is no such layer.

        Raises:
            AdapterFileError: two layers have that name, or there is no model to look in.
        """
        if self._parts is None:
            problem = "kohya's names can be read through the model only: give it as model"
            raise AdapterFileError(file, problem, key)
        modules = self._modules(file, key, part)
        if part not in self._flat:
            table = self._flat[part] = {}
            for name, module in modules.items():
                if shape_of(module) is not None:
                    table.setdefault(name.replace(".", "_"), []).append(name)
        for candidate in _spellings(flat, "_"):
            found = self._flat[part].get(candidate, [])
            if len(found) > 1:
                raise AdapterFileError(file, f"could be {' or '.join(found)} of the model", key)
            if found:
                return self._target(file, key, part, found[0], modules[found[0]])
        return None

    def _modules(self, file: Path, key: str, part: str) -> Mapping[str, Any]:
        root = self.root(part)
        if root is None:
            problem = f"names no part of the pipeline, which has {_list(self._parts or ())}"
            if part in missing_parts(self.model):
                problem += f" and {part!r} as None"
            problem += "; load one part with part=, or load it with diffusers and attach"
            raise AdapterFileError(file, problem, key)
        if part not in self._names:
            self._names[part] = dict(base_modules(root))
        return self._names[part]

    def _target(self, file: Path, key: str, part: str, name: str, module: Any) -> Target:
        shape = shape_of(module)
        if shape is None:
            kind = type(module).__name__
            problem = f"the model's layer {name!r} ({kind}) is not a linear layer or convolution"
            raise AdapterFileError(file, problem, key)
        return Target(join(part, name) if self.is_pipeline else name, shape)


def _spellings(name: str, dot: str = ".") -> tuple[str, ...]:
    """A name, and the same with or without the level that transformers 5 took out of CLIP."""
    level = f"text_model{dot}"
    return name, name.removeprefix(level) if name.startswith(level) else level + name


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(name or "a model without a name" for name in names))


def check_fit(
    file: Path, key: str, target: Target, lora_A: tuple[int, ...], lora_B: tuple[int, ...]
) -> tuple[int, ...]:
    """The kernel of a layer, empty for a linear one; AdapterFileError unless factors of these
    shapes belong on it.

    lora_A is (r, d_in) or (r, c_in, *kernel); a kernel of ones may be there or not.
    """
    found = Shape(lora_A[1], lora_B[0], lora_A[2:])
    if target.shape is None:
        return found.kernel
    if not target.shape.takes(found):
        problem = f"takes {found}, the model's layer {target.name!r} takes {target.shape}"
        raise AdapterFileError(file, problem, key)
    return target.shape.kernel
