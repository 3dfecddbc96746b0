"""The gradients, from grad (tokens, d_out) and masks drawn again.

With g_j = m_j ⊙ grad and u_j = g_j B_j: ds_j = gain_j u_j, dgain_j = Σ s_j ⊙ u_j and
dB_j = gain_j g_jᵀ s_j. Two kernels, one sums over columns, one over rows; dx = ds A and dA = dsᵀ x
are the library's products. Nothing is added atomically: parts of a sum lie side by side and are
added in order by a second step.

Bytes that must move, with e bytes an element: grad e·tokens·d_out, once for each kernel and group
of adapters; s and ds e·tokens·Σr each; B and dB e·d_out·Σr each. Parts add 8·Σr·tokens to ds, or
8·Σr·d_out to dB, for each part. One kernel that reads grad once would have to write a part of ds
for every BLOCK_N columns, 8·Σr / BLOCK_N bytes an element; a second reading is e bytes, less unless
BLOCK_N ≥ 8·Σr / e (192 columns for three adapters of rank 16 in bfloat16, whose dB alone fills the
registers of a program).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch_config
from .launch import (
    Factors,
    Launch,
    compile_options,
    merge_of,
    shared,
    vector_of,
)
from .launch_config import Backward, Gpu
from .mask_stream import draw
from .tiles import dot, load_share, load_wide, narrow, share, wide

_PLAIN = [
    "tokens", "d_out", "grad_stride", "grad_column", "s_stride", "stream", "sample",
    "row_offset", "group_offset", "tiles", "parts",
]  # fmt: skip


@triton.jit
def masked(
    tile: tl.tensor, u: tl.tensor, table: tl.tensor, j: tl.tensor, METHOD: tl.constexpr
) -> tl.tensor:
    """m_j ⊙ tile."""
    if METHOD == "direct":
        kept = tile
    else:
        low = tl.load(table + 4 * j).to(tl.uint32, bitcast=True)
        high = tl.load(table + 4 * j + 1).to(tl.uint32, bitcast=True)
        kept = tl.where((u >= low) & (u <= high), tile, 0.0)
    return kept


@triton.jit
def member(unit: tl.tensor, i: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr) -> tl.tensor:
    """The adapter i of a group, and whether there is one: the last group may not be full."""
    j = unit * GROUP + i
    return tl.minimum(j, K - 1), j < K


@triton.jit(do_not_specialize=_PLAIN)
def grad_s_kernel(
    ds: tl.tensor,
    dgains: tl.tensor,
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
    row_offset: tl.tensor,
    group_offset: tl.tensor,
    tiles: tl.tensor,
    parts: tl.tensor,
    METHOD: tl.constexpr,
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
    """One program: BLOCK_M rows of ds_j, CHUNK columns, for GROUP adapters, over ``tiles`` tiles.

    ds (parts, tokens, Σr) in its own dtype; dgains (row blocks · parts, K, WIDTH // CHUNK) float32,
    both each program's own share of the sum; the rest as in ``forward_kernel``.
    """
    CHUNKS: tl.constexpr = WIDTH // CHUNK
    UNITS: tl.constexpr = (K + GROUP - 1) // GROUP * CHUNKS
    unit = tl.program_id(0) % UNITS // CHUNKS
    chunk = tl.program_id(0) % CHUNKS
    block = tl.program_id(0) // UNITS
    part = block % parts
    rows = (block // parts).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = chunk * CHUNK + tl.arange(0, CHUNK)
    key = tl.load(seed)
    sums = ()
    for _i in tl.static_range(GROUP):
        sums += (tl.zeros([BLOCK_M, CHUNK], dtype=tl.float32),)
    for tile in range(part * tiles, min(part * tiles + tiles, tl.cdiv(d_out + SHIFT, BLOCK_N))):
        cols = tile * BLOCK_N - SHIFT + tl.arange(0, BLOCK_N)
        in_cols = tl.max_constancy((cols >= 0) & (cols < d_out), VECTOR)
        groups = tile * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
        inside = (rows < tokens)[:, None] & in_cols[None, :]
        g = load_wide(grad, rows, cols, inside, grad_stride * VECTOR, grad_column, CONTIGUOUS)
        u = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.uint32)
        if METHOD == "orthogonal":
            u = draw(key, rows + row_offset, groups + group_offset, stream, sample, 0)
            u = tl.reshape(u, [BLOCK_M, BLOCK_N])
        grown = ()
        for i in tl.static_range(GROUP):
            j, present = member(unit, i, K, GROUP)
            if METHOD == "dropout":
                u = draw(key, rows + row_offset, groups + group_offset, stream, sample, j)
                u = tl.reshape(u, [BLOCK_M, BLOCK_N])
            at = B + d_out.to(tl.int64) * (j * WIDTH) + cols[:, None] * WIDTH + r[None, :]
            tile_B = tl.load(at, mask=in_cols[:, None], other=0.0)
            g_j = masked(g, u, table, j, METHOD)
            grown += (dot(g_j, tile_B, sums[i]),)
        sums = grown
    rank_sum = s_stride * S_VECTOR
    ds_rows = ds + part.to(tl.int64) * tokens * rank_sum + rows[:, None] * rank_sum
    for i in tl.static_range(GROUP):
        j, present = member(unit, i, K, GROUP)
        first, rank = share(table, j, RANK)
        s_j = load_share(s, rows, tokens, rank_sum, first, rank, r)
        at = dgains + (block * K + j) * CHUNKS + chunk
        tl.store(at, tl.sum(sums[i] * wide(s_j)), mask=present)
        ds_j = narrow(sums[i] * tl.load(gains + j), ds.dtype.element_ty)
        inside = (rows < tokens)[:, None] & (r < tl.where(present, rank, 0))[None, :]
        tl.store(ds_rows + (first + r)[None, :], ds_j, mask=inside)


@triton.jit(do_not_specialize=_PLAIN)
def grad_B_kernel(
    dB: tl.tensor,
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
    row_offset: tl.tensor,
    group_offset: tl.tensor,
    tiles: tl.tensor,
    parts: tl.tensor,
    METHOD: tl.constexpr,
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
    """One program: BLOCK_N rows of dB_j, CHUNK columns, for GROUP adapters, over ``tiles`` tiles.

    dB (parts, Σr · d_out), in each part the adapters' (d_out, r_j) one after another; B is not
    read; the rest as in :func:`grad_s_kernel`.
    """
    CHUNKS: tl.constexpr = WIDTH // CHUNK
    UNITS: tl.constexpr = (K + GROUP - 1) // GROUP * CHUNKS
    unit = tl.program_id(0) % UNITS // CHUNKS
    block = tl.program_id(0) // UNITS
    part = block % parts
    cols = block // parts * BLOCK_N - SHIFT + tl.arange(0, BLOCK_N)
    in_cols = tl.max_constancy((cols >= 0) & (cols < d_out), VECTOR)
    groups = block // parts * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
    r = tl.program_id(0) % CHUNKS * CHUNK + tl.arange(0, CHUNK)
    key = tl.load(seed)
    rank_sum = s_stride * S_VECTOR
    sums = ()
    for _i in tl.static_range(GROUP):
        sums += (tl.zeros([BLOCK_N, CHUNK], dtype=tl.float32),)
    for tile in range(part * tiles, min(part * tiles + tiles, tl.cdiv(tokens, BLOCK_M))):
        rows = (tl.zeros([BLOCK_M], dtype=tl.int64) + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (rows < tokens)[:, None] & in_cols[None, :]
        g = load_wide(grad, rows, cols, inside, grad_stride * VECTOR, grad_column, CONTIGUOUS)
        u = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.uint32)
        if METHOD == "orthogonal":
            u = draw(key, rows + row_offset, groups + group_offset, stream, sample, 0)
            u = tl.reshape(u, [BLOCK_M, BLOCK_N])
        grown = ()
        for i in tl.static_range(GROUP):
            j, present = member(unit, i, K, GROUP)
            if METHOD == "dropout":
                u = draw(key, rows + row_offset, groups + group_offset, stream, sample, j)
                u = tl.reshape(u, [BLOCK_M, BLOCK_N])
            first, rank = share(table, j, RANK)
            s_j = load_share(s, rows, tokens, rank_sum, first, rank, r)
            g_j = masked(g, u, table, j, METHOD)
            grown += (dot(tl.trans(g_j), s_j, sums[i]),)
        sums = grown
    d_out = d_out.to(tl.int64)
    for i in tl.static_range(GROUP):
        j, present = member(unit, i, K, GROUP)
        first, rank = share(table, j, RANK)
        dB_j = dB + part * (d_out * rank_sum) + d_out * first
        total = narrow(sums[i] * tl.load(gains + j), dB.dtype.element_ty)
        inside = in_cols[:, None] & (r < tl.where(present, rank, 0))[None, :]
        tl.store(dB_j + cols.to(tl.int64)[:, None] * rank + r[None, :], total, mask=inside)


def grad_s(
    factors: Factors,
    gpu: Gpu,
    grad: Tensor,
    s: Tensor,
    gains: Tensor,
    seed: Tensor,
    place: tuple[int, int, int, int],
) -> tuple[Launch, Tensor, Tensor]:
    """The launch that makes ds and dgains, and both in parts, to be added along the first axis.

    Returns:
        ds (parts, tokens, Σr), in the dtype of grad where there is one part, else float32; dgains
        (parts, K, chunks) float32. tokens > 0.
    """
    tokens = grad.shape[0]
    config = launch_config.grad_s(gpu, merge_of(factors, tokens))
    tiles = -(-(grad.shape[1] + (place[3] & 7)) // config.block_n)
    parts, tiles = _split(tiles, config.parts)
    blocks = -(-tokens // config.block_m) * parts
    K, _, width = factors.B.shape
    dtype = grad.dtype if parts == 1 else torch.float32
    ds = grad.new_empty((parts, tokens, factors.rank_sum), dtype=dtype)
    dgains = gains.new_empty((blocks, K, width // config.chunk), dtype=torch.float32)
    arguments, constants = _arguments(factors, config, grad, s, gains, seed, place)
    arguments |= {"ds": ds, "dgains": dgains, "tiles": tiles, "parts": parts}
    programs = blocks * _units(factors, config)
    options = compile_options(gpu, config.warps)
    return Launch(grad_s_kernel, programs, arguments, constants, options), ds, dgains


def grad_B(
    factors: Factors,
    gpu: Gpu,
    grad: Tensor,
    s: Tensor,
    gains: Tensor,
    seed: Tensor,
    place: tuple[int, int, int, int],
    dtype: torch.dtype,
) -> tuple[Launch, Tensor]:
    """The launch that makes dB, and dB in parts, to be added along the first axis.

    Returns:
        dB (parts, Σr · d_out), in ``dtype`` where there is one part and the kernel can write it,
        else float32. tokens > 0.
    """
    tokens, d_out = grad.shape
    config = launch_config.grad_B(gpu, merge_of(factors, tokens))
    parts, tiles = _split(-(-tokens // config.block_m), config.parts)
    blocks = -(-(d_out + (place[3] & 7)) // config.block_n) * parts
    wide = parts > 1 or dtype == torch.float64
    dB = grad.new_empty((parts, factors.rank_sum * d_out), dtype=torch.float32 if wide else dtype)
    arguments, constants = _arguments(factors, config, grad, s, gains, seed, place)
    arguments |= {"dB": dB, "tiles": tiles, "parts": parts}
    programs = blocks * _units(factors, config)
    options = compile_options(gpu, config.warps)
    return Launch(grad_B_kernel, programs, arguments, constants, options), dB


def _split(tiles: int, parts: int) -> tuple[int, int]:
    """The parts into which tiles fall, none of them empty, and the tiles of each but the last."""
    each = -(-tiles // parts)
    return -(-tiles // each), each


def _units(factors: Factors, config: Backward) -> int:
    K, _, width = factors.B.shape
    return -(-K // config.group) * (width // config.chunk)


def _arguments(
    factors: Factors,
    config: Backward,
    grad: Tensor,
    s: Tensor,
    gains: Tensor,
    seed: Tensor,
    place: tuple[int, int, int, int],
) -> tuple[dict[str, object], dict[str, object]]:
    arguments, constants = shared(factors, s, gains, seed, place)
    tokens, d_out = grad.shape
    row, column = grad.stride()
    sizes = math.gcd(d_out, row if tokens > 1 else d_out, place[3]) if column == 1 else 1
    vector = vector_of(sizes, grad.element_size(), grad)
    arguments |= {"grad": grad, "grad_stride": row // vector, "grad_column": column}
    constants |= {
        "CHUNK": config.chunk,
        "GROUP": config.group,
        "VECTOR": vector,
        "CONTIGUOUS": column == 1,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    return arguments, constants
