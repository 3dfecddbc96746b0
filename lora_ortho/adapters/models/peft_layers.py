"""PEFT's LoRA layers with another forward: their active adapters merged under masks.

A layer keeps its modules, parameters and methods. Its class becomes a subclass of its own that
overrides `forward` alone, so everything that PEFT knows of it stays true.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_ortho.adapters.components import ADAPTERS
from lora_ortho.mixing import Choice, Mixer, Settings, Traced
from lora_ortho.module import is_fresh
from lora_ortho.problem import DTYPES, Place

from .convolution import selectors, why_not_dilated
from .in_place import InPlace, enter, leave, own_forward, replaced_forward
from .passes import Mark, may_write

# PEFT's classes by name: those of quantised layers exist only where their package is installed.
_LINEAR = """
    Linear Linear8bitLt Linear4bit GPTQLoraLinear AwqLoraLinear EetqLoraLinear HqqLoraLinear
    AqlmLoraLinear TorchaoLoraLinear IncLoraLinear
"""
LINEAR = frozenset(_LINEAR.split())
CONVOLUTIONS = frozenset(["Conv1d", "Conv2d", "Conv3d"])
REFUSED_LAYERS = {
    "Embedding": "adapters of embeddings pick rows instead of multiplying",
    "MultiheadAttention": "attention reads the weights of its layers instead of calling them",
    "ParamWrapper": "adapters of bare parameters (target_parameters) have no linear layer",
    "LoraParallelLinear": "Megatron's parallel layers return more than an output",
    "TeLinear": "TransformerEngine's layers may return more than an output",
}


@dataclass
class Shared:
    """What the layers of one attachment share.

    Attributes:
        order: adapters in merge order; others that become active follow in PEFT's order.
        p: dropout rates by adapter; None gives 1 - 1/K on a layer where K take part.
        weights: merge weights by adapter; 1 where there is none, and for None.
        method, seed, sample, strata, backend, keep_zero_weights: as for `FusedOrthoLoRALinear`.
    """

    order: tuple[str, ...]
    p: dict[str, float] | None
    weights: dict[str, float] | None
    method: str
    seed: int | None
    sample: int
    strata: int
    backend: str | None
    keep_zero_weights: bool

    def names(self, layer: Any) -> tuple[str, ...]:
        """The layer's active adapters, in merge order."""
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        first = [name for name in self.order if name in active]
        return tuple(dict.fromkeys([*first, *active]))

    def choice(self, names: Sequence[str], scaling: Sequence[float]) -> Choice:
        """How these adapters are mixed; ValueError names one for which no rate was given."""
        p: tuple[float | None, ...] = (None,) * len(names)
        if self.p is not None:
            for name in names:
                if name not in self.p:
                    raise ValueError(
                        f"p holds no rate for adapter {name!r}, which became active after attach; "
                        f"it has rates for {', '.join(self.p)}"
                    )
            p = tuple(self.p[name] for name in names)
        weights = tuple((self.weights or {}).get(name, 1.0) for name in names)
        return Choice(self.method, p, tuple(scaling), weights, self.keep_zero_weights)


@dataclass(eq=False)
class LayerMerge:
    """What an attached layer knows besides PEFT's own attributes.

    Attributes:
        plain_class: the layer's class before.
        name, stream: of the layer in the model.
        shared: of the whole attachment.
    """

    plain_class: type
    name: str
    stream: int
    shared: Shared
    mark: Mark = field(default_factory=Mark, repr=False)
    _mixer: Mixer = field(default_factory=lambda: Mixer(()), repr=False)
    _settings: tuple[Choice, Settings] | None = field(default=None, repr=False)
    _traced: tuple[tuple[str, ...], Traced] | None = field(default=None, repr=False)
    _convolution: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._convolution = _kind(self.plain_class) in CONVOLUTIONS

    def add(self, layer: Any, x: Tensor, y: Tensor, names: tuple[str, ...]) -> Tensor:
        """The adapters' share for x, added to the base's y; layouts as the base has them."""
        for name in names:
            if name in layer.lora_variant:
                kind = type(layer.lora_variant[name]).__name__
                raise ValueError(f"layer {self.name}: adapter {name!r} is a variant ({kind})")
        B = [layer.lora_B[name].weight for name in names]
        biases = [layer.lora_B[name].bias for name in names]
        drops = layer.training and any(_drops(layer.lora_dropout[name]) for name in names)
        hooked = _hooked(layer, names)
        if self._convolution or drops or hooked:
            if hooked:  # weights may be there, or in their shape, only while a module is called
                B, biases = _called(layer, names, y)
            return self._add_spread(layer, x, y, names, B, biases)
        A = [layer.lora_A[name].weight for name in names]
        return self._mixed(layer, names, x, y, A, B, biases, in_place=is_fresh(layer.base_layer))

    def prepare(self, layer: Any, names: tuple[str, ...]) -> None:
        """Makes ready what the next call needs, so that a compiled one finds it."""
        self._traced = None
        if names:
            self._have_mixer([layer.lora_B[name].bias for name in names])
            settings = self._now(layer, names, [1.0] * len(names))
            device = layer.lora_B[names[0]].weight.device
            device = torch.device("cpu") if device.type == "meta" else device  # offloaded
            self._traced = (names, Traced(settings, device))

    def refresh(self, layer: Any) -> None:
        """Packs the factors again, after a change that nothing shows."""
        names = self.shared.names(layer)
        if names and not _hooked(layer, names):  # what modules are called for is packed each time
            A, B = ([part[n].weight for n in names] for part in (layer.lora_A, layer.lora_B))
            biases = [layer.lora_B[name].bias for name in names]
            if self._convolution:
                B = [weight.flatten(1) for weight in B]
                A = list(selectors(tuple(b.shape[1] for b in B), B[0].dtype, B[0].device))
            scaling = [float(layer.scaling[name]) for name in names]
            settings = self._now(layer, names, scaling)
            self._mixer.refresh(_joined(A, B, biases), settings)

    def _add_spread(
        self,
        layer: Any,
        x: Tensor,
        y: Tensor,
        names: tuple[str, ...],
        B: list[Tensor],
        biases: list[Tensor | None],
    ) -> Tensor:
        """The shrink step by PEFT's modules, adapter by adapter; then draw and expand as ever.

        The masks are those of the tokens, for a convolution of its places (n, h, w), by channel.
        """
        channel = y.dim() - B[0].dim() + 1
        s = [layer.lora_dropout[n](x.to(_dtype_of(layer.lora_A[n], y))) for n in names]
        s = [layer.lora_A[n](part).to(y.dtype) for n, part in zip(names, s, strict=True)]
        joined = torch.cat(s, dim=channel).movedim(channel, -1)  # (..., Σ r)
        flat = [weight.flatten(1) for weight in B]
        ranks = tuple(weight.shape[1] for weight in flat)
        A = selectors(ranks, y.dtype, y.device)
        y_last = y.movedim(channel, -1)
        result = self._mixed(layer, names, joined, y_last, A, flat, biases).movedim(-1, channel)
        return result.contiguous() if y.is_contiguous() else result

    def _mixed(
        self,
        layer: Any,
        names: tuple[str, ...],
        x: Tensor,
        y: Tensor,
        A: Sequence[Tensor],
        B: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        *,
        in_place: bool = False,
    ) -> Tensor:
        self._have_mixer(biases)
        tensors = _joined(A, B, biases)
        if torch.compiler.is_compiling():
            return self._mixed_traced(layer, names, x, y, tensors)
        scaling = [float(layer.scaling[name]) for name in names]  # may change between calls
        settings = self._now(layer, names, scaling)
        return self._mixer.add(x, y, tensors, settings, in_place)

    def _have_mixer(self, biases: Sequence[Tensor | None]) -> None:
        biased = tuple(bias is not None for bias in biases)
        if biased != self._mixer.biased:
            self._mixer = Mixer(biased)

    def _mixed_traced(
        self, layer: Any, names: tuple[str, ...], x: Tensor, y: Tensor, tensors: list[Tensor]
    ) -> Tensor:
        """For torch.compile. Scalings may be tensors, as PEFT has them in a model that is ready for
        hot swaps; as floats they become dynamic when one changes."""
        traced = self._traced[1] if self._traced is not None and self._traced[0] == names else None
        if traced is None:
            traced = Traced(self._now(layer, names, [1.0] * len(names)), x.device)
        kept = [layer.scaling[names[j]] for j in traced.members]
        scaling = torch.stack([_scalar(value, traced.gains) for value in kept]) if kept else None
        return self._mixer.add_traced(x, y, tensors, traced, scaling)

    def _now(self, layer: Any, names: tuple[str, ...], scaling: Sequence[float]) -> Settings:
        """The settings of a call that is made now."""
        shared = self.shared
        choice = shared.choice(names, scaling)
        known = self._settings
        if known is not None and known[0] == choice:
            mix = known[1].mix
        else:
            try:
                mix = choice.mix()
            except ValueError as error:
                raise ValueError(f"layer {self.name}: {error}") from error
        place = Place(self.stream, shared.sample, shared.strata)
        settings = Settings(mix, shared.seed, place, shared.backend)
        self._settings = (choice, settings)
        return settings

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mixer": Mixer(self._mixer.biased), "_settings": None}


def _joined(
    A: Sequence[Tensor], B: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """The tensors of a layer as a `Mixer` takes them."""
    return [*A, *B, *(bias for bias in biases if bias is not None)]


def _scalar(value: Any, like: Tensor) -> Tensor:
    """A number, or a tensor of one element, as a tensor beside another."""
    if isinstance(value, Tensor):
        return value.reshape(()).to(like.device, like.dtype)
    return torch.full((), value, dtype=like.dtype, device=like.device)


class Attached(InPlace):
    """Comes before PEFT's class; `layer._lora_ortho` is a `LayerMerge`."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's, but active adapters are merged by the method of the attachment."""
        merge: LayerMerge | None = self.__dict__.get(ADAPTERS)
        if merge is None:
            return own_forward(self, Attached)(x, *args, **kwargs)  # type: ignore[no-any-return]
        if may_write():
            merge.mark.reached = True
        names = () if self.disable_adapters or self.merged else merge.shared.names(self)
        if not names:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError(
                "adapter_names picks one adapter for each sample, and attached layers merge the "
                "active ones; detach first"
            )
        kwargs.pop("alora_offsets", None)  # for a variant that is refused
        return merge.add(self, x, self.base_layer(x, *args, **kwargs), names)


def put(layer: nn.Module, merge: LayerMerge) -> None:
    """Makes a layer an attached one."""
    layer.__dict__[ADAPTERS] = merge
    enter(layer, Attached)


def take(layer: nn.Module) -> None:
    """Gives an attached layer its own forward back."""
    merge = of(layer)
    if merge is not None:
        del layer.__dict__[ADAPTERS]
        leave(layer, Attached, merge.plain_class)


def of(layer: nn.Module) -> LayerMerge | None:
    """The attachment of a layer, or None."""
    found: LayerMerge | None = layer.__dict__.get(ADAPTERS)
    return found


def is_convolution(layer: nn.Module) -> bool:
    """True for PEFT's layers of a convolution."""
    kind: type = type(layer)
    return _kind(kind) in CONVOLUTIONS


def _kind(kind: type) -> str:
    """The name of PEFT's class, also of one that was derived from it without another forward."""
    for base in kind.__mro__:
        if base.__name__ in LINEAR | CONVOLUTIONS | REFUSED_LAYERS.keys():
            return base.__name__
        if "forward" in base.__dict__:
            break
    return kind.__name__


def why_not(layer: Any, names: Sequence[str]) -> str | None:
    """Why these adapters of a layer cannot be merged at run time; None where they can."""
    kind = _kind(type(layer))
    if not hasattr(layer, "lora_A"):
        return f"a {kind} layer of another method than LoRA"
    if kind not in LINEAR | CONVOLUTIONS:
        return f"a {kind} layer: {REFUSED_LAYERS.get(kind, 'not known to this package')}"
    if layer.merged:
        return f"merged into the base weights ({', '.join(layer.merged_adapters)}); unmerge first"
    for name in names:
        variant = layer.lora_variant.get(name)
        if variant is not None:
            return f"adapter {name!r} is a variant of LoRA ({type(variant).__name__})"
    if is_convolution(layer) and layer.base_layer.groups > 1:
        return "a convolution with groups"
    dilated = why_not_dilated(layer.base_layer) if is_convolution(layer) else None
    if dilated is not None:
        return dilated
    if replaced_forward(layer):
        return "a hook replaced the forward of PEFT's layer"
    return None


def _hooked(layer: Any, names: Sequence[str]) -> bool:
    """True if something is done at a call of the adapters' own layers."""
    return any(
        "forward" in module.__dict__ or module._forward_pre_hooks or module._forward_hooks
        for part in (layer.lora_A, layer.lora_B)
        for module in (part[name] for name in names)
    )


def _called(
    layer: Any, names: Sequence[str], y: Tensor
) -> tuple[list[Tensor], list[Tensor | None]]:
    """lora_B and its bias of each adapter, by calls of the module: as its hooks have it."""
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    for name in names:
        module = layer.lora_B[name]
        rank, tail = module.weight.shape[1], module.weight.shape[2:]
        units = torch.eye(rank + 1, rank, dtype=_dtype_of(module, y), device=y.device)
        columns = module(units.view(rank + 1, rank, *tail)).flatten(1)  # (r + 1, d_out)
        biases.append(None if module.bias is None else columns[rank])
        weight = (columns[:rank] - columns[rank]).t()
        weights.append(weight.view(*weight.shape, *tail))
    return weights, biases


def _dtype_of(module: Any, y: Tensor) -> torch.dtype:
    """In which dtype a module computes; that of y where its weights are only stored in theirs."""
    dtype: torch.dtype = module.weight.dtype
    return dtype if dtype in DTYPES else y.dtype


def _drops(dropout: nn.Module) -> bool:
    return float(getattr(dropout, "p", 0.0)) > 0.0
