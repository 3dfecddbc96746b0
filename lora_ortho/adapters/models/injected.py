"""Layers of a plain model that add adapters to what they give, under another forward."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_ortho.adapters.components import ADAPTERS
from lora_ortho.mixing import Choice, Settings, Traced
from lora_ortho.module import Adapter, FusedOrthoLoRALinear
from lora_ortho.problem import DTYPES, check_method, finite_numbers

from .convolution import Sizes, convolve, selectors
from .in_place import InPlace, enter, leave, own_forward, plain_view
from .passes import Mark, may_write


class LayerAdapters(FusedOrthoLoRALinear):
    """The adapters of one layer of a model, held by the layer beside its own weights.

    The factors are buffers that no state_dict has, so the model saves and loads what it would
    without them, and they move with it. Settings are those of `FusedOrthoLoRALinear`; calling it
    calls the layer.

    Args:
        name: of the layer, for messages.
        layer: an ``nn.Linear``, or any module with ``in_features`` and ``out_features``.
        adapters, settings: as for `FusedOrthoLoRALinear`.
    """

    _unscaled: tuple[Settings, Traced] | None = None  # those without scales, while there are any

    def __init__(self, name: str, layer: Any, adapters: Sequence[Adapter], **settings: Any) -> None:
        sizes = Sizes(adapters[0].lora_A.shape[1], adapters[0].lora_B.shape[0])
        super().__init__(sizes, adapters, **settings)
        for factors in self.adapters:
            for key, tensor in list(factors._buffers.items()):
                if tensor is not None:
                    factors.register_buffer(key, tensor, persistent=False)
        self.name, self.mark = name, Mark()
        # Not registered: the layer holds this module, not the other way round.
        self.__dict__["_layer"], self._plain = layer, type(layer)
        self._scales: dict[int, float] = {}  # other than 1, by the number of the model called so
        self._owned = type(layer) is nn.Linear  # its output belongs to nobody else

    @property
    def layer(self) -> Any:
        """The layer of the model."""
        return self.__dict__["_layer"]

    @property
    def base(self) -> nn.Module:  # type: ignore[override]
        """The layer without its adapters: another object with the same parameters."""
        return plain_view(self.layer, self._plain)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer gives: (..., in_features) to (..., out_features)."""
        return cast(Tensor, self.layer(x))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves the factors as the model moves, but to no dtype of storage alone, as float8."""

        def moved(tensor: Tensor) -> Tensor:
            found: Tensor = fn(tensor)
            return found if found.dtype in DTYPES else tensor.to(found.device)

        super()._apply(moved, recurse)
        if self._unscaled is not None:
            self._unscaled = self._unscaled[0], self._for_tracing(self._unscaled[0])
        return self

    def scale_by(self, scale: float, model: int) -> None:
        """Multiplies all weights while a call of a model has this scale; 1 ends that.

        What is set meanwhile stays, and is multiplied too.

        Args:
            model: the number of the model that is called, among those around the layer.
        """
        if self._scales.get(model, 1.0) == scale:
            return
        scales = {number: other for number, other in self._scales.items() if number != model}
        if scale != 1.0:
            scales[model] = scale
        weights = self._scaled(scales)
        if self._unscaled is not None:
            self._settings, self._traced = self._unscaled
        self._scales, self._unscaled = scales, None
        self._scale_to(weights)

    def _scaled(self, scales: dict[int, float]) -> tuple[float, ...]:
        """The present weights times the scales; ValueError unless they are finite."""
        factor = prod(scales.values())
        weights = [factor * weight for weight in self.weights]
        return tuple(finite_numbers("weights", weights, len(weights)))

    def _scale_to(self, weights: tuple[float, ...]) -> None:
        if self._scales:
            self._unscaled = self._settings, self._traced
            mix = self._choice._replace(weights=weights).mix()
            self._settings = self._settings._replace(mix=mix)
            self._traced = self._for_tracing(self._settings)

    def _for_tracing(self, settings: Settings) -> Traced:
        return Traced(settings, self._tensors()[0].device)

    def planned(self, **changes: Any) -> tuple[Choice, Settings]:
        """See `FusedOrthoLoRALinear`; without the scale of a call that is made now."""
        if "method" in changes:
            check_method(changes["method"])
        choice, settings = super().planned(**changes)
        return choice, settings if self._unscaled is None else settings._replace(mix=choice.mix())

    def adopt(self, plan: tuple[Choice, Settings]) -> None:
        """See `FusedOrthoLoRALinear`; the scale of a call that is made now counts besides."""
        super().adopt(plan)
        if self._unscaled is not None:
            self._scale_to(self._scaled(self._scales))

    def put(self) -> None:
        """Makes the layer one that adds these adapters."""
        self.layer._modules[ADAPTERS] = self
        enter(self.layer, Injected)

    def take(self) -> None:
        """Gives the layer its own forward back."""
        if of(self.layer) is self:
            del self.layer._modules[ADAPTERS]
            leave(self.layer, Injected, self._plain)

    def merged(self, layer: Any, x: Tensor, y: Tensor) -> Tensor:
        """The adapters' share for x, added to what the layer itself gave."""
        if x.shape[-1] != self.in_features or y.shape[-1] != self.out_features:
            self._refuse(x.shape[-1], y.shape[-1])
        return self.add(x, y, in_place=self._owned)

    def _refuse(self, features: int, out_features: int) -> None:
        raise ValueError(
            f"layer {self.name} takes {features} features to {out_features} now, its adapters "
            f"{self.in_features} to {self.out_features}; detach them"
        )


class ConvolutionAdapters(LayerAdapters):
    """The same for an ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` without groups.

    The shrink step is a convolution by all lora_A at once; draw and expand are those of the linear
    layer, with the places (n, h, w) of the output for tokens and its channels for features.

    Args:
        adapters: lora_A (r, c_in · kernel elements) and lora_B (c_out, r).
        The others as for `LayerAdapters`.
    """

    def merged(self, layer: Any, x: Tensor, y: Tensor) -> Tensor:
        """(N, c_in, ...) and (N, c_out, ...) to (N, c_out, ...), in the layout of y."""
        kernel = torch.cat(super()._tensors()[: len(self._ranks)]).to(y.dtype)
        channel = y.dim() - layer.weight.dim() + 1
        if kernel.shape[1] != layer.weight[0].numel() or y.shape[channel] != self.out_features:
            self._refuse(layer.weight[0].numel(), y.shape[channel])
        s = convolve(layer, x.to(y.dtype), kernel.view(-1, *layer.weight.shape[1:]))
        result = self.add(s.movedim(channel, -1), y.movedim(channel, -1)).movedim(-1, channel)
        return result.contiguous() if y.is_contiguous() else result

    def _tensors(self) -> list[Tensor]:
        found = super()._tensors()
        device = found[0].device
        return [*selectors(self._ranks, torch.float32, device), *found[len(self._ranks) :]]


class Injected(InPlace):
    """Comes before the class of a layer; its adapters are its child `_lora_ortho`."""

    @property
    def base(self: Any) -> nn.Module:
        """The layer without its adapters, where it has no child of that name of its own."""
        own = self._modules.get("base")
        return of(self).base if own is None else own  # type: ignore[union-attr]

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer's own class gives, and the adapters' share."""
        adapters = of(self)
        if adapters is None:
            return own_forward(self, Injected)(x, *args, **kwargs)  # type: ignore[no-any-return]
        if may_write():
            adapters.mark.reached = True
        return adapters.merged(self, x, super().forward(x, *args, **kwargs))  # type: ignore[misc]


def of(layer: nn.Module) -> LayerAdapters | None:
    """The injected adapters of a layer, or None."""
    children = layer._modules  # of TorchScript's own kind in its modules, without get()
    return cast("LayerAdapters", children[ADAPTERS]) if ADAPTERS in children else None
