"""Layers that get another forward where they stand: their class becomes a subclass of its own.

Whoever holds such a layer, under whatever wrapper, holds it still; its parameters, hooks and
methods stay, and so does what isinstance says of it.
"""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import Any

from torch import nn

from lora_ortho.adapters.components import ADAPTERS


class InPlace:
    """Comes before a layer's own class.

    A bound `forward` of it may outlive the change (a hook or a compiled function kept it), so each
    call asks whether there is something to add, and `own_forward` is what is called if not.
    """

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        bases = type(self).__bases__
        if InPlace not in bases[0].__bases__:  # a class that somebody derived
            return super().__reduce_ex__(protocol)
        return _revive, bases, self.__dict__


def own_forward(layer: nn.Module, mixin: type) -> Any:
    """The forward of the layer's own class, whether it has the mixin (still) or not."""
    if isinstance(layer, mixin):
        return super(mixin, layer).forward  # type: ignore[arg-type]
    return MethodType(type(layer).forward, layer)


def enter(layer: nn.Module, mixin: type) -> None:
    """Gives the layer a subclass of its class, with the mixin's forward."""
    plain: type = type(layer)
    if not isinstance(layer, mixin):  # else it is left of an earlier time, under another class
        layer.__class__ = _joined(mixin, plain)
    _rebind(layer, plain)


def leave(layer: nn.Module, mixin: type, plain: type) -> None:
    """Gives the layer its own class back; a class that somebody derived meanwhile stays."""
    before: type = type(layer)
    if before.__bases__ == (mixin, plain):
        layer.__class__ = plain
    _rebind(layer, before)


def plain_view(layer: nn.Module, plain: type) -> nn.Module:
    """Another object of the layer's own class, with the same parameters and hooks."""
    view: nn.Module = object.__new__(plain)
    view.__dict__.update(layer.__dict__)
    view.__dict__["_modules"] = {n: m for n, m in layer._modules.items() if n != ADAPTERS}
    for name in ("forward", "_old_forward"):
        view.__dict__.pop(name, None)
    return view


def replaced_forward(layer: nn.Module) -> bool:
    """True if calls would not reach another forward of the class, or not for certain.

    Somebody put a forward on the layer itself, other than the hooks of accelerate and diffusers,
    of which it is known where they keep the one that they call.
    """
    forward, *kept = (holder.get(key) for holder, key in _places(layer))
    if forward is None or _is_own(layer, forward, type(layer)):
        return False
    return not any(_is_own(layer, one, type(layer)) for one in kept)


def _places(layer: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where a bound forward may lie: on the layer itself, which comes first, or kept by a hook."""
    places = [(layer.__dict__, "forward"), (layer.__dict__, "_old_forward")]  # accelerate's
    for reference in getattr(layer.__dict__.get("_diffusers_hook"), "_fn_refs", ()):
        places += [(vars(reference), "forward"), (vars(reference), "original_forward")]
    return places


def _rebind(layer: nn.Module, before: type) -> None:
    """Bound methods that lie somewhere follow a change of the layer's class."""
    for holder, key in _places(layer):
        if _is_own(layer, holder.get(key), before):
            holder[key] = MethodType(type(layer).forward, layer)


def _is_own(layer: nn.Module, forward: Any, kind: type) -> bool:
    """True for a bound method of that layer and class."""
    bound = isinstance(forward, MethodType) and forward.__self__ is layer
    return bound and forward.__func__ is kind.forward  # type: ignore[attr-defined]


@cache
def _joined(mixin: type, plain: type) -> type:
    return type(plain.__name__, (mixin, plain), {"__module__": mixin.__module__})


def _revive(mixin: type, plain: type) -> Any:
    return object.__new__(_joined(mixin, plain))
