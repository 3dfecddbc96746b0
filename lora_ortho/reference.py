"""The formula in plain torch: slow, differentiable, and the yardstick of every backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to accumulate in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
        gains: K numbers w_j s_j / q̂_j.
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

    With g_j = m_j ⊙ grad: dB_j = gain_j g_jᵀ s_j, ds_j = gain_j g_j B_j, dA_j = ds_jᵀ x,
    dx = Σ ds_j A_j, dgain_j = Σ g_j ⊙ (s_j B_jᵀ). The gradient of base is ``grad``.

    Returns:
        dx in the dtype of x, dA_j and dB_j in those of the factors, dgains in that of gains.
    """
    wide = wide_dtype(x.dtype)
    grad, wide_x, dx = grad.to(wide), x.to(wide), torch.zeros_like(x, dtype=wide)
    dA, dB, dgains = [], [], []
    for A, B, gain, mask in zip(lora_A, lora_B, gains.to(wide), masks, strict=True):
        g = torch.where(mask, grad, 0)  # (tokens, d_out)
        s = wide_x @ A.to(wide).T  # (tokens, r)
        ds = gain * (g @ B.to(wide))
        dx += ds @ A.to(wide)
        dA.append((ds.T @ wide_x).to(A.dtype))
        dB.append((gain * (g.T @ s)).to(B.dtype))
        dgains.append(((g @ B.to(wide)) * s).sum())
    return dx.to(x.dtype), dA, dB, torch.stack(dgains).to(gains.dtype)


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
