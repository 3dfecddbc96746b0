"""y = base + Σ_j gain_j · m_j ⊙ (s_j B_jᵀ) in one pass: draw, expand, select, add, round, store.

Bytes that must move, with e bytes an element: 2·e·tokens·d_out for base and y, e·tokens·Σr for s
and e·d_out·Σr for B; s and B are read again by tiles that share them, out of the caches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import autotune, launch_config
from .launch import Factors, Launch, common_arguments, compile_options, row_access, sizes_of
from .launch_config import Expand, Gpu
from .mask_stream import draw
from .tiles import (
    column_groups,
    columns,
    dot,
    lanes_first,
    lanes_last,
    last_word,
    load_share,
    load_wide,
    narrow,
    share,
    wide,
)

if TYPE_CHECKING:
    from lora_ortho.problem import Place


@triton.jit(
    do_not_specialize=[
        "tokens", "d_out", "base_stride", "base_column", "s_stride", "stream", "sample",
        "rotation", "row_offset", "group_offset",
    ]
)  # fmt: skip
def expand_kernel(
    y: tl.tensor,
    base: tl.tensor,
    s: tl.tensor,
    B: tl.tensor,
    table: tl.tensor,
    gains: tl.tensor,
    seed: tl.tensor,
    tokens: tl.tensor,
    d_out: tl.tensor,
    base_stride: tl.tensor,
    base_column: tl.tensor,
    s_stride: tl.tensor,
    stream: tl.tensor,
    sample: tl.tensor,
    rotation: tl.tensor,
    row_offset: tl.tensor,
    group_offset: tl.tensor,
    DRAW: tl.constexpr,
    K: tl.constexpr,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    SHIFT: tl.constexpr,
    VECTOR: tl.constexpr,
    S_VECTOR: tl.constexpr,
    BASE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    HOIST: tl.constexpr,
) -> None:
    """One program: BLOCK_M rows, TILES tiles of BLOCK_N columns.

    y (tokens, d_out) contiguous; base likewise in shape, row stride base_stride · VECTOR; s
    (tokens, Σr), row stride s_stride · S_VECTOR; B (K, d_out, WIDTH), zero beyond each rank; table
    (K, 4) int32: first and last of the draws as words, first column in s, rank. RANK is the rank of
    all adapters, or 0 where they differ. Columns are counted from col_offset rounded down to eight,
    SHIFT columns before the first of y.
    """
    tiles = tl.cdiv(d_out + SHIFT, BLOCK_N)
    spans = tl.cdiv(tiles, TILES)
    rows = (tl.program_id(0) // spans).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_tile = (tl.program_id(0) % spans) * TILES
    place = (tl.load(seed), stream, sample, rotation, row_offset, group_offset)
    y_rows = y + rows[:, None] * (d_out // VECTOR * VECTOR)
    base_row = base_stride * VECTOR
    s_stride = s_stride * S_VECTOR
    r = tl.arange(0, CHUNK)
    scaled = ()
    lasts = ()
    if HOIST:
        for j in tl.static_range(K):
            begin, rank = share(table, j, RANK)
            gain = tl.load(gains + j)
            scaled += (load_scaled(s, rows, tokens, s_stride, begin, rank, r, gain),)
            lasts += (last_word(table, j),)
    for tile in range(first_tile, min(first_tile + TILES, tiles)):
        cols, in_cols = columns(tile, d_out, SHIFT, VECTOR, BLOCK_N)
        inside = (rows < tokens)[:, None] & in_cols[None, :]
        if BASE:
            start = load_wide(base, rows, cols, inside, base_row, base_column, CONTIGUOUS)
        groups = column_groups(tile, BLOCK_N)
        lane = tl.arange(0, BLOCK_N)
        # the columns in the order of lanes_first
        n = tile * BLOCK_N - SHIFT + lane % (BLOCK_N // 8) * 8 + lane // (BLOCK_N // 8)
        in_B = ((n >= 0) & (n < d_out))[None, :]
        nothing = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        d = nothing
        u = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.uint32)
        if DRAW == "shared":
            u = lanes_first(draw(place, rows, groups, 0))
        if HOIST:
            for i in tl.static_range(1, K + 1):  # adapter K - i
                if DRAW == "own":
                    u = lanes_first(draw(place, rows, groups, K - i))
                B_j = B + d_out.to(tl.int64) * ((K - i) * WIDTH)
                tile_B = tl.load(B_j + n[None, :] * WIDTH + r[:, None], mask=in_B, other=0.0)
                product = dot(scaled[K - i], tile_B, nothing)
                d = combine(d, product, u, lasts[K - i], DRAW)
        else:
            for i in range(K):
                j = K - 1 - i
                if DRAW == "own":
                    u = lanes_first(draw(place, rows, groups, j))
                begin, rank = share(table, j, RANK)
                gain = tl.load(gains + j)
                last = last_word(table, j)
                B_j = B + d_out.to(tl.int64) * (j * WIDTH)
                product = nothing
                for c in range(0, rank, CHUNK):
                    s_c = load_scaled(s, rows, tokens, s_stride, begin, rank, c + r, gain)
                    B_c = B_j + n[None, :] * WIDTH + (c + r)[:, None]
                    tile_B = tl.load(B_c, mask=in_B, other=0.0)
                    product = dot(s_c, tile_B, product)
                d = combine(d, product, u, last, DRAW)
        d = lanes_last(d)
        if BASE:
            d += wide(start)
        tl.store(y_rows + cols[None, :], narrow(d, y.dtype.element_ty), mask=inside)


@triton.jit
def load_scaled(
    s: tl.tensor,
    rows: tl.tensor,
    tokens: tl.tensor,
    s_stride: tl.tensor,
    begin: tl.tensor,
    rank: tl.tensor,
    r: tl.tensor,
    gain: tl.tensor,
) -> tl.tensor:
    """gain · s of an adapter, columns r of its share: no product by the gain at each output."""
    tile = load_share(s, rows, tokens, s_stride, begin, rank, r)
    return narrow(wide(tile) * gain, tile.dtype)


@triton.jit
def combine(
    d: tl.tensor, product: tl.tensor, u: tl.tensor, last: tl.tensor, DRAW: tl.constexpr
) -> tl.tensor:
    """Adds one adapter's product to what the adapters after it gave."""
    if DRAW == "none":
        d += product
    elif DRAW == "own":
        d = tl.where(u <= last, d + product, d)
    else:  # last draws rise with the adapters: an earlier one overwrites the later
        d = tl.where(u <= last, product, d)
    return d


def expand(
    factors: Factors,
    gpu: Gpu,
    y: Tensor,
    base: Tensor | None,
    s: Tensor,
    gains: Tensor,
    seed: Tensor,
    place: Place,
) -> Launch:
    """The launch that fills y (tokens, d_out), contiguous, which may be ``base``; tokens > 0."""
    sizes = sizes_of(factors, y.shape[0])
    config = launch_config.expand(gpu, sizes)
    if autotune.enabled() and not y.is_meta:
        unread = torch.empty_like(y)

        def run(choice: Expand) -> None:
            _launch(choice, factors, gpu, unread, base, s, gains, seed, place).run()

        config = autotune.tuned(config, gpu, y.device, sizes, factors.draw, run)
    return _launch(config, factors, gpu, y, base, s, gains, seed, place)


def _launch(
    config: Expand,
    factors: Factors,
    gpu: Gpu,
    y: Tensor,
    base: Tensor | None,
    s: Tensor,
    gains: Tensor,
    seed: Tensor,
    place: Place,
) -> Launch:
    tokens, d_out = y.shape
    arguments, constants = common_arguments(factors, s, gains, seed, place)
    added = y if base is None else base
    row, column, vector = row_access(added, place, y)
    tiles = -(-(d_out + (place.col_offset & 7)) // config.block_n)
    programs = -(-tokens // config.block_m) * -(-tiles // config.tiles)
    arguments |= {"y": y, "base": added, "base_stride": row, "base_column": column}
    constants |= {
        "CHUNK": config.chunk,
        "VECTOR": vector,
        "BASE": base is not None,
        "CONTIGUOUS": column == 1,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "TILES": config.tiles,
        "HOIST": config.hoist,
    }
    options = compile_options(gpu, config.warps, config.max_registers)
    return Launch(expand_kernel, programs, arguments, constants, options)
