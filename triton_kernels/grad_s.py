"""grad_s_j = gain_j (m_j ⊙ grad) B_j and, from the same sums, the gradients of the gains.

The kernel sums over columns; what moves is in ``backward``.
"""

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
from .tiles import column_groups, columns, dot, load_share, load_wide, narrow, share, wide

if TYPE_CHECKING:
    from lora_ortho.problem import Place


@triton.jit(do_not_specialize=PLAIN)
def grad_s_kernel(
    grad_s: tl.tensor,
    grad_gains: tl.tensor,
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
    """One program: BLOCK_M rows of grad_s_j, CHUNK columns, for GROUP adapters, ``tiles`` tiles.

    grad_s (parts, tokens, Σr) in its own dtype; grad_gains (row blocks · parts, K, WIDTH // CHUNK)
    float32, both each program's own share of the sum; the rest as in ``expand_kernel``.
    """
    group, chunk, block = group_of(K, WIDTH, CHUNK, GROUP)
    part = block % parts
    rows = (block // parts).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = chunk * CHUNK + tl.arange(0, CHUNK)
    place = (tl.load(seed), stream, sample, rotation, row_offset, group_offset)
    sums = zeros(GROUP, BLOCK_M, CHUNK)
    for tile in range(part * tiles, min(part * tiles + tiles, tl.cdiv(d_out + SHIFT, BLOCK_N))):
        cols, in_cols = columns(tile, d_out, SHIFT, VECTOR, BLOCK_N)
        groups = column_groups(tile, BLOCK_N)
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
            at = B + d_out.to(tl.int64) * (j * WIDTH) + cols[:, None] * WIDTH + r[None, :]
            tile_B = tl.load(at, mask=in_cols[:, None], other=0.0)
            g_j = masked(g, u, table, j, DRAW)
            grown += (dot(g_j, tile_B, sums[i]),)
        sums = grown
    rank_sum = s_stride * S_VECTOR
    grad_s_rows = grad_s + part.to(tl.int64) * tokens * rank_sum + rows[:, None] * rank_sum
    for i in tl.static_range(GROUP):
        j, present = member(group, i, K, GROUP)
        begin, rank = share(table, j, RANK)
        s_j = load_share(s, rows, tokens, rank_sum, begin, rank, r)
        at = grad_gains + (block * K + j) * (WIDTH // CHUNK) + chunk
        tl.store(at, tl.sum(sums[i] * wide(s_j)), mask=present)
        grad_s_j = narrow(sums[i] * tl.load(gains + j), grad_s.dtype.element_ty)
        inside = (rows < tokens)[:, None] & (r < tl.where(present, rank, 0))[None, :]
        tl.store(grad_s_rows + (begin + r)[None, :], grad_s_j, mask=inside)


def grad_s(
    factors: Factors,
    gpu: Gpu,
    grad: Tensor,
    s: Tensor,
    gains: Tensor,
    seed: Tensor,
    place: Place,
) -> tuple[Launch, Tensor, Tensor]:
    """The launch that makes grad_s and grad_gains, and both in parts, to be added along axis 0.

    Returns:
        grad_s (parts, tokens, Σr), in the dtype of grad where there is one part, else float32;
        grad_gains (parts, K, chunks) float32, to be added along axis 2 as well. tokens > 0.
    """
    tokens = grad.shape[0]
    config = launch_config.grad_s(gpu, sizes_of(factors, tokens))
    tiles = -(-(grad.shape[1] + (place.col_offset & 7)) // config.block_n)
    parts, tiles = split(tiles, config.parts)
    blocks = -(-tokens // config.block_m) * parts
    K, _, width = factors.B.shape
    dtype = grad.dtype if parts == 1 else torch.float32
    written = grad.new_empty((parts, tokens, factors.rank_sum), dtype=dtype)
    grad_gains = gains.new_empty((blocks, K, width // config.chunk), dtype=torch.float32)
    arguments, constants = grad_arguments(factors, config, grad, s, gains, seed, place)
    arguments |= {"grad_s": written, "grad_gains": grad_gains, "tiles": tiles, "parts": parts}
    programs = blocks * units(factors, config)
    options = compile_options(gpu, config.warps)
    return Launch(grad_s_kernel, programs, arguments, constants, options), written, grad_gains
