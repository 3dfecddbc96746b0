"""Merges of lower rank: the best adapter of a rank, and factors of a dense difference."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_ortho.mask_stream import ROW_LIMIT, check_in_range
from lora_ortho.module import Adapter

# Extra directions and passes of the randomised SVD (Halko, Martinsson, Tropp 2011, section 4.5).
_OVERSAMPLING = 16
_PASSES = 4


def reduce_rank(adapter: Adapter, rank: int) -> tuple[Adapter, float]:
    """The best adapter of a given rank, in the sense of the Frobenius norm of B A.

    The factors give the singular values exactly through their QR decompositions and one SVD of
    (r, r), which costs less than a randomised SVD of (d_out, d_in) and has no error of its own.

    Args:
        adapter: its scaling and weight are left as they are, and so is its bias.
        rank: at least 1; an adapter of that rank or less is returned as it is.
    Returns:
        The adapter, and the relative error ‖B A - B' A'‖ / ‖B A‖ in the Frobenius norm.
    """
    check_in_range("rank", rank, ROW_LIMIT)
    if rank == 0:
        raise ValueError("rank must be at least 1, got 0")
    if rank >= adapter.lora_A.shape[0]:
        return adapter, 0.0
    left, core_B = torch.linalg.qr(adapter.lora_B.detach().double())
    right, core_A = torch.linalg.qr(adapter.lora_A.detach().double().T)
    u, sizes, vh = torch.linalg.svd(core_B @ core_A.T, full_matrices=False)
    total, lost = (float(part.square().sum().sqrt()) for part in (sizes, sizes[rank:]))
    lora_A, lora_B = _balanced(left @ u[:, :rank], sizes[:rank], vh[:rank] @ right.T)
    return _like(adapter, lora_A, lora_B), lost / total if total else 0.0


def low_rank(delta: Tensor, rank: int, *, seed: int = 0) -> tuple[Tensor, Tensor, float]:
    """Factors of a dense (d_out, d_in) difference by randomised SVD (Halko et al. 2011).

    Args:
        delta: floating point.
        rank: at least 1; at most min(d_out, d_in) is used.
        seed: of the random directions; the same seed gives the same factors.
    Returns:
        lora_A (r, d_in), lora_B (d_out, r) in the dtype of delta, and the relative error
        ‖delta - B A‖ / ‖delta‖ in the Frobenius norm, measured.
    """
    if not isinstance(delta, Tensor) or not delta.dtype.is_floating_point or delta.dim() != 2:
        raise TypeError("delta must be a floating point tensor (d_out, d_in)")
    check_in_range("rank", rank, ROW_LIMIT)
    if rank == 0:
        raise ValueError("rank must be at least 1, got 0")
    wide = delta.detach().double()
    rank = min(rank, *wide.shape)
    directions = min(rank + _OVERSAMPLING, *wide.shape)
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(wide.shape[1], directions, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(wide @ probe.to(wide.device))[0]
    for _ in range(_PASSES):
        basis = torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ basis)[0])[0]
    u, sizes, vh = torch.linalg.svd(basis.T @ wide, full_matrices=False)
    lora_A, lora_B = _balanced(basis @ u[:, :rank], sizes[:rank], vh[:rank])
    size = float(wide.norm())
    error = float((wide - lora_B @ lora_A).norm()) / size if size else 0.0
    return lora_A.to(delta.dtype), lora_B.to(delta.dtype), error


def _balanced(left: Tensor, sizes: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B of left diag(sizes) right, the singular values shared evenly."""
    root = sizes.sqrt()
    return root[:, None] * right, left * root


def _like(adapter: Adapter, lora_A: Tensor, lora_B: Tensor) -> Adapter:
    dtype_A, dtype_B = adapter.lora_A.dtype, adapter.lora_B.dtype
    return Adapter(
        lora_A.to(dtype_A).contiguous(),
        lora_B.to(dtype_B).contiguous(),
        scaling=adapter.scaling,
        weight=adapter.weight,
        p=adapter.p,
        bias=adapter.bias,
        name=adapter.name,
    )
