"""The torch.library ops ``lora_ortho::forward`` and ``lora_ortho::backward``.

The only thing between autograd and the backends. Arguments were checked at the public boundary.
Shapes: x (tokens, d_in); lora_A[j] (r_j, d_in); lora_B[j] (d_out, r_j); base, y, grad
(tokens, d_out); s (tokens, Σ r); gains (K,); seed one int64. See ``backends.reference``.

``coordinates`` is int64 (4,) on the CPU, stream, sample, row_offset and col_offset in place of the
ints of those names: what a module keeps in a tensor, torch.compile does not guard on. ``trained``
says that gradients of factors are recorded: they are packed in the call (``packing.packed``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_ortho import backends
from lora_ortho._torch_internals import settled
from lora_ortho.packing import packed
from lora_ortho.problem import Place, Problem
from lora_ortho.reference import wide_dtype

_CALL = (
    "Tensor? coordinates, int[] thresholds, str method, SymInt stream, SymInt sample, "
    "SymInt row_offset, SymInt col_offset, str backend, bool trained"
)

torch.library.define(
    "lora_ortho::forward",
    "(Tensor x, Tensor[] lora_A, Tensor[] lora_B, Tensor? base, Tensor gains, Tensor seed, "
    f"{_CALL}) -> (Tensor y, Tensor s)",
)
torch.library.define(
    "lora_ortho::backward",
    "(Tensor grad, Tensor x, Tensor s, Tensor[] lora_A, Tensor[] lora_B, Tensor gains, "
    f"Tensor seed, {_CALL}, bool need_x, bool need_A, bool need_B, bool need_gains)"
    " -> (Tensor dx, Tensor dA, Tensor dB, Tensor dgains)",
)


class Call(NamedTuple):
    """The constants of a call, in the order in which the ops take them after ``coordinates``."""

    thresholds: tuple[int, ...]
    method: str
    stream: int
    sample: int
    row_offset: int
    col_offset: int
    backend: str
    trained: bool

    def place(self, coordinates: Tensor | None) -> Place:
        """Where the call stands in the mask stream."""
        if coordinates is not None:
            return Place(*coordinates.tolist())
        return Place(self.stream, self.sample, self.row_offset, self.col_offset)

    def pack(self, x: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor]) -> Any:
        """The factors in the layout of the call's backend."""
        ranks, d_out = tuple(A.shape[0] for A in lora_A), lora_B[0].shape[0]
        problem = Problem(
            self.method, tuple(self.thresholds), x.shape[1], d_out, ranks, x.dtype, x.device.type
        )
        return packed(self.backend, problem, lora_A, lora_B, trained=self.trained)


class Kept:
    """What the forward pass of a call packed, for its backward pass."""

    __slots__ = ("packed",)

    def __init__(self) -> None:
        self.packed: Any = None


def _factor_dtype(x: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor]) -> torch.dtype:
    """That of dA and dB: the factors' own where they share one, else the accumulators'."""
    first = lora_A[0].dtype
    same = all(factor.dtype is first for factor in (*lora_A, *lora_B))
    return first if same else wide_dtype(x.dtype)


def _forward(
    x: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    base: Tensor | None,
    gains: Tensor,
    seed: Tensor,
    coordinates: Tensor | None,
    *constants: Any,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor]:
    call = Call(*constants)
    factors = call.pack(x, lora_A, lora_B)
    if kept is not None:
        kept.packed = factors
    found: tuple[Tensor, Tensor] = backends.get(call.backend).forward(
        factors, x, base, gains.contiguous(), seed, call.place(coordinates)
    )
    return found


def _backward(
    grad: Tensor,
    x: Tensor,
    s: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    gains: Tensor,
    seed: Tensor,
    coordinates: Tensor | None,
    *rest: Any,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call, needs = Call(*rest[:-4]), rest[-4:]
    kept = kept or Kept()
    factors = kept.packed if kept.packed is not None else call.pack(x, lora_A, lora_B)
    kept.packed = None  # a second backward pass, of a graph that is retained, packs again
    found: tuple[Tensor, Tensor, Tensor, Tensor] = backends.get(call.backend).backward(
        factors,
        grad,
        x,
        s.contiguous(),
        gains.contiguous(),
        seed,
        call.place(coordinates),
        needs,
        _factor_dtype(x, lora_A, lora_B),
    )
    return found


def _forward_fake(
    x: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, Tensor]:
    tokens, rank_sum = x.shape[0], sum(A.shape[0] for A in lora_A)
    return x.new_empty((tokens, lora_B[0].shape[0])), x.new_empty((tokens, rank_sum))


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    s: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    gains: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_x, need_A, need_B, need_gains = rest[-4:]
    dtype, rank_sum = _factor_dtype(x, lora_A, lora_B), s.shape[1]
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty((rank_sum, x.shape[1]) if need_A else (0,), dtype=dtype),
        x.new_empty((grad.shape[1] * rank_sum,) if need_B else (0,), dtype=dtype),
        gains.new_empty(gains.shape if need_gains else (0,)),
    )


def _forward_op(
    x: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    base: Tensor | None,
    gains: Tensor,
    seed: Tensor,
    coordinates: Tensor | None,
    *constants: Any,
) -> tuple[Tensor, Tensor]:
    """The op as torch calls it, from compiled code above all."""
    if coordinates is not None:
        _check_pass((coordinates, gains, seed))
    return _forward(x, lora_A, lora_B, base, gains, seed, coordinates, *constants)


def _check_pass(current: tuple[Tensor, Tensor, Tensor]) -> None:
    """Refuses coordinates, gains and a seed that changed since the pass that is run again.

    Compiled code saves its inputs for backward before this can put others in their place.
    """
    first, _ = settled(("compiled", int(current[0][0])), current)
    if first is None or first is current:
        return
    if not all(torch.equal(a, b) for a, b in zip(first, current, strict=True)):
        raise RuntimeError(
            "seed, sample, weights or scaling of compiled code changed between a forward pass and "
            "its recomputation by torch.utils.checkpoint: change them after backward, or compile "
            "the model with its checkpoints, or do not compile what they run"
        )


torch.library.impl("lora_ortho::forward", "CompositeExplicitAutograd", _forward_op)
torch.library.impl("lora_ortho::backward", "CompositeExplicitAutograd", _backward)
torch.library.register_fake("lora_ortho::forward", _forward_fake)
torch.library.register_fake("lora_ortho::backward", _backward_fake)


def forward(
    x: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    *rest: Any,
    kept: Kept | None = None,
) -> Any:
    """The op ``lora_ortho::forward``, or its very implementation where nothing watches ops."""
    if all_plain((x, *lora_A, *lora_B)):
        return _forward(x, lora_A, lora_B, *rest, kept=kept)
    return torch.ops.lora_ortho.forward.default(x, lora_A, lora_B, *rest)


def backward(
    grad: Tensor,
    x: Tensor,
    s: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    *rest: Any,
    kept: Kept | None = None,
) -> Any:
    """The op ``lora_ortho::backward``, or its very implementation where nothing watches ops."""
    if all_plain((grad, x, s, *lora_A, *lora_B)):
        return _backward(grad, x, s, lora_A, lora_B, *rest, kept=kept)
    return torch.ops.lora_ortho.backward.default(grad, x, s, lora_A, lora_B, *rest)


def all_plain(tensors: Sequence[Tensor]) -> bool:
    """True if nothing but the kernels needs to see a call: no tracing, modes or subclasses."""
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return False
    for tensor in tensors:
        if type(tensor) not in _PLAIN or tensor.is_neg() or tensor.is_meta:
            return False
    return True


_PLAIN = (Tensor, torch.nn.Parameter)
