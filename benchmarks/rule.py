"""The one rule by which a result counts as right, in the tests and in the benchmarks.

    error <= 2 * error of plain torch + eps(dtype) * |result| + eps(accumulator) * |terms|

All are taken against float64, of the largest element and of the root mean square. Plain torch
computes every step in the dtype of x. |terms| is the result of the same formula on the absolute
values of all inputs: the roundings of partial sums scale with it, and in plain torch they may
cancel by luck where a tensor has few elements. How torch rounds differs between processors and
libraries, so the rule compares; it does not say how large a rounding is.

Nothing here is of lora_ortho: the formula is written out once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Compute = Callable[..., Sequence[Tensor]]


class Wanted(NamedTuple):
    """What a tensor is held against.

    Attributes:
        exact: float64.
        plain: what plain torch computes; the tensor's shape and dtype.
        terms: float64, the formula on absolute values.
    """

    exact: Tensor
    plain: Tensor
    terms: Tensor


def formula(
    x: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    gains: Sequence[float | Tensor],
    masks: Sequence[Tensor],
    base: Tensor,
) -> Tensor:
    """``base + Σ_j gain_j · m_j ⊙ (B_j A_j x)`` as one writes it in torch, in the dtype of x.

    Args:
        x: (tokens, d_in).
        lora_A, lora_B: K tensors each, (r_j, d_in) and (d_out, r_j).
        gains: K numbers, or K tensors of one element.
        masks: K bool tensors (tokens, d_out).
        base: (tokens, d_out).
    """
    y = base
    for A, B, gain, mask in zip(lora_A, lora_B, gains, masks, strict=True):
        y = y + (x @ A.to(x.dtype).T) @ B.to(x.dtype).T * mask * gain
    return y


def wanted(compute: Compute, tensors: Sequence[Tensor]) -> list[Wanted]:
    """For each result of ``compute(*tensors)``, what it is held against."""
    wide = [tensor.detach().double() for tensor in tensors]
    exact, plain = compute(*wide), compute(*tensors)
    terms = compute(*(tensor.abs() for tensor in wide))
    return [Wanted(*members) for members in zip(exact, plain, terms, strict=True)]


def fault(found: Tensor, against: Wanted) -> str | None:
    """Why a tensor breaks the rule; None where it keeps it."""
    exact, plain, terms = against
    if found.shape != exact.shape or found.dtype != plain.dtype:
        shape, dtype = tuple(exact.shape), plain.dtype
        return f"is {tuple(found.shape)}, {found.dtype} in the place of {shape}, {dtype}"
    if exact.numel() == 0:
        return None
    finite = found.isfinite()
    if not bool(finite.all()):
        return f"has {int((~finite).sum())} elements that are not finite"
    unit, fine_unit = (torch.finfo(dtype).eps for dtype in (found.dtype, _accumulator(found.dtype)))
    ours, theirs = (tensor.detach().double() - exact for tensor in (found, plain))
    for name, norm in (("largest", _largest), ("root mean square", _root_mean_square)):
        allowed = 2 * norm(theirs) + unit * norm(exact) + fine_unit * norm(terms)
        if not norm(ours) <= allowed:
            return (
                f"is wrong: {name} error {norm(ours):.3e}, plain torch's {norm(theirs):.3e}, "
                f"allowed {allowed:.3e}"
            )
    return None


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


def _root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
