"""The one rule by which a result counts as right.

    error <= 2 * error of plain torch + eps(dtype) * |result| + eps(accumulator) * |terms|

All are taken against float64 (for float64, against the processor's widest float) on the same
masks, of the largest element and of the root mean square.
Plain torch computes every step in the dtype of x. |terms| is the result of the same formula on the
absolute values of all inputs: the roundings of partial sums scale with it, and in plain torch they
may cancel by luck where a tensor has few elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from cases import Case, Tensors
from torch import Tensor

from lora_ortho import mask_stream
from lora_ortho.reference import merge, wide_dtype


class Results(NamedTuple):
    """An output and its gradients, by name; None where there is none."""

    y: Tensor
    x: Tensor
    base: Tensor | None
    weights: Tensor
    lora_A: list[Tensor]
    lora_B: list[Tensor]


def masks_of(
    case: Case, method: str, seed: int, *, row_offset: int = 0, col_offset: int = 0, **place: int
) -> tuple[list[Tensor], list[float]]:
    """The masks of a case, and the keep probabilities they realise."""
    count = len(case.ranks)
    limits, keep = mask_stream.thresholds(case.p or [1 - 1 / count] * count, method)
    rows = range(row_offset, row_offset + case.tokens)
    cols = range(col_offset, col_offset + case.d_out)
    return mask_stream.masks(seed, rows, cols, limits, method, **place), keep


def _gradients(function: Callable[..., Tensor], tensors: Tensors) -> Results:
    """A function's output and gradients on detached copies that keep their memory layout."""
    leaves = [tensors.x, tensors.weights, *tensors.lora_A, *tensors.lora_B]
    if tensors.base is not None:
        leaves.append(tensors.base)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    count = len(tensors.lora_A)
    x, weights = leaves[:2]
    lora_A, lora_B = leaves[2 : 2 + count], leaves[2 + count : 2 + 2 * count]
    base = None if tensors.base is None else leaves[-1]
    y = function(x, lora_A, lora_B, weights, base)
    found = list(torch.autograd.grad(y, leaves, tensors.grad))
    return Results(
        y.detach(),
        found[0],
        None if base is None else found[-1],
        found[1],
        found[2 : 2 + count],
        found[2 + count : 2 + 2 * count],
    )


def run(function: Callable[..., Tensor], tensors: Tensors, **arguments: object) -> Results:
    """``fused_ortho_lora`` or its like: the output, and the gradients for ``tensors.grad``."""

    def call(x, lora_A, lora_B, weights, base):  # type: ignore[no-untyped-def]
        return function(x, lora_A, lora_B, weights=weights, base=base, **arguments)

    return _gradients(call, tensors)


def oracle(
    tensors: Tensors, masks: Sequence[Tensor], keep: Sequence[float], scaling: Sequence[float]
) -> Results:
    """The formula in float64, with autograd's gradients."""
    wide = Tensors(
        tensors.x.double(),
        [A.double() for A in tensors.lora_A],
        [B.double() for B in tensors.lora_B],
        tensors.weights.double(),
        None if tensors.base is None else tensors.base.double(),
        tensors.grad.double(),
    )
    constants = torch.tensor([s / q for s, q in zip(scaling, keep, strict=True)]).double()

    def call(x, lora_A, lora_B, weights, base):  # type: ignore[no-untyped-def]
        return merge(x, lora_A, lora_B, weights * constants, masks, base)

    return _gradients(call, wide)


def plain_torch(
    tensors: Tensors, masks: Sequence[Tensor], keep: Sequence[float], scaling: Sequence[float]
) -> Results:
    """What one would write in torch, every step in the dtype of x."""

    def call(x, lora_A, lora_B, weights, base):  # type: ignore[no-untyped-def]
        y = torch.zeros_like(tensors.grad) if base is None else base
        for j, mask in enumerate(masks):
            delta = (x @ lora_A[j].to(x.dtype).T) @ lora_B[j].to(x.dtype).T
            y = y + delta * mask * (weights[j] * (scaling[j] / keep[j]))
        return y

    return _gradients(call, tensors)


def extended_oracle(
    tensors: Tensors, masks: Sequence[Tensor], keep: Sequence[float], scaling: Sequence[float]
) -> Results:
    """The formula and its gradients written out in the processor's widest float, for float64."""

    def wide(tensor: Tensor) -> np.ndarray:
        return tensor.detach().numpy().astype(np.longdouble)

    def narrow(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(values).astype(np.float64))

    x, grad = wide(tensors.x), wide(tensors.grad)
    y = np.zeros_like(grad) if tensors.base is None else wide(tensors.base)
    dx, dweights, dA, dB = np.zeros_like(x), [], [], []
    for j, mask in enumerate(masks):
        A, B, weight = (wide(t) for t in (tensors.lora_A[j], tensors.lora_B[j], tensors.weights[j]))
        constant = np.longdouble(scaling[j]) / np.longdouble(keep[j])
        s, g = x @ A.T, mask.numpy() * grad * constant
        ds = weight * (g @ B)
        y = y + mask.numpy() * constant * weight * (s @ B.T)
        dx += ds @ A
        dA.append(narrow(ds.T @ x))
        dB.append(narrow(weight * (g.T @ s)))
        dweights.append(((g @ B) * s).sum())
    dbase = None if tensors.base is None else tensors.grad.double()
    return Results(narrow(y), narrow(dx), dbase, narrow(np.array(dweights)), dA, dB)


class Expected(NamedTuple):
    """What a result is compared with."""

    exact: Results
    plain: Results
    terms: Results


def expected(
    tensors: Tensors, masks: Sequence[Tensor], keep: Sequence[float], scaling: Sequence[float]
) -> Expected:
    """Everything that the rule needs for one case."""
    absolute = Tensors(
        *([t.abs() for t in v] if isinstance(v, list) else None if v is None else v.abs()
          for v in tensors)
    )  # fmt: skip
    exact = extended_oracle if tensors.x.dtype == torch.float64 else oracle
    return Expected(
        exact(tensors, masks, keep, scaling),
        plain_torch(tensors, masks, keep, scaling),
        oracle(absolute, masks, keep, scaling),
    )


def assert_as_good(ours: Results, wanted: Expected) -> None:
    """Hold an output and all its gradients to the rule."""
    for name in Results._fields:
        group = [getattr(results, name) for results in (ours, *wanted)]
        if group[1] is None:
            assert group[0] is None, f"{name}: expected none"
        elif isinstance(group[1], list):
            for j, members in enumerate(zip(*group, strict=True)):
                assert_one(f"{name}[{j}]", *members)
        else:
            assert_one(name, *group)


def assert_one(name: str, ours: Tensor, exact: Tensor, plain: Tensor, terms: Tensor) -> None:
    """Hold one tensor to the rule."""
    assert ours.shape == exact.shape, f"{name}: shape {ours.shape}, expected {exact.shape}"
    assert ours.dtype == plain.dtype, f"{name}: dtype {ours.dtype}, expected {plain.dtype}"
    if exact.numel() == 0:
        return
    assert ours.isfinite().all(), f"{name}: {int((~ours.isfinite()).sum())} elements not finite"
    unit, fine_unit = (torch.finfo(dtype).eps for dtype in (ours.dtype, wide_dtype(ours.dtype)))
    for norm in (_largest, _root_mean_square):
        error, theirs = norm(ours.double() - exact), norm(plain.double() - exact)
        allowed = 2 * theirs + unit * norm(exact) + fine_unit * norm(terms)
        assert error <= allowed, (
            f"{name}: {norm.__name__} error {error:.3e}, plain torch's {theirs:.3e}, "
            f"allowed {allowed:.3e}"
        )


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


def _root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
