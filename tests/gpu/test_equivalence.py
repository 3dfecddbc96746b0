"""Every backend on the device: the case table under the rule of numerics.py, and every mask."""

from __future__ import annotations

import pytest
import spelled
import torch
from cases import CHECKED, METHODS, Case, make, same_rank
from numerics import assert_as_good, expected, masks_of, run
from on_device import REHEARSAL, back, move

from lora_ortho import fused_ortho_lora, mask_stream
from lora_ortho.backends import triton
from lora_ortho.problem import Place

SEED = -0x123456789ABCDEF
PLACE = {"stream": 3, "sample": 2, "row_offset": 5, "col_offset": 11}
DTYPES = (torch.bfloat16, torch.float32, torch.float16)[: 1 if REHEARSAL else 3]
LARGE = (same_rank(1000, 512, 1032, 3, 16), same_rank(513, 256, 2048, 8, 64))
SMALL = [case for case in CHECKED if case.tokens * case.d_out * len(case.ranks) < 9000]
CASES = SMALL[::4] if REHEARSAL else (*CHECKED, *LARGE)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_case_table(device: torch.device, backend: str, method: str, case: Case) -> None:
    """Output and all gradients; one test for all dtypes."""
    for dtype in DTYPES:
        tensors = make(case, dtype)
        masks, keep = masks_of(case, method, SEED, **PLACE)
        scaling = [0.5 + 0.25 * (j % 3) for j in range(len(case.ranks))]
        ours = run(
            fused_ortho_lora, move(tensors, case, device), p=case.p, scaling=scaling,
            method=method, seed=SEED, backend=backend, **PLACE,
        )  # fmt: skip
        assert_as_good(back(ours), expected(tensors, masks, keep, scaling))


@pytest.mark.parametrize("place", spelled.PLACES[:: 2 if REHEARSAL else 1], ids=str)
@pytest.mark.parametrize("method", ["orthogonal", "dropout"])
def test_every_mask(device: torch.device, backend: str, method: str, place: dict[str, int]) -> None:
    """Outputs spell out who owns an element, as in spelled.py."""
    shapes = spelled.SHAPES[:2] if REHEARSAL else spelled.SHAPES
    for number, (adapters, rank) in enumerate(shapes):
        tokens, d_out, seed = 1 + 9 * number, 269 - number, spelled.SEEDS[number]
        p = spelled.rates(method, adapters)
        for dtype in DTYPES:
            lora_A, lora_B, keep, limits = spelled.spelled(method, adapters, rank, d_out, dtype, p)
            factors = [[t.to(device) for t in group] for group in (lora_A, lora_B)]
            x = torch.ones(tokens, 1, dtype=dtype, device=device)
            y = fused_ortho_lora(
                x, *factors, p=p, scaling=keep, method=method, seed=seed, backend=backend, **place
            )
            wanted = spelled.codes(seed, tokens, d_out, limits, method, place)
            assert torch.equal(y.cpu().double(), wanted)


@pytest.mark.parametrize("case", SMALL[-1:] if REHEARSAL else LARGE, ids=str)
def test_the_same_call_gives_the_same_bits(device: torch.device, backend: str, case: Case) -> None:
    for dtype in DTYPES:
        tensors = move(make(case, dtype), case, device)
        first, second = (run(fused_ortho_lora, tensors, seed=9, backend=backend) for _ in "ab")
        for a, b in zip(first, second, strict=True):
            pairs = zip(a, b, strict=True) if isinstance(a, list) else [(a, b)]
            assert all(u is v or torch.equal(u, v) for u, v in pairs)


def test_a_hundred_million_draws(device: torch.device) -> None:
    """Triton's stream against Python's, at odd corners; fewer in a rehearsal."""
    if triton.unavailable() is not None:
        pytest.skip(f"the triton kernels cannot run: {triton.unavailable()}")
    from lora_ortho.triton_kernels import mask_stream as kernels

    rows, cols, blocks = (200, 501, 4) if REHEARSAL else (2500, 4001, 10)
    for block in range(blocks):
        seed = mask_stream.seed_tensor((-1) ** block * (block << 55) + block, device)
        row = ((1 << 32) - rows) * block // blocks
        col = ((1 << 35) - cols) * block // blocks
        at = {"stream": block << 28, "sample": (block << 20) + block, "strata": 1 + 7 * block}
        spans, lane_set = (range(row, row + rows), range(col, col + cols)), 25 * block
        found = kernels.draws(
            seed, rows, cols, Place(**at, row_offset=row, col_offset=col), lane_set
        )
        assert torch.equal(found, mask_stream.draws(seed, *spans, **at, lane_set=lane_set))
