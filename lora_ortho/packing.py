"""When factors are packed: in every call that trains them, else once and again after a change."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_ortho import backends
from lora_ortho.backends import cpu
from lora_ortho.backends.base import Backend
from lora_ortho.gains import gain_dtype
from lora_ortho.problem import Place, Problem, Rule, check_factors, finite_numbers

_PROBLEMS_PER_PLACE = 4
_ORIGIN = Place()


class Stamp:
    """Tells whether tensors are still the same objects, on the same memory, with the same values.

    Version counters do not show what is written through ``.data``, by torch's fused optimisers or
    by an all-gather: on the CPU some elements of each tensor are compared too. Holds on to no
    tensor and to no memory, and makes no weak reference to a tensor (``swap_tensors`` refuses
    those). Never matches where there is an inference tensor, which does not count its changes.
    """

    __slots__ = ("_marks", "_sampler", "_samples")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._marks: list[tuple[Any, ...]] | None = None
        self._sampler: Any = None
        if any(tensor.is_inference() for tensor in tensors):
            return
        if all(tensor.is_cpu for tensor in tensors):
            self._sampler = cpu.sampler(tensors)
            if self._sampler is None:
                return
            self._samples = self._sampler.hash()
        self._marks = [
            (id(t), t._version, t.data_ptr(), t.shape, t.stride(), weakref.ref(t.untyped_storage()))
            for t in tensors
        ]

    def matches(self, tensors: Sequence[Tensor]) -> bool:
        """True if these are the stamped tensors, in their order and, as far as seen, unchanged."""
        if self._marks is None or len(tensors) != len(self._marks):
            return False
        for t, (name, version, address, shape, strides, storage) in zip(
            tensors, self._marks, strict=True
        ):
            if (
                id(t) != name
                or t.data_ptr() != address
                or storage() is None  # another tensor has taken its place
                or t._version != version
                or t.shape != shape
                or t.stride() != strides
            ):
                return False
        return self._sampler is None or self._sampler.hash() == self._samples


# By storage of the first lora_B, for as long as it lives: by address in it, by problem. A stamp of
# None matches nothing.
_Places = dict[int, dict[tuple[Backend[Any], Problem], tuple[Stamp | None, Any]]]
_storages: dict[int, tuple[weakref.ref[Any], _Places]] = {}


def packed(
    backend: Backend[Any],
    problem: Problem,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    *,
    trained: bool,
) -> Any:
    """Factors in a backend's layout.

    Args:
        trained: gradients of a factor are recorded: they are packed anew, and nothing is kept.
    """
    if trained:
        _expire(lora_B[0])
    if trained or not backend.copies:
        return backend.pack(problem, lora_A, lora_B)
    tensors, storage = (*lora_A, *lora_B), lora_B[0].untyped_storage()
    key = id(storage)
    entry = _storages.get(key)
    if entry is None:
        owner = weakref.ref(storage, lambda _: _storages.pop(key, None))
        entry = _storages[key] = (owner, {})
    place = entry[1].setdefault(lora_B[0].data_ptr(), {})
    stamp, found = place.get((backend, problem), (None, None))
    if stamp is None or not stamp.matches(tensors):
        stamp, found = Stamp(tensors), backend.pack(problem, lora_A, lora_B, found)
        while len(place) >= _PROBLEMS_PER_PLACE and (backend, problem) not in place:
            place.pop(next(iter(place)))
        place[backend, problem] = (stamp, found)
    return found


def _expire(first_B: Tensor) -> None:
    """What is kept by this lora_B is about to be old. On a GPU its memory stays, for it is written
    again: captured graphs read it."""
    key = id(first_B.untyped_storage())
    if first_B.is_cpu:
        _storages.pop(key, None)
        return
    for place in _storages.get(key, (None, {}))[1].values():
        for problem, (_, found) in list(place.items()):
            place[problem] = (None, found)


def refresh(lora_A: Sequence[Tensor], lora_B: Sequence[Tensor]) -> None:
    """Packs again what is kept for these factors, after a change that nothing shows."""
    _, places = _storages.get(id(lora_B[0].untyped_storage()), (None, {}))
    kept = places.get(lora_B[0].data_ptr(), {})
    for (backend, problem), (_, found) in list(kept.items()):
        if problem.ranks == tuple(A.shape[0] for A in lora_A):
            fresh = backend.pack(problem, lora_A, lora_B, found)
            kept[backend, problem] = (Stamp((*lora_A, *lora_B)), fresh)


class PackedAdapters:
    """Adapters of one layer made ready for repeated calls without gradients.

    Everything that does not depend on the call is checked, chosen and packed here once: the
    shortest way from Python to the kernels. Factors that change afterwards are not noticed unless
    :meth:`holds` is asked.

    Args:
        lora_A, lora_B: K tensors each, (r_j, d_in) and (d_out, r_j).
        dtype: of x, base and output.
        rule: draw, intervals and gains; None for the defaults of the orthogonal method.
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
        self.problem = Problem(rule.draw, rule.intervals, d_in, d_out, ranks, dtype, device.type)
        self.requested = backend
        self.backend = backends.choose(backend, self.problem)
        rule = rule.weighted(finite_numbers("weights", weights, len(ranks)))
        self.gains = torch.tensor(rule.gains, dtype=gain_dtype(device.type), device=device)
        self._device = device
        self._forward = backends.get(self.backend).forward
        self._kept: tuple[Stamp | None, Any] = (None, None)
        self.pack(lora_A, lora_B, sources)

    def pack(
        self,
        lora_A: Sequence[Tensor],
        lora_B: Sequence[Tensor],
        sources: Sequence[Tensor] | None = None,
    ) -> None:
        """Packs these factors, of the shapes and on the device that were prepared.

        On a GPU the memory of the last pack is written again, where captured graphs read it.
        """
        stamp = Stamp((*lora_A, *lora_B) if sources is None else sources)
        pack = backends.get(self.backend).pack
        # Together: another thread must not meet the new stamp with the old pack.
        self._kept = (stamp, pack(self.problem, lora_A, lora_B, self.packed))

    def fits(self, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor]) -> bool:
        """True if these factors have the sizes and the device that were prepared."""
        problem = self.problem
        if lora_A[0].device != self._device or check_factors(lora_A, lora_B) != problem.ranks:
            return False
        return (lora_A[0].shape[1], lora_B[0].shape[0]) == (problem.d_in, problem.d_out)

    def expire(self) -> None:
        """What was packed is old from here on, whatever can be seen of it."""
        self._kept = (None, self.packed)

    @property
    def packed(self) -> Any:
        """The factors in the backend's layout."""
        return self._kept[1]

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """True if these are the sources of what was packed, unchanged since."""
        stamp = self._kept[0]
        return stamp is not None and stamp.matches(tensors)

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
        y: Tensor = self._forward(self.packed, x, base, self.gains, seed, place, out)[0]
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
