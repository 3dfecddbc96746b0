"""Which adapted layers the forward passes of a model reach."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lora_ortho.adapters.components import Named, base_modules, containers, is_compiled, join

from .parents import uncalled


class Mark:
    """Whether a layer with adapters was called since they were put there."""

    __slots__ = ("reached",)

    def __init__(self) -> None:
        self.reached = False


def may_write() -> bool:
    """False where torch.compile may be inside a checkpoint, from which nothing can be written.

    What is written unread is no guard of the compiled function.
    """
    return not torch.compiler.is_compiling() or not torch.is_grad_enabled()


class FirstPass:
    """Notes that a forward pass of a model has ended, and then takes its hooks out."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.ended = False
        # A PeftModel calls its model's `forward`, others call the model itself: whichever ends.
        self._hooks = [module.register_forward_hook(self) for module in containers(root)]

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if may_write():
            self.ended = True
        if not torch.compiler.is_compiling():
            self.remove()

    def remove(self) -> None:
        """Takes the hooks out; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class Passes:
    """The first passes of the parts of a model, and the marks of its layers.

    Args:
        parts: of `components`.
        layers: each layer's part, module and mark, by qualified name.
    """

    def __init__(
        self, parts: Mapping[str, nn.Module], layers: Mapping[str, tuple[nn.Module, Mark]]
    ) -> None:
        self._layers, self._removed = dict(layers), False
        used = {name.partition(".")[0] for name in layers}
        self._first = {
            part: FirstPass(root) for part, root in parts.items() if part == "" or part in used
        }

    def remove(self) -> None:
        """Takes out what is left of hooks; nothing is watched any more."""
        self._removed = True
        for first in self._first.values():
            first.remove()

    def idle(self) -> dict[str, str]:
        """Layers that their parent calls no more, by name, and why: it was changed since."""
        if self._removed:
            return {}
        modules = [
            Named(join(part, name), 0, module)
            for part, first in self._first.items()
            for name, module in base_modules(first.root)
        ]
        reasons = uncalled(modules)
        return {n: reasons[id(m)] for n, (m, _) in self._layers.items() if id(m) in reasons}

    def unreached(self) -> frozenset[str]:
        """The layers that no forward pass reached though one has ended.

        Marks may be missing inside of what torch.compile runs: there a layer counts only if another
        one of the same compiled module was reached.
        """
        found: set[str] = set()
        above = {}
        for part, first in self._first.items():
            if first.ended:
                above.update(_compiled_above(first.root))
                found |= {n for n in self._layers if part in ("", n.partition(".")[0])}
        running = {above.get(id(layer), 0) for layer, mark in self._layers.values() if mark.reached}
        return frozenset(
            name
            for name in found
            for layer, mark in [self._layers[name]]
            if not mark.reached and above.get(id(layer), 0) in {0, *running}
        )


def _compiled_above(root: nn.Module) -> dict[int, int]:
    """Which compiled module each module lies in (0 for none), both by identity."""
    found: dict[int, int] = {}
    waiting = [(root, 0)]
    while waiting:
        module, above = waiting.pop()
        above = above or (id(module) if is_compiled(module) else 0)
        if id(module) not in found:
            found[id(module)] = above
            waiting += [(child, above) for child in module._modules.values() if child is not None]
    return found


def remove_hooks(modules: Iterable[nn.Module], kinds: tuple[type, ...]) -> None:
    """Takes forward hooks of these kinds out of a model, or out of a copy of one."""
    for module in modules:
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            owners = {n: getattr(hook, "__self__", hook) for n, hook in hooks.items()}
            for number in [n for n, owner in owners.items() if isinstance(owner, kinds)]:
                del hooks[number]
