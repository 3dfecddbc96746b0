"""Steps on one tile that the kernels share.

Triton's interpreter truncates where it should round to bfloat16, and multiplies bfloat16 matrices
as the integers of the same bits. :func:`wide`, :func:`narrow` and :func:`dot` do there what the
compiled kernels do: bfloat16 products are exact in float32 either way.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"))


@triton.jit
def wide(tile: tl.tensor) -> tl.tensor:
    """A tile in float32."""
    if _INTERPRETED and tile.dtype == tl.bfloat16:
        result = (tile.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        result = tile.to(tl.float32)
    return result


@triton.jit
def narrow(tile: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """A float32 tile in another dtype, rounded to the nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = tile.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(tile == tile, rounded, 0x7FC0)
        result = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = tile.to(dtype)
    return result


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, total: tl.tensor) -> tl.tensor:
    """total + a b in float32; float32 operands are not cut to tf32."""
    if _INTERPRETED:
        a, b = wide(a), wide(b)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def columns(
    tile: tl.tensor,
    d_out: tl.tensor,
    SHIFT: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """A tile's columns, and whether each lies inside; tile 0 starts SHIFT columns too early."""
    cols = tile * BLOCK_N - SHIFT + tl.arange(0, BLOCK_N)
    return cols, tl.max_constancy((cols >= 0) & (cols < d_out), VECTOR)


@triton.jit
def column_groups(tile: tl.tensor, BLOCK_N: tl.constexpr) -> tl.tensor:
    """A tile's groups of eight columns, as the mask stream counts them from the first tile on."""
    return tile * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)


@triton.jit
def first_word(table: tl.tensor, j: tl.tensor) -> tl.tensor:
    """The lowest word whose upper half is a draw of adapter j."""
    return tl.load(table + 4 * j).to(tl.uint32, bitcast=True)


@triton.jit
def last_word(table: tl.tensor, j: tl.tensor) -> tl.tensor:
    """The highest word whose upper half is a draw of adapter j."""
    return tl.load(table + 4 * j + 1).to(tl.uint32, bitcast=True)


@triton.jit
def share(table: tl.tensor, j: tl.tensor, RANK: tl.constexpr) -> tl.tensor:
    """Where adapter j's columns of s begin, and its rank; RANK is that of all, or 0."""
    if RANK:
        begin, rank = j * RANK, RANK
    else:
        begin, rank = tl.load(table + 4 * j + 2), tl.load(table + 4 * j + 3)
    return begin, rank


@triton.jit
def load_share(
    s: tl.tensor,
    rows: tl.tensor,
    tokens: tl.tensor,
    s_stride: tl.tensor,
    begin: tl.tensor,
    rank: tl.tensor,
    r: tl.tensor,
) -> tl.tensor:
    """Columns r of an adapter's share of s, zero from its rank on; (BLOCK_M, CHUNK)."""
    inside = (rows < tokens)[:, None] & (r < rank)[None, :]
    return tl.load(s + rows[:, None] * s_stride + (begin + r)[None, :], mask=inside, other=0.0)


@triton.jit
def load_wide(
    matrix: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    inside: tl.tensor,
    stride: tl.tensor,
    column: tl.tensor,
    CONTIGUOUS: tl.constexpr,
) -> tl.tensor:
    """A tile of a matrix (tokens, d_out) of any strides, zero outside; (BLOCK_M, BLOCK_N)."""
    at = matrix + rows[:, None] * stride
    if CONTIGUOUS:
        at += cols[None, :]
    else:
        at += (cols.to(tl.int64) * column)[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def lanes_first(tile: tl.tensor) -> tl.tensor:
    """(BLOCK_M, GROUPS, 8) → (BLOCK_M, 8 · GROUPS), all of lane 0 first: the order of the dots.

    A thread of an mma accumulator then holds all eight lanes of a group, so that the way back to
    eight neighbouring columns moves nothing between threads.
    """
    shape: tl.constexpr = tile.shape
    return tl.reshape(tl.permute(tile, (0, 2, 1)), [shape[0], 8 * shape[1]])


@triton.jit
def lanes_last(tile: tl.tensor) -> tl.tensor:
    """(BLOCK_M, BLOCK_N) in the order of :func:`lanes_first` → the same in column order."""
    shape: tl.constexpr = tile.shape
    split = tl.reshape(tile, [shape[0], 8, shape[1] // 8])
    return tl.reshape(tl.permute(split, (0, 2, 1)), [shape[0], shape[1]])
