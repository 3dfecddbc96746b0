"""The reference as a backend: plain torch on any device, any dtype. Slow; it builds every mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ortho.backends.base import Gradients, Needs
from lora_ortho.problem import Place, Problem
from lora_ortho.reference import masks, merge, merge_gradients, wide_dtype

name, preference, copies = "reference", 0, False
devices: tuple[str, ...] | None = None


class Packed(NamedTuple):
    """The factors as they are; this backend has no layout of its own."""

    problem: Problem
    lora_A: tuple[Tensor, ...]
    lora_B: tuple[Tensor, ...]


def unavailable() -> None:
    """It works wherever torch does."""


def supports(problem: Problem) -> None:
    """It serves every problem that was checked."""


def pack(
    problem: Problem, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], out: Packed | None = None
) -> Packed:
    aliases = [tuple(t.detach() for t in factors) for factors in (lora_A, lora_B)]
    return Packed(problem, *aliases)


def forward(
    packed: Packed,
    x: Tensor,
    base: Tensor | None,
    gains: Tensor,
    seed: int | Tensor,
    place: Place,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    problem, lora_A, lora_B = packed
    wide = wide_dtype(x.dtype)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        m = masks(problem, x.shape[0], seed, place, x.device)
        y = merge(x, lora_A, lora_B, gains.to(wide), m, base)
        s = torch.cat([x.to(wide) @ A.to(wide).T for A in lora_A], dim=1)
    return (y if out is None else out.copy_(y)), s.to(x.dtype)


def backward(
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
    problem = packed.problem
    wide = wide_dtype(x.dtype)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        lora_A = [A.to(wide) for A in packed.lora_A]
        lora_B = [B.to(wide) for B in packed.lora_B]
        m = masks(problem, x.shape[0], seed, place, x.device)
        grad_x, grads_A, grads_B, grad_gains = merge_gradients(grad, x, lora_A, lora_B, gains, m)
        grad_A = torch.cat(grads_A).to(factor_dtype)
        grad_B = torch.cat([block.reshape(-1) for block in grads_B]).to(factor_dtype)
    return (
        grad_x if needs.x else grad_x.new_empty(0),
        grad_A if needs.A else grad_A.new_empty(0),
        grad_B if needs.B else grad_B.new_empty(0),
        grad_gains if needs.gains else grad_gains.new_empty(0),
    )
