"""The op, top down: its two kernels for torch.library, autograd around them, the public function.

Shapes: x (tokens, d_in); lora_A[j] (r_j, d_in); lora_B[j] (d_out, r_j); base, y, grad
(tokens, d_out); s (tokens, Σ r); gains (K,); seed one int64. What a backend gives is written in
``backends.base``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_ortho import backends
from lora_ortho._torch_internals import (
    all_plain,
    constant_in_graphs,
    in_forward_mode,
    keep_signature,
    settled,
)
from lora_ortho.backends.base import Backend, Gradients, Needs, empty_gradients
from lora_ortho.call import BACKWARD, FORWARD, Call, Constants, Inputs
from lora_ortho.gains import weighted_gains
from lora_ortho.mask_stream import seed_tensor
from lora_ortho.packing import packed
from lora_ortho.problem import Place, Problem, Rule, adapter_count, check, check_dtype
from lora_ortho.reference import wide_dtype

# -------------------------------------------------------------------------------------- the kernels


class Kept:
    """What the forward pass of a call packed, for its backward pass."""

    __slots__ = ("packed",)

    def __init__(self) -> None:
        self.packed: Any = None


def _pack(backend: Backend[Any], inputs: Inputs, constants: Constants) -> Any:
    """The factors in the layout of the call's backend."""
    x, lora_A, lora_B, *_ = inputs
    ranks, d_out = tuple([A.shape[0] for A in lora_A]), lora_B[0].shape[0]
    draw, intervals, *_ = constants
    problem = Problem(draw, intervals, x.shape[1], d_out, ranks, x.dtype, x.device.type)
    return packed(backend, problem, lora_A, lora_B, trained=constants.trained)


def _place(inputs: Inputs, constants: Constants) -> Place:
    coordinates = inputs.coordinates
    return constants.place if coordinates is None else Place(*coordinates.tolist())


def _factor_dtype(inputs: Inputs) -> torch.dtype:
    """That of grad_A and grad_B: the factors' own where they share one, else the accumulators'."""
    first = inputs.lora_A[0].dtype
    same = all(factor.dtype is first for factor in (*inputs.lora_A, *inputs.lora_B))
    return first if same else wide_dtype(inputs.x.dtype)


def _forward(
    inputs: Inputs, base: Tensor | None, constants: Constants, kept: Kept | None = None
) -> tuple[Tensor, Tensor]:
    """y = base + Σ_j gain_j m_j ⊙ (s_j B_jᵀ), and s = x Aᵀ."""
    backend = backends.get(constants.backend)
    factors = _pack(backend, inputs, constants)
    if kept is not None:
        kept.packed = factors
    gains, place = inputs.gains.contiguous(), _place(inputs, constants)
    return backend.forward(factors, inputs.x, base, gains, inputs.seed, place)


def _backward(
    inputs: Inputs,
    grad: Tensor,
    s: Tensor,
    constants: Constants,
    needs: Needs,
    kept: Kept | None = None,
) -> Gradients:
    """The gradients of :func:`_forward`; its masks are drawn again."""
    backend, kept = backends.get(constants.backend), kept or Kept()
    factors = kept.packed if kept.packed is not None else _pack(backend, inputs, constants)
    kept.packed = None  # a second backward pass, of a graph that is retained, packs again
    gains, place = inputs.gains.contiguous(), _place(inputs, constants)
    return backend.backward(
        factors, grad, inputs.x, s.contiguous(), gains, inputs.seed, place, needs,
        _factor_dtype(inputs),
    )  # fmt: skip


def _forward_op(*given: Any) -> tuple[Tensor, Tensor]:
    """The kernel as torch calls it, from compiled code above all."""
    inputs, (base, *constants) = Inputs.split(given)
    if inputs.coordinates is not None:
        _check_pass((inputs.coordinates, inputs.gains, inputs.seed))
    return _forward(inputs, base, Constants.of(*constants))


def _backward_op(*given: Any) -> Gradients:
    inputs, (grad, s, *rest) = Inputs.split(given)
    return _backward(inputs, grad, s, Constants.of(*rest[:-4]), Needs(*rest[-4:]))


def _forward_fake(*given: Any) -> tuple[Tensor, Tensor]:
    x, lora_A, lora_B, *_ = Inputs.split(given)[0]
    tokens, rank_sum = x.shape[0], sum(A.shape[0] for A in lora_A)
    return x.new_empty((tokens, lora_B[0].shape[0])), x.new_empty((tokens, rank_sum))


def _backward_fake(*given: Any) -> Gradients:
    inputs, (grad, s, *rest) = Inputs.split(given)
    dtype, needs = _factor_dtype(inputs), Needs(*rest[-4:])
    return empty_gradients(inputs.x, s, grad.shape[1], inputs.gains, needs, dtype)


def _check_pass(current: tuple[Tensor, Tensor, Tensor]) -> None:
    """Refuses coordinates, gains and a seed that changed since the pass that is run again.

    Compiled code saves its inputs for backward before this can put others in their place.
    """
    first, _ = settled(("compiled", int(current[0][0])), current)
    if first is None or first is current:
        return
    if not all(torch.equal(a, b) for a, b in zip(first, current, strict=True)):
        raise RuntimeError(
            "seed, sample, strata, weights or scaling of compiled code changed between a forward "
            "pass and its recomputation by torch.utils.checkpoint: change them after backward, or "
            "compile the model with its checkpoints, or do not compile what they run"
        )


torch.library.define("lora_ortho::forward", FORWARD)
torch.library.define("lora_ortho::backward", BACKWARD)
torch.library.impl("lora_ortho::forward", "CompositeExplicitAutograd", _forward_op)
torch.library.impl("lora_ortho::backward", "CompositeExplicitAutograd", _backward_op)
torch.library.register_fake("lora_ortho::forward", _forward_fake)
torch.library.register_fake("lora_ortho::backward", _backward_fake)


def _run_forward(
    inputs: Inputs, base: Tensor | None, constants: Constants, kept: Kept | None = None
) -> tuple[Tensor, Tensor]:
    """The op ``lora_ortho::forward``, or its very kernel where nothing watches ops."""
    if all_plain((inputs.x, *inputs.lora_A, *inputs.lora_B)):
        return _forward(inputs, base, constants, kept)
    op: Any = torch.ops.lora_ortho.forward.default
    y, s = op(*inputs, base, *constants.flat())
    return y, s


def _run_backward(
    inputs: Inputs, grad: Tensor, s: Tensor, constants: Constants, needs: Needs, kept: Kept | None
) -> Gradients:
    """The op ``lora_ortho::backward``, or its very kernel where nothing watches ops."""
    if all_plain((grad, inputs.x, s, *inputs.lora_A, *inputs.lora_B)):
        return _backward(inputs, grad, s, constants, needs, kept)
    op: Any = torch.ops.lora_ortho.backward.default
    grad_x, grad_A, grad_B, grad_gains = op(*inputs, grad, s, *constants.flat(), *needs)
    return grad_x, grad_A, grad_B, grad_gains


# ----------------------------------------------------------------------------------------- autograd


class Merge(torch.autograd.Function):
    """y of the merge, differentiable in x, base, gains and every factor; draws its masks again.

    Returns (y, s) with s = x Aᵀ, which is saved and not differentiable. Saves x, s, gains, seed,
    coordinates, the factors and, in ``kept``, their pack: nothing of size (tokens, d_out).
    """

    @staticmethod
    def forward(
        x: Tensor,
        base: Tensor | None,
        gains: Tensor,
        seed: Tensor,
        coordinates: Tensor | None,
        constants: Constants,
        kept: Kept | None,
        *factors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        inputs = Inputs.of(factors, x, gains, seed, coordinates)
        return _run_forward(inputs, base, constants, kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, _, gains, seed, coordinates, constants, kept, *factors = inputs
        s = output[1]
        ctx.mark_non_differentiable(s)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, s, gains, seed, coordinates, *factors)
        ctx.constants, ctx.kept = constants, kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        need_x, need_base, need_gains, _, _, _, _, *need_factors = ctx.needs_input_grad
        half = len(need_factors) // 2
        need_A, need_B = need_factors[:half], need_factors[half:]
        needs = Needs(need_x, any(need_A), any(need_B), need_gains)
        if grad is None or not any(needs):
            grad_base = grad if need_base else None
            return (None, grad_base, *[None] * (5 + len(need_factors)))
        saved = ctx.saved_tensors
        # A second derivative can only be asked of a gradient that is made in grad mode; what
        # torch.compile makes refuses it on its own.
        recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        gradients: Any = MergeGradients.apply if recorded else MergeGradients.forward
        grad_x, grad_A, grad_B, grad_gains = gradients(grad, ctx.constants, needs, ctx.kept, *saved)
        return (
            grad_x if need_x else None,
            grad if need_base else None,
            grad_gains if need_gains else None,
            *(None, None, None, None),
            *_shares(grad_A.view(-1), saved[5 : 5 + half], need_A),
            *_shares(grad_B, saved[5 + half :], need_B),
        )


class MergeGradients(torch.autograd.Function):
    """The gradients, connected to what they depend on only to refuse to be differentiated."""

    @staticmethod
    def forward(
        grad: Tensor,
        constants: Constants,
        needs: Needs,
        kept: Kept | None,
        x: Tensor,
        s: Tensor,
        gains: Tensor,
        seed: Tensor,
        coordinates: Tensor | None,
        *factors: Tensor,
    ) -> Gradients:
        inputs = Inputs.of(factors, x, gains, seed, coordinates)
        return _run_backward(inputs, grad, s, constants, needs, kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "lora_ortho: the gradients of fused_ortho_lora cannot be differentiated again "
            "(double backward is not supported)"
        )


keep_signature(Merge.forward)


def _shares(
    blocks: Tensor, factors: Sequence[Tensor], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The adapters' blocks of a flat gradient, each in its factor's shape and dtype."""
    if not any(needed):
        return (None,) * len(factors)
    shares = torch.split(blocks, [factor.numel() for factor in factors])
    return tuple(
        share.view(factor.shape).to(factor.dtype) if need else None
        for share, factor, need in zip(shares, factors, needed, strict=True)
    )


# ------------------------------------------------------------------------------ the public function


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
    strata: int = 1,
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
        strata: how many samples in a row share the elements out among the adapters in proportion,
            in [1, 65536]; 1 draws each sample on its own. The mean over such a block of samples is
            the direct merge, exactly where strata is a power of two and the product of strata and
            1 - p a whole number for each adapter (K adapters, the default p, strata = K). Where it
            is not whole, a block gives an element to adapters whose shares lie 1/strata apart: if
            those are alike, its mean is noisier than that of so many samples on their own. Every
            sample alone is distributed as with 1.
        row_offset, col_offset: added to token and feature indices, which must stay below 2**32
            and 2**35.
        backend: None for the best that serves the call, else "reference", "cpu", "triton" or
            "cuda", which then must serve it.
    Returns:
        (..., d_out) in the dtype of x.
    Raises:
        TypeError, ValueError: naming the argument, what it was and what it may be.
    """
    check_dtype("x", x)
    rule = Rule.make(adapter_count(lora_A, lora_B), p, scaling, method)
    call = Call(rule, Place(stream, sample, strata, row_offset, col_offset), backend)
    gains = weighted_gains(rule, weights, x)
    return merge(call, x, lora_A, lora_B, base, gains, seed)


def merge(
    call: Call,
    x: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    base: Tensor | None,
    gains: Tensor,
    seed: int | Tensor,
) -> Tensor:
    """:func:`fused_ortho_lora` with its rule made already, and gains as ``weighted_gains`` makes
    them."""
    x, base = _autocast(x, base)
    problem, place = check(call.rule, x, lora_A, lora_B, base, call.place)
    seed = seed_tensor(seed, x.device)
    if seed.device != x.device:
        raise ValueError(f"seed must be on the device of x, {x.device}, got {seed.device}")
    name = backends.choose(call.backend, problem)
    flat = x if x.dim() == 2 else x.reshape(-1, problem.d_in)
    flat_base = base if base is None or base.dim() == 2 else base.reshape(-1, problem.d_out)
    factors = (*lora_A, *lora_B)
    recorded = torch.is_grad_enabled()
    trained = recorded and any(factor.requires_grad for factor in factors)
    constants = Constants(problem.draw, problem.intervals, place, name, trained)
    tensors = (x, gains) if base is None else (x, gains, base)
    if trained or in_forward_mode() or (recorded and any(t.requires_grad for t in tensors)):
        kept = None if torch.compiler.is_compiling() else Kept()
        apply: Any = Merge.apply
        y: Tensor = apply(
            flat, flat_base, gains, seed, call.coordinates, constants, kept, *factors
        )[0]
    else:
        inputs = Inputs(flat, lora_A, lora_B, gains, seed, call.coordinates)
        y = _run_forward(inputs, flat_base, constants)[0]
    return y if x.dim() == 2 else y.view(*x.shape[:-1], problem.d_out)


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


@constant_in_graphs
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)
