"""The reference as a backend: plain torch on any device, any dtype. Slow; it builds every mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ortho import mask_stream
from lora_ortho.problem import Place, Problem
from lora_ortho.reference import merge, merge_gradients, wide_dtype


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
    problem: Problem,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    *,
    out: Packed | None = None,
) -> Packed:
    """Bring checked factors, lora_A (r_j, d_in) and lora_B (d_out, r_j), into the layout to read.

    The result is valid as long as the values in the factors do not change.

    Args:
        out: an earlier pack of the same problem, which a backend of a GPU writes over and returns:
            captured graphs know its memory.
    """
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
    """One forward pass over checked arguments.

    Args:
        x, base: (tokens, d_in) and (tokens, d_out) or None, any strides.
        gains: (K,) float64 on the CPU, float32 elsewhere.
        seed: int in the signed 64-bit range, or an int64 tensor of one element.
        out: contiguous (tokens, d_out) to write the output into; may be ``base``.
    Returns:
        y (tokens, d_out) and s = x Aᵀ (tokens, Σ r), contiguous, in the dtype of x.
    """
    wide = wide_dtype(x.dtype)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        masks = _masks(packed.problem, x, seed, place)
        y = merge(x, packed.lora_A, packed.lora_B, gains.to(wide), masks, base)
        s = torch.cat([x.to(wide) @ A.to(wide).T for A in packed.lora_A], dim=1)
    return (y if out is None else out.copy_(y)), s.to(x.dtype)


def backward(
    packed: Packed,
    grad: Tensor,
    x: Tensor,
    s: Tensor,
    gains: Tensor,
    seed: int | Tensor,
    place: Place,
    needs: tuple[bool, bool, bool, bool],
    factor_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of :func:`forward`, from grad (tokens, d_out), any strides.

    Args:
        needs: which of the gradients in x, lora_A, lora_B and gains are wanted.
        factor_dtype: of the gradients in lora_A and lora_B.
    Returns:
        dx (tokens, d_in) in the dtype of x; dA (Σ r, d_in), the blocks (r_j, d_in) of all adapters;
        dB (d_out · Σ r,), their blocks (d_out, r_j), each contiguous; dgains (K,) in the dtype of
        gains. Tensors of no elements where not wanted.
    """
    wide = wide_dtype(x.dtype)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        lora_A = [A.to(wide) for A in packed.lora_A]
        lora_B = [B.to(wide) for B in packed.lora_B]
        masks = _masks(packed.problem, x, seed, place)
        dx, dA, dB, dgains = merge_gradients(grad, x, lora_A, lora_B, gains, masks)
        blocks = torch.cat([b.reshape(-1) for b in dB])
        found = (dx, torch.cat(dA).to(factor_dtype), blocks.to(factor_dtype), dgains)
    dx, dA_all, dB_all, dgains = (
        tensor if needed else tensor.new_empty(0)
        for tensor, needed in zip(found, needs, strict=True)
    )
    return dx, dA_all, dB_all, dgains


def _masks(problem: Problem, x: Tensor, seed: int | Tensor, place: Place) -> list[Tensor]:
    return mask_stream.masks(
        mask_stream.seed_tensor(seed, x.device),
        range(place.row_offset, place.row_offset + x.shape[0]),
        range(place.col_offset, place.col_offset + problem.d_out),
        problem.thresholds,
        problem.method,
        stream=place.stream,
        sample=place.sample,
    )
