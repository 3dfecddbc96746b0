"""What a call of the merge is held to: exact values, plain torch, and the rule of rule.py.

Exact values are those of the formula in float64 (for float64, in the processor's widest float) on
the masks of the stream, written out without any code of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from cases import Case, Tensors
from torch import Tensor

from benchmarks import rule
from lora_ortho import mask_stream


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
    thresholds, keep = mask_stream.thresholds(case.p or [1 - 1 / count] * count, method)
    rows = range(row_offset, row_offset + case.tokens)
    cols = range(col_offset, col_offset + case.d_out)
    return mask_stream.masks(seed, rows, cols, thresholds, method, **place), keep


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
        base = torch.zeros_like(wide.grad) if base is None else base
        return rule.formula(x, lora_A, lora_B, weights * constants, masks, base)

    return _gradients(call, wide)


def plain_torch(
    tensors: Tensors, masks: Sequence[Tensor], keep: Sequence[float], scaling: Sequence[float]
) -> Results:
    """What one would write in torch, every step in the dtype of x."""

    def call(x, lora_A, lora_B, weights, base):  # type: ignore[no-untyped-def]
        base = torch.zeros_like(tensors.grad) if base is None else base
        gains = [weight * (s / q) for weight, s, q in zip(weights, scaling, keep, strict=True)]
        return rule.formula(x, lora_A, lora_B, gains, masks, base)

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
    found = rule.fault(ours, rule.Wanted(exact, plain, terms))
    assert found is None, f"{name} {found}"
