"""Is a contender's result right? Asked before it is timed, by the rule of rule.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ortho import mask_stream

from . import rule
from .cases import SEED, Case, Inputs

# Standard deviations by which the shares of random masks may differ from 1/K.
_SIGMAS = 8.0
_CPU = torch.device("cpu")


class WrongResult(Exception):
    """A contender did not compute what it should."""


class Masks(NamedTuple):
    """K masks (tokens, d_out) and their gains."""

    masks: list[Tensor]
    gains: list[float]


def orthogonal(case: Case, place: torch.device = _CPU) -> Masks:
    """Those of the mask stream."""
    limits, keep = mask_stream.thresholds([1 - 1 / case.adapters] * case.adapters, "orthogonal")
    rows, cols = range(case.tokens), range(case.d_out)
    seed = mask_stream.seed_tensor(SEED, place)
    masks = mask_stream.masks(seed, rows, cols, limits, "orthogonal")
    return Masks(masks, [1 / share for share in keep])


def everything(case: Case, place: torch.device = _CPU) -> Masks:
    """No mask at all, as the direct merge has it."""
    mask = torch.ones(1, 1, dtype=torch.bool, device=place).expand(case.tokens, case.d_out)
    return Masks([mask] * case.adapters, [1.0] * case.adapters)


def check_forward(y: Tensor, inputs: Inputs, masks: Masks, weight: Tensor | None = None) -> None:
    """Raise WrongResult unless y is the merge under these masks.

    Args:
        weight: (d_out, d_in) of a layer whose product is the base output; None for inputs.base.
    """
    count = len(inputs.lora_A)

    def merge(x: Tensor, below: Tensor, *factors: Tensor) -> list[Tensor]:
        base = below if weight is None else x @ below.T
        A, B = factors[:count], factors[count:]
        return [rule.formula(x, A, B, masks.gains, masks.masks, base)]

    below = inputs.base if weight is None else weight
    with torch.no_grad():
        (wanted,) = rule.wanted(merge, [inputs.x, below, *inputs.lora_A, *inputs.lora_B])
    _hold("y", y, wanted)


def check_linear(y: Tensor, inputs: Inputs, weight: Tensor) -> None:
    """Raise WrongResult unless y is x times this weight, (d_out, d_in)."""
    with torch.no_grad():
        (wanted,) = rule.wanted(lambda x, matrix: [x @ matrix.T], [inputs.x, weight])
    _hold("y", y, wanted)


def check_copy(y: Tensor, inputs: Inputs) -> None:
    """Raise WrongResult unless y is the base output, in memory of its own."""
    if not torch.equal(y, inputs.base) or y.data_ptr() == inputs.base.data_ptr():
        raise WrongResult("y is no copy of base")


def check_training(found: Sequence[Tensor], inputs: Inputs, masks: Masks, joined: bool) -> None:
    """Raise WrongResult unless these are y and the gradients in x, base, lora_A and lora_B.

    Args:
        joined: the gradients in the factors are two, lying side by side.
    """
    y, grad_x, grad_base, *factors = found
    if not torch.equal(grad_base, inputs.grad):
        raise WrongResult("the gradient in base is not that of the output")
    count = len(inputs.lora_A)

    def train(grad: Tensor, base: Tensor, *given: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in given]
            A, B = leaves[1 : 1 + count], leaves[1 + count :]
            result = rule.formula(leaves[0], A, B, masks.gains, masks.masks, base)
            grad_x, *d = torch.autograd.grad(result, leaves, grad)
        d = [torch.cat(d[:count]), torch.cat(d[count:], 1)] if joined else d
        return [result.detach(), grad_x, *d]

    tensors = [inputs.grad, inputs.base, inputs.x, *inputs.lora_A, *inputs.lora_B]
    names = ["y", "the gradient in x", *(f"gradient {j} in the factors" for j in range(2 * count))]
    against = rule.wanted(train, tensors)
    if len(found) != len(against) + 1:
        raise WrongResult(f"{len(found)} tensors in the place of {len(against) + 1}")
    for name, got, wanted in zip(names, [y, grad_x, *factors], against, strict=False):
        _hold(name, got, wanted)


def check_random(y: Tensor, inputs: Inputs) -> None:
    """Raise WrongResult unless each element of y is base plus K times one adapter's product.

    The one is that which comes closest. And each adapter must have its share of the elements, 1/K.
    """
    x, base = inputs.x.double(), inputs.base.double()
    count = len(inputs.lora_A)
    pairs = zip(inputs.lora_A, inputs.lora_B, strict=True)
    deltas = torch.stack([count * (x @ A.double().T @ B.double().T) for A, B in pairs])
    added = y.double() - base
    owner = (added - deltas).abs().argmin(0)
    masks = Masks([owner == j for j in range(count)], [float(count)] * count)
    check_forward(y, inputs, masks)
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
    count = len(inputs.lora_A)

    def drop(x: Tensor, base: Tensor, *factors: Tensor) -> list[Tensor]:
        result = base
        for A, B, kept in zip(factors[:count], factors[count:], mask.bool(), strict=True):
            result = result + (torch.where(kept, x, 0) / keep) @ A.T @ B.T
        return [result]

    (wanted,) = rule.wanted(drop, [inputs.x, inputs.base, *inputs.lora_A, *inputs.lora_B])
    _hold("y", y, wanted)
    shares = mask.double().mean((1, 2))
    allowed = _SIGMAS * (keep * (1 - keep) / inputs.x.numel()) ** 0.5
    if float((shares - keep).abs().max()) > allowed:
        raise WrongResult(f"the masks keep {shares.tolist()}, not {keep} each")


def _hold(name: str, got: Tensor, wanted: rule.Wanted) -> None:
    """Raise WrongResult unless a tensor keeps the rule."""
    found = rule.fault(got, wanted)
    if found is not None:
        raise WrongResult(f"{name} {found}")
