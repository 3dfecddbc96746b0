"""The thin torch.autograd.Function around the two ops."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from lora_ortho import ops
from lora_ortho.ops import Call, Kept

_FIRST_FACTOR = 7  # among the arguments of Merge


class Merge(torch.autograd.Function):
    """y of the merge, differentiable in x, base, gains and every factor; draws its masks again.

    ``apply(x, base, gains, seed, coordinates, call, kept, *lora_A, *lora_B)`` returns (y, s) with
    s = x Aᵀ, which is saved and not differentiable. Saves x, s, gains, seed, coordinates, the
    factors and, in ``kept``, their pack: nothing of size (tokens, d_out).
    """

    @staticmethod
    def forward(
        x: Tensor,
        base: Tensor | None,
        gains: Tensor,
        seed: Tensor,
        coordinates: Tensor | None,
        call: Call,
        kept: Kept | None,
        *factors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        half = len(factors) // 2
        y, s = ops.forward(
            x, factors[:half], factors[half:], base, gains, seed, coordinates, *call, kept=kept
        )
        return y, s

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, _, gains, seed, coordinates, call, kept, *factors = inputs
        s = output[1]
        ctx.mark_non_differentiable(s)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, s, gains, seed, coordinates, *factors)
        ctx.call, ctx.kept = call, kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, s, gains, seed, coordinates, *factors = ctx.saved_tensors
        if grad is None:
            return (None,) * (_FIRST_FACTOR + len(factors))
        half, needs = len(factors) // 2, ctx.needs_input_grad
        need_A, need_B = needs[_FIRST_FACTOR:][:half], needs[_FIRST_FACTOR + half :]
        wanted = (needs[0], any(need_A), any(need_B), needs[2])
        none: tuple[Tensor | None, ...] = (None,) * half
        dx, dgains, dA, dB = None, None, none, none
        if any(wanted):
            call = (coordinates, ctx.call, wanted, ctx.kept)
            # A second derivative can only be asked of a gradient that is made in grad mode; what
            # torch.compile makes refuses it on its own.
            recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
            gradients: Any = MergeGradients.apply if recorded else MergeGradients.forward
            dx, dA_all, dB_all, dgains = gradients(grad, x, s, gains, seed, *call, *factors)
            dA = _shares(dA_all.view(-1), factors[:half], need_A)
            dB = _shares(dB_all, factors[half:], need_B)
        return (
            dx if needs[0] else None,
            grad if needs[1] else None,
            dgains if needs[2] else None,
            *(None, None, None, None),
            *dA,
            *dB,
        )


class MergeGradients(torch.autograd.Function):
    """The gradients, connected to what they depend on only to refuse to be differentiated."""

    @staticmethod
    def forward(
        grad: Tensor,
        x: Tensor,
        s: Tensor,
        gains: Tensor,
        seed: Tensor,
        coordinates: Tensor | None,
        call: Call,
        wanted: tuple[bool, bool, bool, bool],
        kept: Kept | None,
        *factors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        half = len(factors) // 2
        dx, dA, dB, dgains = ops.backward(
            grad, x, s, factors[:half], factors[half:], gains, seed, coordinates, *call, *wanted,
            kept=kept,
        )  # fmt: skip
        return dx, dA, dB, dgains

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "lora_ortho: the gradients of fused_ortho_lora cannot be differentiated again "
            "(double backward is not supported)"
        )


# torch asks for the signature of forward at every call; working it out anew would cost 20 us.
setattr(Merge.forward, "__signature__", inspect.signature(Merge.forward))  # noqa: B010


def _shares(
    blocks: Tensor, factors: list[Tensor], needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The adapters' blocks of a flat gradient, each in its factor's shape and dtype."""
    if not any(needed):
        return (None,) * len(factors)
    shares = torch.split(blocks, [factor.numel() for factor in factors])
    return tuple(
        share.view(factor.shape).to(factor.dtype) if need else None
        for share, factor, need in zip(shares, factors, needed, strict=True)
    )
