"""The public op: y = base + Σ_j (w_j s_j / q̂_j) · m_j ⊙ (B_j A_j x)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_ortho import backends, ops
from lora_ortho.autograd import Merge
from lora_ortho.mask_stream import as_int, seed_tensor
from lora_ortho.ops import Call, Kept
from lora_ortho.packing import gain_dtype
from lora_ortho.problem import (
    DTYPES,
    Place,
    Rule,
    adapter_count,
    check,
    check_dtype,
    finite_numbers,
)

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def fused_ortho_lora(
    x: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    *,
    p: Sequence[float] | Tensor | None = None,
    scaling: Sequence[float] | Tensor | None = None,
    weights: Sequence[float] | Tensor | None = None,
    method: str = "orthogonal",
    base: Tensor | None = None,
    seed: int | Tensor,
    stream: int = 0,
    sample: int = 0,
    row_offset: int = 0,
    col_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Merge K LoRA adapters at run time by Orthogonal Monte Carlo Dropout (arXiv 2510.03262).

    Differentiable in x, every lora_A, every lora_B, base, and weights where it is a tensor. The
    masks are a pure function of seed and coordinates (MASK_STREAM.md) and are drawn again in
    backward. Accumulates in float32 (float64 for float64) and rounds once. Under autocast, x and
    base are cast to the autocast dtype, float64 excepted. Leading dimensions that no single
    stride can walk are copied once.

    Args:
        x: (..., d_in); float32, bfloat16, float16, or float64.
        lora_A: K tensors (r_j, d_in); ranks may differ. Any of the dtypes of x, not only its own.
        lora_B: K tensors (d_out, r_j).
        p: K dropout rates in [0, 1); None is 1 - 1/K for each.
        scaling: K floats, alpha/r of each adapter; None is 1.
        weights: K merge weights, numbers or a (K,) tensor on the device of x; None is 1.
        method: "orthogonal" (at most one adapter owns an element; needs Σ(1 - p_j) ≤ 1),
            "dropout" (independent masks) or "direct" (no mask).
        base: (..., d_out) in the dtype of x to add to, never modified; None is zeros.
        seed: 64-bit int, or an int64 tensor of one element on the device of x.
        stream: which layer, in [0, 2**32).
        sample: which Monte Carlo draw, in [0, 2**24).
        row_offset, col_offset: added to token and feature indices, which must stay below 2**32
            and 2**35.
        backend: None for the best that serves the call, else "reference", "cpu", "triton" or
            "cuda", which then must serve it.
    Returns:
        (..., d_out) in the dtype of x.
    Raises:
        TypeError, ValueError: naming the argument, what it was and what it may be.
    """
    rule = Rule.make(adapter_count(lora_A, lora_B), p, scaling, method)
    place = Place(
        as_int("stream", stream),
        as_int("sample", sample),
        as_int("row_offset", row_offset),
        as_int("col_offset", col_offset),
    )
    gains = weighted_gains(rule, weights, x)
    return merge(rule, gains, x, lora_A, lora_B, base, seed, place, backend)


def merge(
    rule: Rule,
    gains: Tensor,
    x: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    base: Tensor | None,
    seed: int | Tensor,
    place: Place,
    backend: str | None,
    coordinates: Tensor | None = None,
) -> Tensor:
    """:func:`fused_ortho_lora` with its constants checked already.

    Args:
        gains: (K,) as :func:`weighted_gains` makes them.
        place, coordinates: where the call stands in the mask stream, as ints or, for
            torch.compile, as a tensor that then stands for them (``ops``).
    """
    x, base = _autocast(x, base)
    problem = check(rule, x, lora_A, lora_B, base, place)
    name = backends.choose(backend, problem)
    seed = _seed(seed, x.device)
    flat = x if x.dim() == 2 else x.reshape(-1, problem.d_in)
    flat_base = base if base is None or base.dim() == 2 else base.reshape(-1, problem.d_out)
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (*lora_A, *lora_B))
    call = Call(rule.thresholds, rule.method, *place, name, trained)
    if _differentiates(x, base, gains, *lora_A, *lora_B):
        apply: Any = Merge.apply
        kept = None if torch.compiler.is_compiling() else Kept()
        factors = (*lora_A, *lora_B)
        y: Tensor = apply(flat, flat_base, gains, seed, coordinates, call, kept, *factors)[0]
    else:
        y = ops.forward(flat, lora_A, lora_B, flat_base, gains, seed, coordinates, *call)[0]
    return y if x.dim() == 2 else y.view(*x.shape[:-1], problem.d_out)


def _differentiates(*tensors: Tensor | None) -> bool:
    """True if a derivative may be asked for, by autograd or in forward mode."""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autocast(x: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor | None]:
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    if not isinstance(x, Tensor) or x.dtype not in narrow:
        return x, base
    device = x.device.type
    if not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return x, base
    dtype = torch.get_autocast_dtype(device)
    if isinstance(base, Tensor) and base.dtype in narrow:
        base = base.to(dtype)
    return x.to(dtype), base


def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


# As in backends.triton: the compiler of torch 2.7 and before cannot follow the call.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def weighted_gains(rule: Rule, weights: Sequence[float] | Tensor | None, x: Tensor) -> Tensor:
    """The gains w_j s_j / q̂_j as a (K,) tensor, differentiable in tensor weights."""
    check_dtype("x", x)
    dtype = gain_dtype(x.device.type)
    count = len(rule.gains)
    if not isinstance(weights, Tensor):
        numbers = finite_numbers("weights", weights, count)
        gains = [w * g for w, g in zip(numbers, rule.gains, strict=True)]
        return constants(tuple(gains), dtype, x)
    if weights.dtype not in DTYPES + _INTEGERS:
        raise TypeError(f"weights must be a floating point or integer tensor, got {weights.dtype}")
    if weights.shape != (count,):
        raise ValueError(f"weights must have shape ({count},), got {tuple(weights.shape)}")
    if weights.device != x.device:
        raise ValueError(f"weights must be on the device of x, {x.device}, got {weights.device}")
    return weights.to(dtype) * constants(rule.gains, dtype, x)


def constants(values: tuple[float, ...], dtype: torch.dtype, x: Tensor) -> Tensor:
    """Numbers on the device of x, sent there once: a copy from the host ends a graph's capture."""
    if x.is_cuda and ops.all_plain((x,)):
        return _on_device(values, dtype, x.device)
    return torch.tensor(values, dtype=dtype, device=x.device)


@functools.lru_cache(maxsize=1024)
def _on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def _seed(seed: int | Tensor, device: torch.device) -> Tensor:
    tensor = seed_tensor(seed, device)
    if tensor.device != device:
        raise ValueError(f"seed must be on the device of x, {device}, got {tensor.device}")
    return tensor
