"""The mask stream in Triton: Philox4x32-7 with four explicit 32-bit counters (MASK_STREAM.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from lora_ortho.problem import Place

ROUNDS = tl.constexpr(7)


@triton.jit
def draw(place: tl.tuple, rows: tl.tensor, groups: tl.tensor, lane_set: tl.tensor) -> tl.tensor:
    """Draws of BLOCK_M rows and 8 · GROUPS columns, each in the upper half of a uint32.

    Args:
        place: of row 0 and group 0 in the mask stream: seed (int64), stream, sample (the number of
            its block of strata), rotation, row and group, integers of any width taken mod 2**32.
        rows: (BLOCK_M,) token indices.
        groups: (GROUPS,) column indices, divided by eight.
        lane_set: int scalar.
    Returns:
        uint32 (BLOCK_M, GROUPS, 8): the draw is the upper half, the lower half is arbitrary.
    """
    seed, stream, sample, rotation, row, group = place
    rows += row
    groups += group
    zero = tl.zeros([rows.shape[0], groups.shape[0]], dtype=tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed,
        zero + groups.to(tl.uint32)[None, :],
        zero + rows.to(tl.uint32)[:, None],
        zero + stream.to(tl.uint32),
        zero + ((sample.to(tl.uint32) << 8) | lane_set),
        ROUNDS,
    )
    # lane = 4 i1 + 2 i0 + half; the axis joined last runs fastest
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (BLOCK_M, GROUPS, i1, i0)
    turn = rotation.to(tl.uint32) << 16
    words += turn  # the upper draw; the lower one has no part in the sum
    halves = tl.join((words << 16) + turn, words)  # (BLOCK_M, GROUPS, i1, i0, half)
    return tl.reshape(halves, [rows.shape[0], groups.shape[0], 8])


@triton.jit(
    do_not_specialize=[
        "rows", "groups", "stream", "sample", "rotation", "row", "group", "lane_set",
    ]
)  # fmt: skip
def draws_kernel(
    out: tl.tensor,
    seed: tl.tensor,
    rows: tl.tensor,
    groups: tl.tensor,
    stream: tl.tensor,
    sample: tl.tensor,
    rotation: tl.tensor,
    row: tl.tensor,
    group: tl.tensor,
    lane_set: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
) -> None:
    """out (rows, 8 · groups) int32: the draws from (row, 8 · group) on; one block a program."""
    blocks = tl.cdiv(groups, BLOCK_G)
    m = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    g = (tl.program_id(0) % blocks) * BLOCK_G + tl.arange(0, BLOCK_G)
    u = draw((tl.load(seed), stream, sample, rotation, row, group), m, g, lane_set)
    cols = g[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = (m < rows)[:, None, None] & (g < groups)[None, :, None]
    tl.store(out + m[:, None, None] * (groups * 8) + cols[None], (u >> 16).to(tl.int32), inside)


def signed(word: int) -> int:
    """A 32-bit word as the int32 of the same bits, the one type in which words reach kernels."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def draws(seed: Tensor, rows: int, cols: int, place: Place, lane_set: int) -> Tensor:
    """``lora_ortho.mask_stream.draws`` of so many rows and columns from those of the place on:
    int32 (rows, cols), on the device of ``seed``."""
    first, shift = place.col_offset >> 3, place.col_offset & 7
    groups = (shift + cols + 7) >> 3
    out = torch.empty((rows, 8 * groups), dtype=torch.int32, device=seed.device)
    at = (signed(place.stream), place.block, place.rotation, signed(place.row_offset))
    if rows and cols:
        grid = (triton.cdiv(rows, 16) * triton.cdiv(groups, 64),)
        draws_kernel[grid](
            out, seed, rows, groups, *at, signed(first), lane_set, BLOCK_M=16, BLOCK_G=64
        )
    return out[:, shift : shift + cols]
