"""What a backend is, and what several of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from lora_ortho.problem import Place, Problem

Packed = TypeVar("Packed")
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]  # grad_x, grad_A, grad_B, grad_gains


class Needs(NamedTuple):
    """Which gradients a backward pass is to give."""

    x: bool
    A: bool
    B: bool
    gains: bool


class Backend(Protocol[Packed]):
    """One way to compute the merge: a module, or an object, with these names.

    ``Packed`` is the backend's own type for factors in the layout that it reads. Arguments are
    checked before a backend is called.
    """

    @property
    def name(self) -> str:
        """What ``backend=`` calls it."""

    @property
    def devices(self) -> tuple[str, ...] | None:
        """The types of device on which ``backend=None`` tries it; None for every type."""

    @property
    def preference(self) -> int:
        """Of the backends that could serve a call, ``backend=None`` takes the one of the highest
        preference."""

    @property
    def copies(self) -> bool:
        """Whether a pack holds copies, which are kept for later calls and made again after a change
        of the factors. False where it only refers to the factors."""

    def unavailable(self) -> str | None:
        """Why it cannot work on this machine; None where it can."""

    def supports(self, problem: Problem) -> str | None:
        """Why it cannot serve a problem; None where it can."""

    def pack(
        self,
        problem: Problem,
        lora_A: Sequence[Tensor],
        lora_B: Sequence[Tensor],
        out: Packed | None = None,
    ) -> Packed:
        """Brings factors, lora_A (r_j, d_in) and lora_B (d_out, r_j), into the layout to read.

        Args:
            out: an earlier pack of the same problem. A backend of a GPU writes over it and returns
                it, because captured graphs know its memory; others may ignore it.
        """

    def forward(
        self,
        packed: Packed,
        x: Tensor,
        base: Tensor | None,
        gains: Tensor,
        seed: int | Tensor,
        place: Place,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One forward pass: shrink, then expand on top of base.

        Args:
            x, base: (tokens, d_in) and (tokens, d_out) or None, any strides.
            gains: (K,) float64 on the CPU, float32 elsewhere.
            seed: int in the signed 64-bit range, or an int64 tensor of one element.
            place: where the call stands in the mask stream.
            out: contiguous (tokens, d_out) to write the output into; may be ``base``.
        Returns:
            y (tokens, d_out) and s = x Aᵀ (tokens, Σ r), contiguous, in the dtype of x.
        """

    def backward(
        self,
        packed: Packed,
        grad: Tensor,
        x: Tensor,
        s: Tensor,
        gains: Tensor,
        seed: int | Tensor,
        place: Place,
        needs: Needs,
        factor_dtype: torch.dtype,
    ) -> Gradients:
        """The gradients of :meth:`forward`, which draws its masks again.

        Args:
            grad: the gradient of y, (tokens, d_out), any strides.
            factor_dtype: of grad_A and grad_B.
        Returns:
            As :func:`empty_gradients` shapes them: tensors of no elements where not needed.
        """


def empty_gradients(
    x: Tensor,
    s: Tensor,
    d_out: int,
    gains: Tensor,
    needs: Needs,
    factor_dtype: torch.dtype,
    make: Callable[..., Tensor] = Tensor.new_empty,
) -> Gradients:
    """The gradients that a backward pass gives, before they are written.

    Args:
        make: called as ``make(x, shape, dtype=dtype)``.
    Returns:
        grad_x (tokens, d_in) in the dtype of x; grad_A (Σ r, d_in), the blocks (r_j, d_in) of all
        adapters; grad_B (d_out · Σ r,), their blocks (d_out, r_j), each contiguous; grad_gains (K,)
        in the dtype of gains. Shape (0,) where not needed.
    """
    rank_sum = s.shape[1]
    none = (0,)
    return (
        make(x, x.shape if needs.x else none, dtype=x.dtype),
        make(x, (rank_sum, x.shape[1]) if needs.A else none, dtype=factor_dtype),
        make(x, (d_out * rank_sum,) if needs.B else none, dtype=factor_dtype),
        make(x, gains.shape if needs.gains else none, dtype=gains.dtype),
    )
