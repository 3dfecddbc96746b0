"""The scale that diffusers' models take at a call, for adapters that PEFT does not hold.

A model that calls `scale_lora_layers` finds PEFT's layers only. Hooks around its forward do the
same to injected ones: `cross_attention_kwargs={"scale": 0.5}` counts for one call.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .injected import LayerAdapters

_SCALES = "scale_lora_layers"  # the function of diffusers that such a forward calls
_ARGUMENTS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


def argument_of(model: nn.Module) -> str | None:
    """The argument of a model's forward that may hold a scale of adapters; None without."""
    forward = type(model).forward
    code = getattr(forward, "__code__", None)
    if code is None or _SCALES not in code.co_names:
        return None
    known = inspect.signature(forward).parameters
    return next((name for name in _ARGUMENTS if name in known), None)


class ScaleHook:
    """Scales the adapters inside one model by what its call says, and back afterwards.

    torch calls no hook at the end of a call that Ctrl-C or another ``BaseException`` interrupts;
    what such a call leaves, the next one puts right.

    Args:
        model: whose `argument` may hold a "scale".
        number: of the model, among those around the adapters.
        adapters: those inside of it.
        deaf: a layer elsewhere that diffusers would scale too, but does not say so; such a call is
            refused. None where there is none.
    """

    def __init__(
        self,
        model: nn.Module,
        number: int,
        argument: str,
        adapters: Sequence[LayerAdapters],
        deaf: str | None,
    ) -> None:
        self._number, self._argument = number, argument
        self._adapters, self._deaf = list(adapters), deaf
        self._hooks = [
            model.register_forward_pre_hook(self._scale, with_kwargs=True),
            model.register_forward_hook(self._reset, always_call=True),
        ]

    def _scale(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs.get(self._argument)
        scale = 1.0 if given is None else given.get("scale", 1.0)
        if scale != 1.0 and self._deaf is not None:
            raise ValueError(
                f"{self._argument}: a scale of {scale} does not reach the adapters of "
                f"{self._deaf}, which diffusers would scale too; set weights on the handle, or "
                f"attach to PEFT's layers"
            )
        for adapters in self._adapters:
            adapters.scale_by(scale, self._number)

    def _reset(self, model: nn.Module, args: Any, output: Any) -> None:
        for adapters in self._adapters:
            adapters.scale_by(1.0, self._number)

    def remove(self) -> None:
        """Takes the hooks out; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def scale_hooks(
    parts: Mapping[str, nn.Module], adapters: Mapping[str, LayerAdapters]
) -> list[ScaleHook]:
    """Hooks for every model among the parts whose calls may say a scale.

    Args:
        parts: of `components`.
        adapters: the injected ones, by qualified name of their layer.
    """
    models = {
        id(module): module
        for root in parts.values()
        for module in root.modules()
        if argument_of(module) is not None
    }
    held = {id(one): name for name, one in adapters.items()}
    inside = {
        key: {held[id(child)] for child in model.modules() if id(child) in held}
        for key, model in models.items()
    }
    reached = frozenset().union(*inside.values())
    deaf = [name for name in adapters if name.startswith("text_encoder") and name not in reached]
    return [
        ScaleHook(
            model,
            number,
            str(argument_of(model)),
            [adapters[name] for name in sorted(inside[key])],
            deaf[0] if deaf and "" not in parts else None,
        )
        for number, (key, model) in enumerate(models.items())
        if inside[key] or (deaf and "" not in parts)
    ]
