"""Factors packed once: a cache for the ops, and a prepared merge for repeated calls."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_ortho import backends
from lora_ortho.problem import Place, Problem, Rule, check_factors, finite_numbers

_PROBLEMS_PER_LAYER = 4
_ORIGIN = Place()


class Stamp:
    """Tells whether tensors are still the same objects with the same values.

    Keeps an alias of each, which shares its version counter and holds on to its memory: so the
    memory cannot pass to another tensor while a stamp still knows it.
    """

    __slots__ = ("_marks",)

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._marks = [(weakref.ref(t), t.detach(), t._version) for t in tensors]

    def matches(self, tensors: Sequence[Tensor]) -> bool:
        """True if these are the stamped tensors, in their order and unchanged."""
        if len(tensors) != len(self._marks):
            return False
        for tensor, (ref, alias, version) in zip(tensors, self._marks, strict=True):
            if ref() is not tensor or tensor._version != version or not tensor.is_set_to(alias):
                return False
        return True


class _Layer:
    """What is packed for one first lora_B, for as long as that tensor lives."""

    def __init__(self, owner: Tensor, key: int) -> None:
        self.owner = weakref.ref(owner, lambda _: _layers.pop(key, None))
        self.packed: dict[tuple[str, Problem], tuple[Stamp, Any]] = {}


_layers: dict[int, _Layer] = {}


def packed(
    backend: str, problem: Problem, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor]
) -> Any:
    """Factors in a backend's layout; packed again only after a factor changed.

    The packed form lives as long as the tensor ``lora_B[0]``. Inference tensors do not count their
    changes, so what contains one is packed at every call.
    """
    tensors = (*lora_A, *lora_B)
    pack = backends.get(backend).pack
    if any(tensor.is_inference() for tensor in tensors):
        return pack(problem, lora_A, lora_B)
    owner, key = lora_B[0], (backend, problem)
    layer = _layers.get(id(owner))
    if layer is None or layer.owner() is not owner:
        layer = _layers[id(owner)] = _Layer(owner, id(owner))
    stamp, found = layer.packed.get(key, (None, None))
    if stamp is None or not stamp.matches(tensors):
        stamp, found = Stamp(tensors), pack(problem, lora_A, lora_B)
        while len(layer.packed) >= _PROBLEMS_PER_LAYER:
            layer.packed.pop(next(iter(layer.packed)))
        layer.packed[key] = (stamp, found)
    return found


def gain_dtype(device: str) -> torch.dtype:
    """The dtype in which gains travel to a device."""
    return torch.float64 if device == "cpu" else torch.float32


class PackedAdapters:
    """Adapters of one layer made ready for repeated calls without gradients.

    Everything that does not depend on the call is checked, chosen and packed here once: the
    shortest way from Python to the kernels. Factors that change afterwards are not noticed unless
    :meth:`holds` is asked.

    Args:
        lora_A, lora_B: K tensors each, (r_j, d_in) and (d_out, r_j).
        dtype: of x, base and output.
        rule: thresholds and constant gains; None for the defaults of the orthogonal method.
        weights: K merge weights; None for ones.
        backend: None for the best that can serve them, or a name.
        sources: the tensors that :meth:`holds` compares; None is all lora_A, then all lora_B.
    """

    def __init__(
        self,
        lora_A: Sequence[Tensor],
        lora_B: Sequence[Tensor],
        dtype: torch.dtype,
        *,
        rule: Rule | None = None,
        weights: Sequence[float] | None = None,
        backend: str | None = None,
        sources: Sequence[Tensor] | None = None,
    ) -> None:
        ranks = check_factors(lora_A, lora_B)
        rule = rule or Rule.make(len(ranks), None, None, "orthogonal")
        device = lora_A[0].device
        d_out, d_in = lora_B[0].shape[0], lora_A[0].shape[1]
        self.problem = Problem(rule.method, rule.thresholds, d_in, d_out, ranks, dtype, device.type)
        self.requested = backend
        self.backend = backends.choose(backend, self.problem)
        numbers = finite_numbers("weights", weights, len(ranks))
        self.gains = torch.tensor(
            [w * g for w, g in zip(numbers, rule.gains, strict=True)],
            dtype=gain_dtype(device.type),
            device=device,
        )
        self._device = device
        self._forward = backends.get(self.backend).forward
        self._stamp = Stamp((*lora_A, *lora_B) if sources is None else sources)
        self._packed = backends.get(self.backend).pack(self.problem, lora_A, lora_B)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """True if these are the sources of what was packed, unchanged since."""
        return self._stamp.matches(tensors)

    def apply(
        self,
        x: Tensor,
        base: Tensor | None,
        seed: int | Tensor,
        place: Place = _ORIGIN,
        out: Tensor | None = None,
    ) -> Tensor:
        """base + Σ_j gain_j · m_j ⊙ (B_j A_j x), without recording gradients.

        Args:
            x: (tokens, d_in) in the dtype and on the device that were prepared, any strides.
            base: (tokens, d_out), or None for zeros.
            seed: int in the signed 64-bit range, or an int64 tensor of one element.
            place: coordinates in the mask stream; not checked again.
            out: contiguous (tokens, d_out) to write into, which may be ``base``.
        Returns:
            (tokens, d_out) in the dtype of x; ``out`` itself where it was given.
        Raises:
            ValueError: a shape, dtype or device other than what was prepared.
        """
        problem = self.problem
        rows = x.shape[0] if x.dim() == 2 else -1
        self._check("x", x, (rows, problem.d_in))
        if base is not None:
            self._check("base", base, (rows, problem.d_out))
        if out is not None and out is not base:
            self._check("out", out, (rows, problem.d_out))
        y: Tensor = self._forward(self._packed, x, base, self.gains, seed, place, out)[0]
        return y

    def _check(self, name: str, tensor: Tensor, shape: tuple[int, int]) -> None:
        if (
            tensor.shape != shape
            or tensor.dtype is not self.problem.dtype
            or tensor.device != self._device
        ):
            raise ValueError(
                f"{name} must have shape (tokens, {shape[1]}), {self.problem.dtype}, on "
                f"{self._device}; got {tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}"
            )
