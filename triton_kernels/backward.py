"""What the two kernels of the gradients share; ``grad_s`` and ``grad_B`` hold them.

With g_j = m_j ⊙ grad, masks drawn again, and u_j = g_j B_j: grad_s_j = gain_j u_j, grad_gain_j =
Σ s_j ⊙ u_j and grad_B_j = gain_j g_jᵀ s_j. One kernel sums over columns, one over rows; grad_x =
grad_s A and grad_A = grad_sᵀ x are the library's products. Nothing is added atomically: parts of a
sum lie side by side and are added in order by a second step.

Bytes that must move, with e bytes an element: grad e·tokens·d_out, once for each kernel and group
of adapters; s and grad_s e·tokens·Σr each; B and grad_B e·d_out·Σr each. Parts add 8·Σr·tokens to
grad_s, or 8·Σr·d_out to grad_B, for each part. One kernel that reads grad once would have to write
a part of grad_s for every BLOCK_N columns, 8·Σr / BLOCK_N bytes an element; a second reading is e
bytes, less unless BLOCK_N ≥ 8·Σr / e (192 columns for three adapters of rank 16 in bfloat16, whose
grad_B alone fills the registers of a program).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from .launch import Factors, common_arguments, row_access
from .launch_config import Backward
from .mask_stream import draw
from .tiles import first_word, last_word

if TYPE_CHECKING:
    from lora_ortho.problem import Place

# Arguments of both kernels that differ from call to call.
PLAIN = [
    "tokens", "d_out", "grad_stride", "grad_column", "s_stride", "stream", "sample",
    "rotation", "row_offset", "group_offset", "tiles", "parts",
]  # fmt: skip


@triton.jit
def group_of(
    K: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr
) -> tl.tensor:
    """A program's group of adapters, its chunk of their ranks, and its place beside those."""
    CHUNKS: tl.constexpr = WIDTH // CHUNK
    UNITS: tl.constexpr = (K + GROUP - 1) // GROUP * CHUNKS
    group = tl.program_id(0) % UNITS // CHUNKS
    chunk = tl.program_id(0) % CHUNKS
    return group, chunk, tl.program_id(0) // UNITS


@triton.jit
def member(group: tl.tensor, i: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr) -> tl.tensor:
    """The adapter i of a group, and whether there is one: the last group may not be full."""
    j = group * GROUP + i
    return tl.minimum(j, K - 1), j < K


@triton.jit
def zeros(GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> tl.tuple:
    """A sum of nothing for each adapter of a group."""
    sums = ()
    for _i in tl.static_range(GROUP):
        sums += (tl.zeros([ROWS, COLUMNS], dtype=tl.float32),)
    return sums


@triton.jit
def draw_tile(
    place: tl.tuple, rows: tl.tensor, groups: tl.tensor, lane_set: tl.tensor
) -> tl.tensor:
    """Draws of a tile (BLOCK_M, BLOCK_N) in column order."""
    u = draw(place, rows, groups, lane_set)
    return tl.reshape(u, [rows.shape[0], 8 * groups.shape[0]])


@triton.jit
def masked(
    tile: tl.tensor, u: tl.tensor, table: tl.tensor, j: tl.tensor, DRAW: tl.constexpr
) -> tl.tensor:
    """m_j ⊙ tile."""
    if DRAW == "none":
        kept = tile
    else:
        first, last = first_word(table, j), last_word(table, j)
        kept = tl.where((u >= first) & (u <= last), tile, 0.0)
    return kept


def split(tiles: int, parts: int) -> tuple[int, int]:
    """The parts into which tiles fall, none of them empty, and the tiles of each but the last."""
    each = -(-tiles // parts)
    return -(-tiles // each), each


def units(factors: Factors, config: Backward) -> int:
    """Programs that share a tile of grad: groups of adapters times chunks of ranks."""
    K, _, width = factors.B.shape
    return -(-K // config.group) * (width // config.chunk)


def grad_arguments(
    factors: Factors,
    config: Backward,
    grad: Tensor,
    s: Tensor,
    gains: Tensor,
    seed: Tensor,
    place: Place,
) -> tuple[dict[str, object], dict[str, object]]:
    """The arguments and constants of both kernels, all but what they write and ``PLAIN``'s last."""
    arguments, constants = common_arguments(factors, s, gains, seed, place)
    row, column, vector = row_access(grad, place)
    arguments |= {"grad": grad, "grad_stride": row, "grad_column": column}
    constants |= {
        "CHUNK": config.chunk,
        "GROUP": config.group,
        "VECTOR": vector,
        "CONTIGUOUS": column == 1,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    return arguments, constants
