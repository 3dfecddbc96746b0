"""The mask stream in Python against its golden files, and against the compiled one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from golden import GOLDEN, golden_lines

from lora_ortho import mask_stream
from lora_ortho.backends import cpu

needs_kernels = pytest.mark.skipif(
    cpu.unavailable() is not None, reason=f"no compiled kernels: {cpu.unavailable()}"
)


def test_the_golden_file_is_what_its_generator_prints() -> None:
    command = [sys.executable, str(GOLDEN / "generate.py"), "--print"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == (GOLDEN / "mask_stream.kat").read_text()


def test_golden_philox() -> None:
    lines = golden_lines("philox")
    assert len(lines) == 3
    for arguments, results in lines:
        words = [torch.tensor(int(word, 16)) for word in arguments]
        found = mask_stream.philox(words[:4], words[4:])
        assert [f"{int(word):08x}" for word in found] == results


def test_golden_draws() -> None:
    lines = golden_lines("draw")
    assert len(lines) == 722 + 268
    for arguments, results in lines:
        seed, stream, sample, lane_set, row, col = map(int, arguments)
        found = mask_stream.draws(
            seed, [row], [col], stream=stream, sample=sample, lane_set=lane_set
        )
        assert found.tolist() == [[int(results[0])]], arguments
    assert {int(arguments[3]) for arguments, _ in lines} == set(range(256))


def test_golden_strata() -> None:
    lines = golden_lines("strata")
    assert len(lines) == 114
    for arguments, results in lines:
        seed, stream, sample, strata, lane_set, row, col = map(int, arguments)
        found = mask_stream.draws(
            seed, [row], [col], stream=stream, sample=sample, strata=strata, lane_set=lane_set
        )
        assert found.tolist() == [[int(results[0])]], arguments
    assert {int(arguments[3]) for arguments, _ in lines} >= {1, 2, 3, 65535, 65536}


def test_golden_blocks() -> None:
    for arguments, results in golden_lines("block"):
        seed, stream, sample, lane_set, row, rows, col, cols = map(int, arguments)
        found = mask_stream.draws(
            seed,
            range(row, row + rows),
            range(col, col + cols),
            stream=stream,
            sample=sample,
            lane_set=lane_set,
        )
        assert found.shape == (rows, cols)
        assert found.flatten().tolist() == [int(word) for word in results]


@pytest.mark.parametrize(
    ("directive", "method"), [("thresholds", "orthogonal"), ("dropout", "dropout")]
)
def test_golden_thresholds(directive: str, method: str) -> None:
    lines = golden_lines(directive)
    assert lines
    for arguments, results in lines:
        p = [float(word) for word in arguments]
        found, keep = mask_stream.thresholds(p, method)
        assert found == [int(word) for word in results]
        low = [0, *found[:-1]] if method == "orthogonal" else [0] * len(found)
        assert keep == [(t - b) / 65536 for t, b in zip(found, low, strict=True)]


def test_golden_owners() -> None:
    lines = golden_lines("owner")
    assert lines
    for (u, *thresholds), (owner,) in lines:
        found = mask_stream.owners(torch.tensor([int(u)]), [int(T) for T in thresholds])
        assert found.tolist() == [int(owner)]


def test_direct_draws_nothing() -> None:
    assert mask_stream.thresholds([0.5, 0.1, 0.9], "direct") == ([65536] * 3, [1.0] * 3)
    masks = mask_stream.masks(0, range(3), range(5), [65536] * 2, "direct")
    assert [m.shape for m in masks] == [(3, 5)] * 2
    assert all(bool(m.all()) for m in masks)


def test_rows_and_columns_may_be_ranges_sequences_or_tensors() -> None:
    whole = mask_stream.draws(7, range(100), range(64), stream=3, sample=4, lane_set=5)
    rows, cols = [97, 3, 3, 50], [63, 0, 8, 7, 9]
    expected = whole[rows][:, cols]
    place = {"stream": 3, "sample": 4, "lane_set": 5}
    assert torch.equal(mask_stream.draws(7, rows, cols, **place), expected)
    pair = (torch.tensor(rows, dtype=torch.int32), torch.tensor(cols, dtype=torch.uint8))
    assert torch.equal(mask_stream.draws(torch.tensor([7]), *pair, **place), expected)
    back = range(90, 10, -7)
    stepped = mask_stream.draws(7, back, range(1, 64, 3), **place)
    assert torch.equal(stepped, whole[list(back)][:, 1::3])
    assert expected.dtype == torch.int32


@pytest.mark.parametrize(("rows", "cols"), [(0, 5), (5, 0), (0, 0)])
def test_empty_draws(rows: int, cols: int) -> None:
    assert mask_stream.draws(0, range(rows), range(cols)).shape == (rows, cols)
    assert mask_stream.draws(0, [0] * rows, [0] * cols).shape == (rows, cols)


def test_signed_and_unsigned_seeds_are_the_same_64_bits() -> None:
    pairs = [(-1, (1 << 64) - 1), (-(1 << 63), 1 << 63)]
    for signed, unsigned in pairs:
        first, second = (mask_stream.draws(s, range(3), range(9)) for s in (signed, unsigned))
        assert torch.equal(first, second)
        assert torch.equal(mask_stream.draws(torch.tensor(signed), range(3), range(9)), first)


def test_winners_are_the_first_thresholds_above_the_draws() -> None:
    p = [0.75, 0.5, 0.8]
    thresholds, _ = mask_stream.thresholds(p, "orthogonal")
    u = mask_stream.draws(5, range(40), range(50), stream=2, sample=3)
    found = mask_stream.winners(5, range(40), range(50), p, stream=2, sample=3)
    expected = [
        [next((j for j, T in enumerate(thresholds) if v < T), -1) for v in row]
        for row in u.tolist()
    ]
    assert found.dtype == torch.int64
    assert found.tolist() == expected
    assert set(found.unique().tolist()) == {-1, 0, 1, 2}


@needs_kernels
def test_python_and_compiled_draws_agree_on_a_hundred_million() -> None:
    """In 100 blocks of 500 x 2000, at odd corners of every coordinate."""
    from lora_ortho import _C

    torch.set_num_threads(2)
    height, width, compared = 500, 2000, 0
    numbers = torch.Generator().manual_seed(11)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=numbers))

    for block in range(100):
        seed = below(1 << 62) * (-1 if block % 2 else 1)
        row, col = below((1 << 32) - height), below((1 << 35) - width)
        stream, sample, lane_set = below(1 << 32), below(1 << 24), below(1 << 8)
        strata = 1 + below(1 << 16) * (block % 2)
        if block == 0:
            row, col, stream, sample, lane_set = 0, 0, 0, 0, 0
        if block == 1:
            row, col, stream = (1 << 32) - height, (1 << 35) - width, (1 << 32) - 1
            sample, lane_set = (1 << 24) - 1, 255
        if block == 2:
            row, col = (1 << 31) - height // 2, (1 << 32) - width // 2
        compiled = torch.empty((height, width), dtype=torch.int16)
        key = seed % (1 << 64)
        place = (stream, sample, strata, lane_set)
        _C.draws(key, row, height, col, width, *place, compiled.data_ptr())
        drawn = mask_stream.draws(
            seed,
            range(row, row + height),
            range(col, col + width),
            stream=stream,
            sample=sample,
            strata=strata,
            lane_set=lane_set,
        )
        assert torch.equal(drawn.to(torch.int16), compiled)
        compared += compiled.numel()
    assert compared == 10**8


@needs_kernels
def test_compiled_thresholds_agree() -> None:
    from lora_ortho import _C

    lists = [[float(w) for w in line[0]] for line in golden_lines("thresholds")]
    for p in lists:
        for method in ("orthogonal", "dropout", "direct"):
            assert _C.thresholds(method, p) == mask_stream.thresholds(p, method)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rows": [1 << 32]}, ValueError, r"rows must be in \[0, 2\*\*32\), got 4294967296"),
        ({"rows": range(-1, 3)}, ValueError, r"rows must be in .*, got -1"),
        ({"rows": torch.tensor([0, -5])}, ValueError, r"rows must be in .*, got -5"),
        ({"rows": [0.5]}, TypeError, "rows must hold integers, got torch.float32"),
        ({"rows": [[1]]}, ValueError, r"rows must have one dimension, got shape \(1, 1\)"),
        ({"cols": range((1 << 35) + 1)}, ValueError, r"cols must be in \[0, 2\*\*35\)"),
        ({"stream": 1 << 32}, ValueError, r"stream must be in \[0, 2\*\*32\), got 4294967296"),
        ({"stream": -1}, ValueError, "stream must be in .*, got -1"),
        ({"stream": 0.0}, TypeError, "stream must be an int, got float"),
        ({"sample": 1 << 24}, ValueError, r"sample must be in \[0, 2\*\*24\), got 16777216"),
        ({"lane_set": 256}, ValueError, r"lane_set must be in \[0, 2\*\*8\), got 256"),
        ({"seed": 1 << 64}, ValueError, "seed must fit in 64 bits, got 18446744073709551616"),
        ({"seed": -(1 << 63) - 1}, ValueError, "seed must fit in 64 bits"),
        ({"seed": 1.0}, TypeError, "seed must be an int or an int64 tensor, got float"),
        ({"seed": True}, TypeError, "seed must be an int or an int64 tensor, got bool"),
        ({"seed": torch.tensor(1.0)}, TypeError, "seed must be an int64 tensor, got torch.float32"),
        ({"seed": torch.tensor([1, 2])}, ValueError, r"seed must have one element, got shape \(2,"),
    ],
)
def test_arguments_out_of_range(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        mask_stream.draws(**{"seed": 0, "rows": [0], "cols": [0], **arguments})


@pytest.mark.parametrize(
    ("p", "method", "message"),
    [
        ([0.5, 0.5, 0.5], "orthogonal", r"p: .* sum to at most 1, got 1.5; .* 3 equal adapters is "
                                        r"1 - 1/3 = 0.666666666667"),
        ([2 / 3 - 1e-9] * 3, "orthogonal", "sum to at most 1, got 1.000000003;"),
        ([0.0, 1.0], "dropout", r"p\[1\] must be a dropout rate in \[0, 1\), got 1.0"),
        ([-0.1], "dropout", r"p\[0\] must be a dropout rate in \[0, 1\), got -0.1"),
        ([float("nan")], "direct", r"p\[0\] must be a dropout rate in \[0, 1\), got nan"),
        ([0.9, 0.999999], "orthogonal", r"p\[1\] is too close to 1: .* got 0.999999"),
        ([0.999999], "dropout", r"p\[0\] is too close to 1"),
        ([0.5], "mean", 'method must be "orthogonal", "dropout" or "direct", got \'mean\''),
    ],
)  # fmt: skip
def test_rates_out_of_range(p: list[float], method: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mask_stream.thresholds(p, method)


def test_a_sum_that_rounds_to_just_above_one_counts_as_one() -> None:
    for count in (3, 6, 7, 49):
        p = [(count - 1) / count] * count
        thresholds, _ = mask_stream.thresholds(p, "orthogonal")
        assert thresholds[-1] == 65536
    assert sum(1 - rate for rate in [6 / 7] * 7) > 1
