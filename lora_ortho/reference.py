"""The formula in plain torch: slow, differentiable, and the yardstick of every backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_ortho import mask_stream
from lora_ortho.problem import Draw, Place, Problem


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to accumulate in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def masks(
    problem: Problem, tokens: int, seed: int | Tensor, place: Place, device: torch.device
) -> list[Tensor]:
    """The K masks of a call, bool (tokens, d_out): where u lies in the interval of adapter j."""
    if problem.draw is Draw.NONE:
        everywhere = torch.ones(tokens, problem.d_out, dtype=torch.bool, device=device)
        return [everywhere] * len(problem.intervals)
    key = mask_stream.seed_tensor(seed, device)
    rows = range(place.row_offset, place.row_offset + tokens)
    cols = range(place.col_offset, place.col_offset + problem.d_out)

    def draws(lane_set: int) -> Tensor:
        at = {"stream": place.stream, "sample": place.sample, "strata": place.strata}
        return mask_stream.draws(key, rows, cols, lane_set=lane_set, **at)

    count = len(problem.intervals)
    us = [draws(0)] * count if problem.draw is Draw.SHARED else [draws(j) for j in range(count)]
    return [
        (first <= u) & (u <= last) for u, (first, last) in zip(us, problem.intervals, strict=True)
    ]


def merge(
    x: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    gains: Sequence[float] | Tensor,
    masks: Sequence[Tensor],
    base: Tensor | None = None,
) -> Tensor:
    """y = base + Σ_j gain_j · m_j ⊙ (B_j A_j x), arXiv 2510.03262.

    Accumulates in float32 (float64 for float64) and rounds once. Differentiable by autograd in
    every tensor but the masks.

    Args:
        x: (tokens, d_in).
        lora_A, lora_B: K tensors each, (r_j, d_in) and (d_out, r_j).
        gains: K numbers w_j c_j / q̂_j.
        masks: K bool tensors (tokens, d_out), see :func:`lora_ortho.mask_stream.masks`.
        base: (tokens, d_out), or None for zeros.
    Returns:
        (tokens, d_out) in the dtype of x.
    """
    wide = wide_dtype(x.dtype)
    y = x.new_zeros((x.shape[0], lora_B[0].shape[0]), dtype=wide) if base is None else base.to(wide)
    for A, B, gain, mask in zip(lora_A, lora_B, gains, masks, strict=True):
        delta = x.to(wide) @ A.to(wide).T @ B.to(wide).T  # (tokens, d_out)
        y = y + torch.where(mask, gain * delta, 0)
    return y.to(x.dtype)


def merge_gradients(
    grad: Tensor,
    x: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    gains: Tensor,
    masks: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Gradients of :func:`merge` in x, lora_A, lora_B and gains, written out.

    With g_j = m_j ⊙ grad: grad_B_j = gain_j g_jᵀ s_j, grad_s_j = gain_j g_j B_j,
    grad_A_j = grad_s_jᵀ x, grad_x = Σ grad_s_j A_j, grad_gain_j = Σ s_j ⊙ (g_j B_j). The gradient
    of base is ``grad``.

    Returns:
        grad_x in the dtype of x, grad_A_j and grad_B_j in those of the factors, grad_gains in that
        of gains.
    """
    wide = wide_dtype(x.dtype)
    grad, wide_x, grad_x = grad.to(wide), x.to(wide), torch.zeros_like(x, dtype=wide)
    grads_A, grads_B, grad_gains = [], [], []
    for A, B, gain, mask in zip(lora_A, lora_B, gains.to(wide), masks, strict=True):
        g = torch.where(mask, grad, 0)  # (tokens, d_out)
        s = wide_x @ A.to(wide).T  # (tokens, r)
        grad_s = gain * (g @ B.to(wide))
        grad_x += grad_s @ A.to(wide)
        grads_A.append((grad_s.T @ wide_x).to(A.dtype))
        grads_B.append((gain * (g.T @ s)).to(B.dtype))
        grad_gains.append(((g @ B.to(wide)) * s).sum())
    return grad_x.to(x.dtype), grads_A, grads_B, torch.stack(grad_gains).to(gains.dtype)


def stick_breaking(
    p: Sequence[float], shape: tuple[int, ...], generator: torch.Generator | None = None
) -> list[Tensor]:
    """Disjoint masks by the paper's own construction (arXiv 2510.03262), for comparison.

    z_j ~ Ber(q_j / (1 - Σ_{i<j} q_i)) and m_j = z_j Π_{i<j}(1 - z_i), with q_j = 1 - p_j: one
    Bernoulli tensor per adapter, drawn from torch's generator. Equal in distribution to the
    orthogonal masks of the mask stream, up to its 16-bit resolution.

    Returns:
        K bool tensors of the given shape.
    """
    free = torch.ones(shape, dtype=torch.bool)
    left, masks = 1.0, []
    for rate in p:
        chance = min((1.0 - rate) / left, 1.0) if left > 0.0 else 0.0
        z = torch.rand(shape, generator=generator, dtype=torch.float64) < chance
        masks.append(z & free)
        free = free & ~z
        left -= 1.0 - rate
    return masks
