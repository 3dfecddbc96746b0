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
    grad_x, grad_weights, grad_A, grad_B = np.zeros_like(x), [], [], []
    for j, mask in enumerate(masks):
        A, B, weight = (wide(t) for t in (tensors.lora_A[j], tensors.lora_B[j], tensors.weights[j]))
        constant = np.longdouble(scaling[j]) / np.longdouble(keep[j])
        s, g = x @ A.T, mask.numpy() * grad * constant
        grad_s = weight * (g @ B)
        y = y + mask.numpy() * constant * weight * (s @ B.T)
        grad_x += grad_s @ A
        grad_A.append(narrow(grad_s.T @ x))
        grad_B.append(narrow(weight * (g.T @ s)))
        grad_weights.append(((g @ B) * s).sum())
    grad_base = None if tensors.base is None else tensors.grad.double()
    return Results(
        narrow(y), narrow(grad_x), grad_base, narrow(np.array(grad_weights)), grad_A, grad_B
    )


Expected = dict[str, rule.Wanted]


def _by_name(results: Results) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in results._asdict().items():
        if isinstance(value, list):
            found |= {f"{name}[{j}]": tensor for j, tensor in enumerate(value)}
        elif value is not None:
            found[name] = value
    return found


def expected(
    tensors: Tensors, masks: Sequence[Tensor], keep: Sequence[float], scaling: Sequence[float]
) -> Expected:
    """What an output and its gradients are held against, by name: what rule.wanted says of them."""
    count = len(tensors.lora_A)
    names: list[str] = []

    def compute(x: Tensor, weights: Tensor, grad: Tensor, *more: Tensor) -> list[Tensor]:
        lora_A, lora_B, base = list(more[:count]), list(more[count : 2 * count]), more[2 * count :]
        given = Tensors(x, lora_A, lora_B, weights, base[0] if base else None, grad)

        def call(x, lora_A, lora_B, weights, base):  # type: ignore[no-untyped-def]
            base = torch.zeros_like(grad) if base is None else base
            gains = [weight * (s / q) for weight, s, q in zip(weights, scaling, keep, strict=True)]
            return rule.formula(x, lora_A, lora_B, gains, masks, base)

        found = _by_name(_gradients(call, given))
        names[:] = found
        return list(found.values())

    flat = [tensors.x, tensors.weights, tensors.grad, *tensors.lora_A, *tensors.lora_B]
    if tensors.base is not None:
        flat.append(tensors.base)
    held = rule.wanted(compute, flat)
    wanted = dict(zip(names, held, strict=True))
    if tensors.x.dtype == torch.float64:
        exact = _by_name(extended_oracle(tensors, masks, keep, scaling))
        wanted = {name: one._replace(exact=exact[name]) for name, one in wanted.items()}
    return wanted


def assert_as_good(ours: Results, wanted: Expected) -> None:
    """Hold an output and all its gradients to the rule."""
    found = _by_name(ours)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert_one(name, tensor, *wanted[name])


def assert_one(name: str, ours: Tensor, exact: Tensor, plain: Tensor, terms: Tensor) -> None:
    """Hold one tensor to the rule."""
    found = rule.fault(ours, rule.Wanted(exact, plain, terms))
    assert found is None, f"{name} {found}"
