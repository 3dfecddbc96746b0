"""Outputs and gradients that spell out who owns an element, and what they should be.

Factors are chosen so that all products are powers of two or small integers, which every dtype
holds exactly.
"""

from __future__ import annotations

import torch
from servers import Server
from torch import Tensor

from lora_ortho import fused_ortho_lora, mask_stream

PLACES = [
    {},
    {"row_offset": 3, "col_offset": 5},
    {"stream": (1 << 32) - 1, "sample": (1 << 24) - 1, "row_offset": (1 << 32) - 40},
    {"stream": 1, "sample": 256, "col_offset": (1 << 35) - 300, "row_offset": (1 << 31) - 7},
    {"col_offset": (1 << 32) - 9},
    {"stream": 5, "sample": 7, "strata": 4, "col_offset": 1},
    {"sample": (1 << 24) - 1, "strata": 65535, "row_offset": 12, "col_offset": 80},
]
# The coordinates that are the same everywhere in a call.
FIXED = ("stream", "sample", "strata")
SEEDS = [0, -1, -(1 << 63), 0x0123456789ABCDEF, (1 << 64) - 12345]
# adapters and rank: both sides of any choice between all products and the owner's alone
SHAPES = [(1, 1), (2, 4), (3, 16), (7, 3), (8, 32)]


def spelled(
    method: str, adapters: int, rank: int, d_out: int, dtype: torch.dtype, p: list[float]
) -> tuple[list[Tensor], list[Tensor], list[float], list[int]]:
    """Factors and scalings with which x = 1 gives the sum of 2**j over the adapters that act."""
    thresholds, keep = mask_stream.thresholds(p, method)
    lora_A, lora_B = [], []
    for j in range(adapters):
        A, B = torch.zeros(rank, 1, dtype=dtype), torch.zeros(d_out, rank, dtype=dtype)
        A[j % rank] = 1
        B[:, j % rank] = 2.0**j
        lora_A.append(A)
        lora_B.append(B)
    return lora_A, lora_B, keep, thresholds


def rates(method: str, adapters: int) -> list[float]:
    """Unequal rates, with keep probabilities that leave some elements to nobody."""
    shares = [1.0 + j for j in range(adapters)]
    total = sum(shares) * 1.25
    if method == "orthogonal":
        return [1 - share / total for share in shares]
    return [0.1 + 0.8 * j / adapters for j in range(adapters)]


def codes(
    seed: int, tokens: int, d_out: int, thresholds: list[int], method: str, place: dict
) -> Tensor:
    """What the spelled factors should give, from the mask stream."""
    row, col = place.get("row_offset", 0), place.get("col_offset", 0)
    masks = mask_stream.masks(
        seed,
        range(row, row + tokens),
        range(col, col + d_out),
        thresholds,
        method,
        **{name: place[name] for name in FIXED if name in place},
    )
    return sum(mask.double() * 2.0**j for j, mask in enumerate(masks))


def check_forward(server: Server, dtype: torch.dtype, method: str, place: dict) -> None:
    for number, (adapters, rank) in enumerate(SHAPES):
        tokens, d_out, seed = 1 + 9 * number, 269 - number, SEEDS[number]
        p = rates(method, adapters)
        lora_A, lora_B, keep, thresholds = spelled(method, adapters, rank, d_out, dtype, p)
        y = fused_ortho_lora(
            torch.ones(tokens, 1, dtype=dtype), lora_A, lora_B, p=p, scaling=keep,
            method=method, seed=seed, backend=server.backend, **place,
        )  # fmt: skip
        assert torch.equal(y.double(), codes(seed, tokens, d_out, thresholds, method, place))


def check_backward(server: Server, dtype: torch.dtype, method: str, place: dict) -> None:
    """Row m of x is 2**m, so with a gradient of ones element n of grad_B_j spells in binary in
    which rows adapter j owns column n."""
    for number, (adapters, rank) in enumerate(SHAPES):
        tokens, d_out, seed = 5 + 2 * number, 261 + number, SEEDS[number]
        p = rates(method, adapters)
        wide = torch.float64 if dtype == torch.float64 else torch.float32  # of the gradients
        lora_A, lora_B, keep, thresholds = spelled(method, adapters, rank, d_out, wide, p)
        leaves = [t.requires_grad_() for t in (*lora_A, *lora_B)]
        x = (2.0 ** torch.arange(tokens)).to(dtype)[:, None]
        y = fused_ortho_lora(
            x, lora_A, lora_B, p=p, scaling=keep, method=method, seed=seed,
            backend=server.backend, **place,
        )  # fmt: skip
        y.backward(torch.ones_like(y))
        row, col = place.get("row_offset", 0), place.get("col_offset", 0)
        masks = mask_stream.masks(
            seed, range(row, row + tokens), range(col, col + d_out), thresholds, method,
            **{name: place[name] for name in FIXED if name in place},
        )  # fmt: skip
        for j, mask in enumerate(masks):
            expected = torch.zeros(d_out, rank, dtype=torch.float64)
            expected[:, j % rank] = (mask.double() * x.double()).sum(0)
            assert torch.equal(leaves[adapters + j].grad.double(), expected)


def check_halves(server: Server, dtype: torch.dtype, method: str) -> None:
    """Split between rows and between columns, at places that fit no tile."""
    p = rates(method, 3)
    lora_A, lora_B, keep, _ = spelled(method, 3, 2, 333, dtype, p)
    x = torch.ones(70, 1, dtype=dtype)

    def call(rows: slice, cols: slice) -> Tensor:
        return fused_ortho_lora(
            x[rows], lora_A, [B[cols] for B in lora_B], p=p, scaling=keep, method=method,
            seed=8, row_offset=4 + (rows.start or 0), col_offset=9 + (cols.start or 0),
            backend=server.backend,
        )  # fmt: skip

    everything = slice(None)
    whole = call(everything, everything)
    assert len(whole.unique()) > 3
    for cut in (1, 33, 64, 69):
        halves = [call(slice(0, cut), everything), call(slice(cut, 70), everything)]
        assert torch.equal(torch.cat(halves), whole)
    for cut in (1, 128, 131, 328):
        halves = [call(everything, slice(0, cut)), call(everything, slice(cut, 333))]
        assert torch.equal(torch.cat(halves, dim=1), whole)
