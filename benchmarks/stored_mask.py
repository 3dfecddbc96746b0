"""A fused dropout LoRA that stores its masks in the manner of LoRAFusion.

Every adapter drops features of its input, independently: y = base + sum_j B_j A_j (m_j x / q).
One kernel draws the masks, keeps them for the backward pass, and shrinks; one matrix product
expands. Written for this comparison: what it costs to put masks into memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cases import SEED, Inputs

KEEP = 0.5
_TOKENS, _FEATURES = 32, 64
# Triton's interpreter cannot multiply bfloat16.
_WIDE = os.environ.get("TRITON_INTERPRET", "") not in ("", "0")


@triton.jit  # type: ignore[untyped-decorator]
def _drop_and_shrink(
    x_ptr: tl.tensor, a_ptr: tl.tensor, mask_ptr: tl.tensor, s_ptr: tl.tensor, seed: tl.tensor,
    tokens: tl.tensor, d_in: tl.tensor, rank: tl.tensor, rank_sum: tl.tensor, keep: tl.tensor,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, RANK: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:  # fmt: skip
    """x (tokens, d_in), a (K, rank, d_in) -> mask (K, tokens, d_in), s (tokens, K rank)."""
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    adapter = tl.program_id(1).to(tl.int64)
    ranks = tl.arange(0, RANK)
    total = tl.zeros((TOKENS, RANK), dtype=tl.float32)
    for start in range(0, d_in, FEATURES):
        cols = start + tl.arange(0, FEATURES)
        inside = (rows < tokens)[:, None] & (cols < d_in)[None, :]
        at = rows[:, None] * d_in + cols[None, :]
        x = tl.load(x_ptr + at, inside, 0.0)
        kept = tl.rand(seed + adapter, at) < keep
        tl.store(mask_ptr + adapter * tokens * d_in + at, kept.to(tl.int8), inside)
        a = tl.load(
            a_ptr + (adapter * rank + ranks[None, :]) * d_in + cols[:, None],
            (ranks < rank)[None, :] & (cols < d_in)[:, None], 0.0,
        )  # fmt: skip
        if WIDE:
            total += tl.dot(tl.where(kept, x.to(tl.float32), 0.0), a.to(tl.float32))
        else:
            total += tl.dot(tl.where(kept, x.to(tl.float32), 0.0).to(a.dtype), a)
    at = rows[:, None] * rank_sum + adapter * rank + ranks[None, :]
    inside = (rows < tokens)[:, None] & (ranks < rank)[None, :]
    tl.store(s_ptr + at, (total / keep).to(s_ptr.dtype.element_ty), inside)


def stored_mask(inputs: Inputs) -> Callable[[], tuple[Tensor, Tensor]]:
    """The call gives y (tokens, d_out) and the stored masks, int8 (K, tokens, d_in)."""
    case, x, base = inputs.case, inputs.x, inputs.base
    A, B = torch.stack(inputs.lora_A), torch.cat(inputs.lora_B, 1)
    grid = (triton.cdiv(case.tokens, _TOKENS), case.adapters)
    block = max(16, triton.next_power_of_2(case.rank))

    def call() -> tuple[Tensor, Tensor]:
        mask = x.new_empty((case.adapters, case.tokens, case.d_in), dtype=torch.int8)
        s = x.new_empty((case.tokens, case.adapters * case.rank))
        _drop_and_shrink[grid](
            x, A, mask, s, SEED, case.tokens, case.d_in, case.rank, s.shape[1], KEEP,
            TOKENS=_TOKENS, FEATURES=_FEATURES, RANK=block, WIDE=_WIDE,
        )  # fmt: skip
        return torch.addmm(base, s, B.T), mask

    return call
