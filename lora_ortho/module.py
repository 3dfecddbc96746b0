"""A drop-in for nn.Linear that adds several LoRA adapters under disjoint random masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_ortho._torch_internals import child, has_forward_hooks, own_tensors
from lora_ortho.mixing import Choice, Mix, Mixer, Settings, Traced, checked_rates
from lora_ortho.problem import Place, check_factors, check_pair, finite_numbers


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter of one layer.

    Attributes:
        lora_A: (r, d_in), floating point.
        lora_B: (d_out, r), floating point.
        scaling: alpha/r, or alpha/sqrt(r) for rsLoRA.
        weight: merge weight.
        p: dropout rate in [0, 1); None is 1 - 1/K among K adapters.
        bias: (d_out,) or None. The adapter's output is then B A x + bias, as PEFT's ``lora_bias``
            defines it: mask and gain act on the bias too.
        name: for display.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float = 1.0
    weight: float = 1.0
    p: float | None = None
    bias: Tensor | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        check_pair(self.lora_A, self.lora_B, "lora_A", "lora_B")
        if self.bias is None:
            return
        if not isinstance(self.bias, Tensor):
            raise TypeError(f"bias must be a tensor or None, got {type(self.bias).__name__}")
        if self.bias.shape != self.lora_B.shape[:1]:
            wanted = tuple(self.lora_B.shape[:1])
            raise ValueError(f"bias must have shape {wanted}, got {tuple(self.bias.shape)}")
        if not self.bias.dtype.is_floating_point:
            raise TypeError(f"bias must be floating point, got {self.bias.dtype}")
        if self.bias.device != self.lora_B.device:
            raise ValueError(
                f"bias must be on the device of lora_B, {self.lora_B.device}, "
                f"got {self.bias.device}"
            )


class _Factors(nn.Module):
    """The tensors of one adapter, as parameters or as buffers."""

    def __init__(self, adapter: Adapter, trainable: bool) -> None:
        super().__init__()
        for name in ("lora_A", "lora_B", "bias"):
            tensor: Tensor | None = getattr(adapter, name)
            if tensor is not None and tensor.is_inference():
                with torch.inference_mode(False):  # a copy that counts its changes
                    tensor = tensor.clone()
            if not trainable:
                self.register_buffer(name, None if tensor is None else tensor.detach())
            elif isinstance(tensor, nn.Parameter) or tensor is None:
                self.register_parameter(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor.detach()))


class FusedOrthoLoRALinear(nn.Module):
    """``base(x) + Σ_j gain_j · m_j ⊙ (B_j A_j x + bias_j)``, see ``fused_ortho_lora``.

    Masks are Monte Carlo draws of the merge, so ``eval()`` does not switch them off; ``method``
    does. An adapter's bias is computed exactly, as one more rank on an input feature that is always
    one. The attributes ``method``, ``p``, ``weights``, ``seed``, ``stream``, ``sample``,
    ``strata``, ``backend`` and ``keep_zero_weights`` may be set at any time; a pass that runs again
    (checkpointing) uses the values of its first run.

    Frozen factors are packed once, and again after a change or a move; trained ones in every call.
    Changes that no check notices (one element written through ``.data``, frozen factors on a GPU
    written without a version counter moving) need :meth:`refresh`.

    Args:
        base: an ``nn.Linear``, or any module with ``in_features`` and ``out_features`` (or
            transformers' ``Conv1D``), called as it is. For the adapters, x is cast to the dtype of
            its output.
        adapters: 1 to 255 adapters that fit the base.
        method: "orthogonal", "dropout" or "direct".
        seed: None draws a new seed at every forward, from torch's generator for the input's
            device; an int freezes the masks.
        stream: which layer, in [0, 2**32): layers with equal seeds need different streams.
        trainable: factors become parameters instead of buffers.
        backend: None for the best one that can serve the call, or the name of one that must.
        keep_zero_weights: adapters of weight 0 keep their share of the elements and count in K.
            Otherwise they are off, as if they had not been given.
    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """

    def __init__(
        self,
        base: nn.Module,
        adapters: Sequence[Adapter],
        *,
        method: str = "orthogonal",
        seed: int | None = None,
        stream: int = 0,
        trainable: bool = False,
        backend: str | None = None,
        keep_zero_weights: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = _sizes(base)
        if isinstance(adapters, Adapter) or not isinstance(adapters, Iterable):
            kind = type(adapters).__name__
            raise TypeError(f"adapters must be a list of Adapter, got {kind}")
        adapters = list(adapters)
        for j, adapter in enumerate(adapters):
            if not isinstance(adapter, Adapter):
                raise TypeError(f"adapters[{j}] must be an Adapter, got {type(adapter).__name__}")
        if not adapters:
            raise ValueError("adapters must hold at least one Adapter, got none")
        ranks = check_factors([a.lora_A for a in adapters], [a.lora_B for a in adapters])
        sizes = adapters[0].lora_A.shape[1], adapters[0].lora_B.shape[0]
        if sizes != (self.in_features, self.out_features):
            raise ValueError(
                f"adapters must take {self.in_features} features to {self.out_features} as base "
                f"does, got {sizes[0]} to {sizes[1]}"
            )
        self.base = base
        self.adapters = nn.ModuleList(_Factors(adapter, trainable) for adapter in adapters)
        self.trainable = trainable
        self._ranks = ranks
        self._names = [adapter.name for adapter in adapters]
        self._mixer = Mixer([adapter.bias is not None for adapter in adapters])
        count = len(adapters)
        self._choice = Choice(
            method,
            tuple(adapter.p for adapter in adapters),
            tuple(finite_numbers("scaling", [a.scaling for a in adapters], count)),
            tuple(finite_numbers("weights", [a.weight for a in adapters], count)),
            keep_zero_weights,
        )
        self._settings = Settings(self._choice.mix(), None, Place(), None)
        self.adopt(self.planned(seed=seed, stream=stream, backend=backend))

    @property
    def method(self) -> str:
        """How the adapters are merged: "orthogonal", "dropout" or "direct"."""
        return self._choice.method

    @method.setter
    def method(self, method: str) -> None:
        self.adopt(self.planned(method=method))

    @property
    def p(self) -> list[float | None]:
        """The K dropout rates; None is 1 - 1/K among the adapters whose weight is not 0. Assign a
        sequence, or None for all of them."""
        return list(self._choice.p)

    @p.setter
    def p(self, p: Sequence[float | None] | None) -> None:
        self.adopt(self.planned(p=p))

    @property
    def weights(self) -> list[float]:
        """The K merge weights; assign a sequence to change them. An adapter of weight 0 is off: it
        owns no element and does not count in K, unless ``keep_zero_weights``."""
        return list(self._choice.weights)

    @weights.setter
    def weights(self, weights: Sequence[float]) -> None:
        self.adopt(self.planned(weights=weights))

    @property
    def keep_zero_weights(self) -> bool:
        """Whether adapters of weight 0 keep their share of the elements."""
        return self._choice.keep_zero_weights

    @keep_zero_weights.setter
    def keep_zero_weights(self, keep: bool) -> None:
        self.adopt(self.planned(keep_zero_weights=bool(keep)))

    @property
    def seed(self) -> int | None:
        """None for a new seed at every forward, or an int that freezes the masks."""
        return self._settings.seed

    @seed.setter
    def seed(self, seed: int | None) -> None:
        self.adopt(self.planned(seed=seed))

    @property
    def stream(self) -> int:
        """Which layer, in [0, 2**32)."""
        return self._settings.place.stream

    @stream.setter
    def stream(self, stream: int) -> None:
        self.adopt(self.planned(stream=stream))

    @property
    def sample(self) -> int:
        """Which Monte Carlo draw, in [0, 2**24)."""
        return self._settings.place.sample

    @sample.setter
    def sample(self, sample: int) -> None:
        self.adopt(self.planned(sample=sample))

    @property
    def strata(self) -> int:
        """How many samples in a row share the elements out among the adapters in proportion, in
        [1, 65536]; see ``fused_ortho_lora``. The samples of a block need the same seed."""
        return self._settings.place.strata

    @strata.setter
    def strata(self, strata: int) -> None:
        self.adopt(self.planned(strata=strata))

    @property
    def backend(self) -> str | None:
        """None for the best one that can serve the call, or the name of one that must."""
        return self._settings.backend

    @backend.setter
    def backend(self, backend: str | None) -> None:
        self.adopt(self.planned(backend=backend))

    @property
    def mix(self) -> Mix:
        """What follows from method, rates and weights: who takes part, at which rates and gains."""
        return self._settings.mix

    def planned(self, **changes: Any) -> tuple[Choice, Settings]:
        """What :meth:`adopt` would take, with nothing changed yet.

        Args:
            changes: method, p, weights, keep_zero_weights, seed, stream, sample, strata,
                backend; all of them together, so that what fits together need not fit one by one.
        Raises:
            TypeError, ValueError: by the name of what does not fit.
        """
        chosen: dict[str, Any] = {}
        count, settings = len(self._ranks), self._settings
        for name, value in changes.items():
            if name == "p":
                chosen[name] = checked_rates(value, count)
            elif name == "weights":
                chosen[name] = tuple(finite_numbers("weights", value, count))
            elif name in Choice._fields:
                chosen[name] = value
            elif name in Place._fields:
                settings = settings._replace(place=settings.place._replace(**{name: value}))
            else:
                settings = settings._replace(**{name: value})
        choice = self._choice._replace(**chosen) if chosen else self._choice
        mix = choice.mix() if chosen else settings.mix
        return choice, settings._replace(mix=mix).checked(self.out_features)

    def adopt(self, plan: tuple[Choice, Settings]) -> None:
        """Takes what :meth:`planned` gave. Settings that a pass used are never written over."""
        self._choice, self._settings = plan
        self._traced = Traced(self._settings, self._tensors()[0].device)

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that looks at a linear's dtype or device."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in the dtype that base gives."""
        base = child(self, "base")
        return self.add(x, base(x), in_place=is_fresh(base))

    def add(self, x: Tensor, y: Tensor, *, in_place: bool = False) -> Tensor:
        """The adapters' output for x, added to that of some base.

        Args:
            x: (..., in_features).
            y: (..., out_features).
            in_place: nothing else uses y, which may be overwritten.
        """
        if torch.compiler.is_compiling():
            return self._mixer.add_traced(x, y, self._tensors(), self._traced)
        return self._mixer.add(x, y, self._tensors(), self._settings, in_place)

    def refresh(self) -> None:
        """Packs the factors again, after a change that no check notices: a few elements written
        through ``.data``; on a GPU, frozen factors written without a version counter moving."""
        self._mixer.refresh(self._tensors(), self._settings)

    def _tensors(self) -> list[Tensor]:
        """All lora_A, all lora_B, then the biases there are; as they are at this moment."""
        stores = own_tensors(child(self, "adapters"), self.trainable)
        found = [store["lora_A"] for store in stores]
        found += [store["lora_B"] for store in stores]
        if any(self._mixer.biased):
            found += [store["bias"] for store in stores if store["bias"] is not None]
        return found

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves and casts; what torch.compile reads moves along."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._traced = Traced(self._settings, self._tensors()[0].device)
        return self

    def extra_repr(self) -> str:
        """Sizes and settings, and the adapters' names where they have any."""
        ranks = ", ".join(str(rank) for rank in self._ranks)
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"ranks=({ranks}), method={self.method!r}, seed={self.seed}, stream={self.stream}"
        )
        names = [name for name in self._names if name is not None]
        return text + (f", names=({', '.join(names)})" if names else "")


def _sizes(base: nn.Module) -> tuple[int, int]:
    if not isinstance(base, nn.Module):
        raise TypeError(f"base must be a module, got {type(base).__name__}")
    sizes = linear_sizes(base)
    for name, size in zip(("in_features", "out_features"), sizes, strict=True):
        if size is None:
            kind = type(base).__name__
            raise TypeError(f"base must have an integer {name}, got {kind} without")
    return sizes  # type: ignore[return-value]


def linear_sizes(module: object) -> tuple[int | None, int | None]:
    """Features in and out of a linear layer, also of the Conv1D of transformers; None without."""
    names = ("nx", "nf") if type(module).__name__ == "Conv1D" else ("in_features", "out_features")
    first, second = (getattr(module, name, None) for name in names)
    return first if isinstance(first, int) else None, second if isinstance(second, int) else None


def is_fresh(base: nn.Module | None) -> bool:
    """True if the output of base belongs to nobody else, so that it may be written over."""
    return (
        type(base) is nn.Linear and "forward" not in base.__dict__ and not has_forward_hooks(base)
    )
