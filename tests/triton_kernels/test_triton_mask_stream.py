"""The mask stream of the Triton kernels, in the interpreter, against the golden files."""

from __future__ import annotations

import importlib

import pytest
import torch
from golden import golden_lines
from servers import interpreted

from lora_ortho import mask_stream
from lora_ortho.backends import cpu
from lora_ortho.problem import Place

pytestmark = interpreted()

M32 = (1 << 32) - 1


def draws(
    seed: int, row: int, rows: int, col: int, cols: int, stream: int, sample: int, lane_set: int,
    strata: int = 1,
) -> torch.Tensor:  # fmt: skip
    from lora_ortho.triton_kernels import mask_stream as kernels

    key = mask_stream.seed_tensor(seed)
    found: torch.Tensor = kernels.draws(
        key, rows, cols, Place(stream, sample, strata, row, col), lane_set
    )
    return found


def test_golden_blocks() -> None:
    lines = golden_lines("block")
    assert lines
    for arguments, results in lines:
        seed, stream, sample, lane_set, row, rows, col, cols = map(int, arguments)
        found = draws(seed, row, rows, col, cols, stream, sample, lane_set)
        assert found.flatten().tolist() == [int(word) for word in results]


def test_golden_draws() -> None:
    """Every line of both files: rows at 32-bit boundaries, negative seeds, every lane, offsets."""
    lines = golden_lines("draw")
    assert len(lines) == 722 + 268
    for arguments, results in lines:
        seed, stream, sample, lane_set, row, col = map(int, arguments)
        found = draws(seed, row, 1, col, 1, stream, sample, lane_set)
        assert found.tolist() == [[int(results[0])]], arguments


def test_golden_strata() -> None:
    lines = golden_lines("strata")
    assert len(lines) == 114
    for arguments, results in lines:
        seed, stream, sample, strata, lane_set, row, col = map(int, arguments)
        found = draws(seed, row, 1, col, 1, stream, sample, lane_set, strata)
        assert found.tolist() == [[int(results[0])]], arguments


@pytest.mark.parametrize(
    ("row", "col", "place"),
    [
        (0, 0, (0, 0, 0, 1)),
        (M32 - 999, (1 << 35) - 1029, (M32, (1 << 24) - 1, 255, 65536)),
        ((1 << 31) - 500, (1 << 32) - 500, (1 << 31, 1 << 23, 128, 1)),
        (12345, 678901, (7, 5, 3, 4)),
    ],
)
def test_a_million_draws_equal_those_of_the_cpu(
    row: int, col: int, place: tuple[int, int, int, int]
) -> None:
    """And those of Python, where nothing was compiled: the same bits by test_mask_stream.py."""
    rows, cols, seed = 1000, 1029, -0x123456789ABCDEF
    found = draws(seed, row, rows, col, cols, *place)
    stream, sample, lane_set, strata = place
    if cpu.unavailable() is None:
        _C = importlib.import_module("lora_ortho._C")
        wanted = torch.empty((rows, cols), dtype=torch.int16)
        key = seed % (1 << 64)
        at = (stream, sample, strata, lane_set)
        _C.draws(key, row, rows, col, cols, *at, wanted.data_ptr())
        assert torch.equal(found.to(torch.int16), wanted)
    else:
        spans = range(row, row + rows), range(col, col + cols)
        drawn = mask_stream.draws(
            seed, *spans, stream=stream, sample=sample, strata=strata, lane_set=lane_set
        )
        assert torch.equal(found, drawn)
