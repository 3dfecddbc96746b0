"""A drop-in for nn.Linear that adds several LoRA adapters under disjoint random masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_ortho import backends
from lora_ortho.functional import merge
from lora_ortho.mask_stream import check_seed
from lora_ortho.ops import all_plain
from lora_ortho.packing import PackedAdapters
from lora_ortho.problem import Place, Rule, check_factors, check_pair, finite_numbers


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
            has it: mask and gain act on the bias too.
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
    does. An adapter's bias is served exactly, by one more rank on an input feature that is always
    one. The attributes ``method``, ``seed``, ``stream``, ``sample`` and ``backend`` may be set at
    any time. Factors are packed once, and again after a change or a move.

    Args:
        base: an ``nn.Linear``, or any module with ``in_features`` and ``out_features`` (or the
            ``Conv1D`` of transformers), called as it is. x is cast to the dtype of its output for
            the adapters.
        adapters: 1 to 255 adapters that fit the base.
        method: "orthogonal", "dropout" or "direct".
        seed: None takes a fresh seed from torch's generator of the input's device at every
            forward; an int freezes the masks.
        stream: which layer, in [0, 2**32): layers with equal seeds need different streams.
        trainable: factors become parameters instead of buffers.
        backend: None for the best that serves a call, or a name that must serve it.
    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """

    sample: int = 0

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
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = _sizes(base)
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
        backends.check_name(backend)
        if seed is not None:
            check_seed(seed)
        Place(stream).check(0, self.out_features)
        self.base = base
        self.adapters = nn.ModuleList(_Factors(adapter, trainable) for adapter in adapters)
        self.seed, self.stream, self.backend = seed, stream, backend
        self.trainable = trainable
        self._ranks = ranks
        self._names = [adapter.name for adapter in adapters]
        self._biased = [adapter.bias is not None for adapter in adapters]
        count = len(adapters)
        self._has_bias = any(self._biased)
        self._weights = finite_numbers("weights", [a.weight for a in adapters], count)
        self._scaling = [adapter.scaling for adapter in adapters]
        self._p = [1.0 - 1.0 / count if a.p is None else float(a.p) for a in adapters]
        self._prepared: PackedAdapters | None = None
        self._checked: tuple[int | None, Place] | None = None
        self.method = method

    @property
    def method(self) -> str:
        """How adapters are mixed: "orthogonal", "dropout" or "direct"."""
        return self._rule.method

    @method.setter
    def method(self, method: str) -> None:
        self._rule = Rule.make(len(self._p), self._p, self._scaling, method)
        self._prepared = None

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that looks at a linear's dtype or device."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias  # type: ignore[return-value]

    @property
    def weights(self) -> list[float]:
        """The K merge weights; assign a sequence to change them."""
        return list(self._weights)

    @weights.setter
    def weights(self, weights: Sequence[float]) -> None:
        self._weights = finite_numbers("weights", weights, len(self._p))
        self._prepared = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in the dtype that base gives."""
        base: Any = self._modules["base"]
        return self.add(x, base(x), in_place=is_fresh(base))

    def add(self, x: Tensor, y: Tensor, *, in_place: bool = False) -> Tensor:
        """The adapters' share for x, added to what some base gave for it.

        Args:
            x: (..., in_features).
            y: (..., out_features).
            in_place: y belongs to nobody else and may be written over.
        """
        place = self._place()
        tensors = self._tensors()
        if self._is_simple(x, y, tensors):
            return self._apply_prepared(x, y, tensors, place, in_place)
        x = x.to(y.dtype)
        if self._has_bias:
            x = _with_one(x)
        lora_A, lora_B = self._factors(tensors)
        seed = self._draw_seed(x)
        return merge(self._rule, x, lora_A, lora_B, self._weights, y, seed, place, self.backend)

    def _place(self) -> Place:
        place = Place(self.stream, self.sample)
        if self._checked != (self.seed, place):
            place.check(0, self.out_features)
            if self.seed is not None:
                check_seed(self.seed)
            self._checked = (self.seed, place)
        return place

    def _draw_seed(self, x: Tensor) -> int | Tensor:
        if self.seed is not None:
            return self.seed
        return torch.randint(-(1 << 63), (1 << 63) - 1, (), dtype=torch.int64, device=x.device)

    def _tensors(self) -> list[Tensor]:
        """All lora_A, all lora_B, then the biases there are; as they are at this moment."""
        adapters: Any = self._modules["adapters"]  # an attribute of a module costs 1 us
        stores = [
            module._parameters if self.trainable else module._buffers
            for module in adapters._modules.values()
        ]
        found = [store["lora_A"] for store in stores]
        found += [store["lora_B"] for store in stores]
        if self._has_bias:
            found += [store["bias"] for store in stores if store["bias"] is not None]
        return found

    def _factors(self, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """lora_A and lora_B, grown by the constant feature where an adapter has a bias."""
        count = len(self._p)
        lora_A, lora_B, biases = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        if not biases:
            return lora_A, lora_B
        lora_A = [nn.functional.pad(A, (0, 1)) for A in lora_A]
        left = iter(biases)
        for j, biased in enumerate(self._biased):
            if biased:
                one = torch.zeros_like(lora_A[j][:1])
                one[:, -1] = 1
                lora_A[j] = torch.cat([lora_A[j], one])
                lora_B[j] = torch.cat([lora_B[j], next(left)[:, None]], dim=1)
        return lora_A, lora_B

    def _is_simple(self, x: Tensor, y: Tensor, tensors: list[Tensor]) -> bool:
        """True if the kernels can be called directly: no gradient, no cast, nothing watching."""
        return (
            all_plain((x, y))
            and x.dtype is y.dtype
            and not (
                torch.is_grad_enabled()
                and (x.requires_grad or y.requires_grad or any(t.requires_grad for t in tensors))
            )
        )

    def _apply_prepared(
        self, x: Tensor, y: Tensor, tensors: list[Tensor], place: Place, in_place: bool
    ) -> Tensor:
        prepared = self._prepared
        if (
            prepared is None
            or prepared.problem.dtype is not y.dtype
            or prepared.requested != self.backend
            or not prepared.holds(tensors)
        ):
            lora_A, lora_B = self._factors(tensors)
            prepared = self._prepared = PackedAdapters(
                lora_A, lora_B, y.dtype, rule=self._rule, weights=self._weights,
                backend=self.backend, sources=tensors,
            )  # fmt: skip
        if self._has_bias:
            x = _with_one(x)
        seed = self._draw_seed(x)
        own = in_place and y.is_contiguous()
        if y.dim() == 2:
            return prepared.apply(x, y, seed, place, y if own else None)
        flat = y.reshape(-1, self.out_features)
        x = x.reshape(-1, x.shape[-1])
        return prepared.apply(x, flat, seed, place, flat if own else None).view(y.shape)

    def extra_repr(self) -> str:
        """Sizes and settings, and the adapters' names where they have any."""
        ranks = ", ".join(str(rank) for rank in self._ranks)
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"ranks=({ranks}), method={self.method!r}, seed={self.seed}, stream={self.stream}"
        )
        names = [name for name in self._names if name is not None]
        return text + (f", names=({', '.join(names)})" if names else "")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}


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


def _with_one(x: Tensor) -> Tensor:
    """x with one more feature, which is 1."""
    return nn.functional.pad(x, (0, 1), value=1.0)


def is_fresh(base: nn.Module | None) -> bool:
    """True if the output of base belongs to nobody else, so that it may be written over."""
    return (
        type(base) is nn.Linear
        and not base._forward_hooks
        and "forward" not in base.__dict__
        and not nn.modules.module._global_forward_hooks
    )
