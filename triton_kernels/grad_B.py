"""grad_B_j = gain_j (m_j ⊙ grad)ᵀ s_j. The kernel sums over rows; what moves is in ``backward``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch_config
from .backward import (
    PLAIN,
    draw_tile,
    grad_arguments,
    group_of,
    masked,
    member,
    split,
    units,
    zeros,
)
from .launch import Factors, Launch, compile_options, sizes_of
from .launch_config import Gpu
from .tiles import column_groups, columns, dot, load_share, load_wide, narrow, share

if TYPE_CHECKING:
    from lora_ortho.problem import Place


@triton.jit(do_not_specialize=PLAIN)
def grad_B_kernel(
    grad_B: tl.tensor,
    grad: tl.tensor,
    s: tl.tensor,
    B: tl.tensor,
    table: tl.tensor,
    gains: tl.tensor,
    seed: tl.tensor,
    tokens: tl.tensor,
    d_out: tl.tensor,
    grad_stride: tl.tensor,
    grad_column: tl.tensor,
    s_stride: tl.tensor,
    stream: tl.tensor,
    sample: tl.tensor,
    rotation: tl.tensor,
    row_offset: tl.tensor,
    group_offset: tl.tensor,
    tiles: tl.tensor,
    parts: tl.tensor,
    DRAW: tl.constexpr,
    K: tl.constexpr,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFT: tl.constexpr,
    VECTOR: tl.constexpr,
    S_VECTOR: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """One program: BLOCK_N rows of grad_B_j, CHUNK columns, for GROUP adapters, ``tiles`` tiles.

    grad_B (parts, Σr · d_out), in each part the adapters' (d_out, r_j) one after another; B is not
    read; the rest as in ``grad_s_kernel``.
    """
    group, chunk, block = group_of(K, WIDTH, CHUNK, GROUP)
    part = block % parts
    cols, in_cols = columns(block // parts, d_out, SHIFT, VECTOR, BLOCK_N)
    groups = column_groups(block // parts, BLOCK_N)
    r = chunk * CHUNK + tl.arange(0, CHUNK)
    place = (tl.load(seed), stream, sample, rotation, row_offset, group_offset)
    rank_sum = s_stride * S_VECTOR
    sums = zeros(GROUP, BLOCK_N, CHUNK)
    for tile in range(part * tiles, min(part * tiles + tiles, tl.cdiv(tokens, BLOCK_M))):
        rows = (tl.zeros([BLOCK_M], dtype=tl.int64) + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (rows < tokens)[:, None] & in_cols[None, :]
        g = load_wide(grad, rows, cols, inside, grad_stride * VECTOR, grad_column, CONTIGUOUS)
        u = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.uint32)
        if DRAW == "shared":
            u = draw_tile(place, rows, groups, 0)
        grown = ()
        for i in tl.static_range(GROUP):
            j, present = member(group, i, K, GROUP)
            if DRAW == "own":
                u = draw_tile(place, rows, groups, j)
            begin, rank = share(table, j, RANK)
            s_j = load_share(s, rows, tokens, rank_sum, begin, rank, r)
            g_j = masked(g, u, table, j, DRAW)
            grown += (dot(tl.trans(g_j), s_j, sums[i]),)
        sums = grown
    d_out = d_out.to(tl.int64)
    for i in tl.static_range(GROUP):
        j, present = member(group, i, K, GROUP)
        begin, rank = share(table, j, RANK)
        grad_B_j = grad_B + part * (d_out * rank_sum) + d_out * begin
        total = narrow(sums[i] * tl.load(gains + j), grad_B.dtype.element_ty)
        inside = in_cols[:, None] & (r < tl.where(present, rank, 0))[None, :]
        tl.store(grad_B_j + cols.to(tl.int64)[:, None] * rank + r[None, :], total, mask=inside)


def grad_B(
    factors: Factors,
    gpu: Gpu,
    grad: Tensor,
    s: Tensor,
    gains: Tensor,
    seed: Tensor,
    place: Place,
    dtype: torch.dtype,
) -> tuple[Launch, Tensor]:
    """The launch that makes grad_B, and grad_B in parts, to be added along axis 0.

    Returns:
        grad_B (parts, Σr · d_out), in ``dtype`` where there is one part and the kernel can write
        it, else float32. tokens > 0.
    """
    tokens, d_out = grad.shape
    config = launch_config.grad_B(gpu, sizes_of(factors, tokens))
    parts, tiles = split(-(-tokens // config.block_m), config.parts)
    blocks = -(-(d_out + (place.col_offset & 7)) // config.block_n) * parts
    in_float32 = parts > 1 or dtype == torch.float64
    shape = (parts, factors.rank_sum * d_out)
    written = grad.new_empty(shape, dtype=torch.float32 if in_float32 else dtype)
    arguments, constants = grad_arguments(factors, config, grad, s, gains, seed, place)
    arguments |= {"grad_B": written, "tiles": tiles, "parts": parts}
    programs = blocks * units(factors, config)
    options = compile_options(gpu, config.warps)
    return Launch(grad_B_kernel, programs, arguments, constants, options), written
