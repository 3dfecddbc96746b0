"""The layers of a plain model where adapters can be added, and why not at others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_ortho.adapters.components import Named
from lora_ortho.adapters.loaded import LoadedAdapter
from lora_ortho.adapters.shapes import Shape, shape_of
from lora_ortho.module import FusedOrthoLoRALinear

from .in_place import replaced_forward
from .injected import of
from .parents import uncalled


@dataclass(frozen=True)
class Site:
    """A layer that adapters name.

    Attributes:
        name, stream, module: as of `Named`.
        shape: what it takes and gives; no features where it is no layer of a kind that fits.
        device: where its weights are while it is called.
        reason: why adapters cannot be added; "" where they can.
    """

    name: str
    stream: int
    module: Any
    shape: Shape
    device: torch.device
    reason: str = ""

    def problem(self, adapter: str) -> str:
        """The reason as a sentence."""
        if self.shape.features == 0:
            return f"adapter {adapter!r} adapts {self.name}, {self.reason}"
        return f"layer {self.name} is {self.reason}"


class Sites:
    """Finds the layers of a model that adapters name.

    Args:
        modules: every module of the model, from `named`.
    Raises:
        ValueError: the model has injected or fused layers already.
    """

    def __init__(self, modules: Sequence[Named]) -> None:
        self._modules = {entry.name: entry for entry in modules}
        self._names: dict[int, list[str]] = {}
        for entry in modules:
            self._names.setdefault(id(entry.module), []).append(entry.name)
            if of(entry.module) is not None or isinstance(entry.module, FusedOrthoLoRALinear):
                raise ValueError(
                    f"model: {entry.name} is adapted already; detach it first, with the handle's "
                    f"detach() or lora_ortho.detach(model)"
                )
        self._uncalled = uncalled(modules)

    def by_layer(self, adapters: Sequence[LoadedAdapter]) -> dict[str, dict[int, str]]:
        """The adapted layers in name order; of each the adapters, by index, and their name for it.

        A layer that the model has under several names goes by the first.

        Raises:
            ValueError: an adapter names one layer twice, or one that the model does not have.
        """
        found: dict[str, dict[int, str]] = {}
        for j, adapter in enumerate(adapters):
            for name in adapter.layers:
                entry = self._modules.get(name)
                if entry is None:
                    raise ValueError(
                        f"adapter {adapter.name!r} adapts {name}, which the model does not have"
                    )
                parts = found.setdefault(self._names[id(entry.module)][0], {})
                if j in parts:
                    raise ValueError(
                        f"layer {parts[j]} is shared: it is also {name}, and adapter "
                        f"{adapter.name!r} adapts both"
                    )
                parts[j] = name
        return dict(sorted(found.items()))

    def find(self, name: str) -> Site:
        """The layer of that name."""
        entry = self._modules[name]
        shape, reason = shape_of(entry.module), self._why_not(entry)
        device = torch.device("cpu") if reason else self._device(entry)
        return Site(
            entry.name, entry.stream, entry.module, shape or Shape(0, 0), device, reason or ""
        )

    def _why_not(self, entry: Named) -> str | None:
        """Why the layer's forward cannot be changed, or its adapters would not do what they say."""
        layer, kind = entry.module, type(entry.module).__name__
        if hasattr(layer, "get_base_layer"):
            return f"PEFT's layer already ({kind}); use attach for such models"
        if shape_of(layer) is None:
            return f"a {kind}; it must be a linear layer or a convolution without groups"
        if id(layer) in self._uncalled:
            return self._uncalled[id(layer)]
        if isinstance(layer, torch.jit.ScriptModule):
            return "compiled by TorchScript; inject first"
        if replaced_forward(layer):
            return "called by another forward, put on the layer itself; inject first"
        places = {self._place(name) for name in self._names[id(layer)]}
        if len(places) > 1:
            others = ", ".join(self._names[id(layer)][1:])
            return (
                f"shared: it is also {others}, and an adapter belongs to one place; put a copy of "
                f"the layer there"
            )
        return None

    def _place(self, name: str) -> tuple[int, str]:
        """Which module holds a layer, and as what."""
        above, _, child = name.rpartition(".")
        parent = self._modules.get(above)
        return (0 if parent is None else id(parent.module)), child

    def _device(self, entry: Named) -> torch.device:
        """Where a layer's weights are, or will be when it is called.

        Raises:
            ValueError: nowhere.
        """
        tensors = [*entry.module.parameters(recurse=False), *entry.module.buffers(recurse=False)]
        weight = getattr(entry.module, "weight", None)
        tensors = [weight] if isinstance(weight, torch.Tensor) else tensors
        device = tensors[0].device if tensors else torch.device("cpu")
        if device.type != "meta":
            return device
        name = entry.name
        while name in self._modules:  # accelerate's hook is on the layer, or on what it is part of
            hook = _executing(self._modules[name].module)
            if hook is not None:
                return hook
            if not name:
                break
            name = name.rpartition(".")[0]
        raise ValueError(f"layer {entry.name} is on the meta device; load its weights first")


def _executing(module: nn.Module) -> torch.device | None:
    """The device to which a hook of accelerate brings the weights of a module."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None
