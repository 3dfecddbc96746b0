"""Is a contender's result right? Asked before it is timed.

Exact values are those of the formula in float64. An element may be off by what rounding explains,
unit * (|exact| + 8 * rms(terms)), where the unit is a few eps of the dtype: an element with
another adapter's mask is off by about one rms(terms).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ortho import mask_stream
from lora_ortho.reference import merge, merge_gradients

from .cases import SEED, Case, Inputs

# eps of the dtype for a result, in its roundings; float32 sums thousands of terms besides.
_UNITS = {torch.float32: 8.0, torch.bfloat16: 1.0, torch.float16: 1.0}
# Standard deviations by which the shares of random masks may differ from 1/K.
_SIGMAS = 8.0
_CPU = torch.device("cpu")


class WrongResult(Exception):
    """A contender did not compute what it should."""


class Masks(NamedTuple):
    """K masks (tokens, d_out) and their gains (K,) in float64."""

    masks: list[Tensor]
    gains: Tensor


def orthogonal(case: Case, place: torch.device = _CPU) -> Masks:
    """Those of the mask stream."""
    limits, keep = mask_stream.thresholds([1 - 1 / case.adapters] * case.adapters, "orthogonal")
    rows, cols = range(case.tokens), range(case.d_out)
    seed = mask_stream.seed_tensor(SEED, place)
    masks = mask_stream.masks(seed, rows, cols, limits, "orthogonal")
    return Masks(masks, 1 / torch.tensor(keep, dtype=torch.float64, device=place))


def everything(case: Case, place: torch.device = _CPU) -> Masks:
    """No mask at all, as the direct merge has it."""
    mask = torch.ones(1, 1, dtype=torch.bool, device=place).expand(case.tokens, case.d_out)
    gains = torch.ones(case.adapters, dtype=torch.float64, device=place)
    return Masks([mask] * case.adapters, gains)


def check_forward(
    y: Tensor,
    inputs: Inputs,
    masks: Masks,
    weight: Tensor | None = None,
    *,
    roundings: float = 1.0,
) -> None:
    """Raise WrongResult unless y is the merge under these masks.

    Args:
        weight: (d_out, d_in) of a layer whose product is the base output; None for inputs.base.
        roundings: how many times as far off as after one rounding an element may be.
    """
    x, A, B, base = _wide(inputs)
    if weight is not None:
        base = x @ weight.double().T
    exact = merge(x, A, B, masks.gains, masks.masks, base)
    _compare("y", y, exact, exact - base, inputs.dtype, roundings)


def check_linear(y: Tensor, inputs: Inputs, weight: Tensor) -> None:
    """Raise WrongResult unless y is x times this weight, (d_out, d_in)."""
    exact = inputs.x.double() @ weight.double().T
    _compare("y", y, exact, exact, inputs.dtype)


def check_copy(y: Tensor, inputs: Inputs) -> None:
    """Raise WrongResult unless y is the base output, in memory of its own."""
    if not torch.equal(y, inputs.base) or y.data_ptr() == inputs.base.data_ptr():
        raise WrongResult("y is no copy of base")


def check_training(found: Sequence[Tensor], inputs: Inputs, masks: Masks, joined: bool) -> None:
    """Raise WrongResult unless these are y and the gradients in x, base, lora_A and lora_B.

    Args:
        joined: the gradients in the factors are two, lying side by side.
    """
    y, dx, dbase, *factors = found
    check_forward(y, inputs, masks)
    if not torch.equal(dbase, inputs.grad):
        raise WrongResult("the gradient in base is not that of the output")
    x, A, B, _ = _wide(inputs)
    exact_dx, dA, dB, _ = merge_gradients(inputs.grad.double(), x, A, B, masks.gains, masks.masks)
    exact = [torch.cat(dA), torch.cat(dB, 1)] if joined else [*dA, *dB]
    _compare("the gradient in x", dx, exact_dx, exact_dx, inputs.dtype)
    for j, (got, wanted) in enumerate(zip(factors, exact, strict=True)):
        _compare(f"gradient {j} in the factors", got, wanted, wanted, inputs.dtype)


def check_random(y: Tensor, inputs: Inputs) -> None:
    """Raise WrongResult unless each element of y is base plus K times one adapter's product.

    And each adapter must have its share of the elements, 1/K.
    """
    x, A, B, base = _wide(inputs)
    count = len(A)
    deltas = torch.stack([count * (x @ a.T @ b.T) for a, b in zip(A, B, strict=True)])
    added = y.double() - base
    error = torch.full_like(base, torch.inf)
    for delta in deltas:
        error = torch.minimum(error, (added - delta).abs())
    # Every adapter's product is rounded on its own and added on its own.
    _judge("y", error, base + added, deltas, 4 * count**0.5 * _unit(inputs.dtype))
    flat = deltas.reshape(count, -1)
    shares = torch.linalg.solve(flat @ flat.T, flat @ added.reshape(-1))
    allowed = _SIGMAS * ((3 + count) / base.numel()) ** 0.5
    if float((shares - 1 / count).abs().max()) > allowed:
        raise WrongResult(f"the adapters' shares are {shares.tolist()}, not 1/{count} each")


def check_stored(found: Sequence[Tensor], inputs: Inputs, keep: float) -> None:
    """Raise WrongResult unless y is base plus every adapter's product of the x its mask keeps.

    And each mask must keep its share of the elements.
    """
    y, mask = found
    x, A, B, base = _wide(inputs)
    exact = base
    for a, b, kept in zip(A, B, mask.bool(), strict=True):
        exact = exact + (torch.where(kept, x, 0) / keep) @ a.T @ b.T
    _compare("y", y, exact, exact - base, inputs.dtype, 4 * len(A) ** 0.5)
    shares = mask.double().mean((1, 2))
    allowed = _SIGMAS * (keep * (1 - keep) / x.numel()) ** 0.5
    if float((shares - keep).abs().max()) > allowed:
        raise WrongResult(f"the masks keep {shares.tolist()}, not {keep} each")


def _wide(inputs: Inputs) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    A, B = ([t.double() for t in factors] for factors in (inputs.lora_A, inputs.lora_B))
    return inputs.x.double(), A, B, inputs.base.double()


def _unit(dtype: torch.dtype) -> float:
    return _UNITS[dtype] * torch.finfo(dtype).eps


def _compare(
    name: str,
    got: Tensor,
    exact: Tensor,
    terms: Tensor,
    dtype: torch.dtype,
    roundings: float = 1.0,
) -> None:
    if got.shape != exact.shape or got.dtype != dtype:
        raise WrongResult(f"{name} is {tuple(got.shape)}, {got.dtype}")
    _judge(name, (got.detach().double() - exact).abs(), exact, terms, roundings * _unit(dtype))


def _judge(name: str, error: Tensor, exact: Tensor, terms: Tensor, unit: float) -> None:
    allowed = unit * (exact.abs() + 8 * terms.square().mean().sqrt())
    wrong = ~(error <= allowed)  # true for NaN
    if wrong.any():
        share, worst = wrong.double().mean(), (error / allowed).max()
        raise WrongResult(
            f"{float(share):.2%} of {name} is wrong, by up to {float(worst):.1f} times what "
            "rounding explains"
        )
