"""Writes mask_stream.kat from MASK_STREAM.md, in plain Python integers and floats.

It shares nothing with the package, so that the two check each other. Run from anywhere:

    python tests/golden/generate.py          writes mask_stream.kat beside this file
    python tests/golden/generate.py --print  prints it
"""

from __future__ import annotations

import math
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

TARGET = Path(__file__).with_name("mask_stream.kat")

HEADER = """\
# Mask stream, version 1: known answers. Written by generate.py beside this file; do not edit.
# One case a line, fields separated by blanks, arguments before "->" and results after it.
# All numbers are decimal, but those of philox lines, which are 32-bit words in hexadecimal.
#   philox c0 c1 c2 c3 k0 k1 -> o0 o1 o2 o3            7 rounds of Philox4x32: counter, key, output
#   draw seed stream sample lane_set row col -> u      one draw; seed is signed 64-bit
#   block seed stream sample lane_set row_offset rows col_offset cols -> u ...
#                                                      rows x cols draws from an offset, row-major
#   thresholds p_1 .. p_K -> T_1 .. T_K                cumulative, for the orthogonal method
#   dropout p_1 .. p_K -> T_1 .. T_K                   one per adapter, for independent dropout
#   owner u T_1 .. T_K -> j                            first j with u < T_j, counted from 0, or -1
#   keep u T -> 0 or 1                                 u < T
"""

WORD = 0xFFFFFFFF
SEEDS = (0, 1, -1, 42, 81985529216486895, -(1 << 63), (1 << 63) - 1, 1 << 32, WORD, -(1 << 32))
PUBLISHED = {  # Random123's vectors for philox4x32 with 7 rounds
    "00000000 " * 5 + "00000000": "5f6fb709 0d893f64 4f121f81 4f730a48",
    "ffffffff " * 5 + "ffffffff": "5207ddc2 45165e59 4d8ee751 8c52f662",
    "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0": "4dfccaba 190a87f0 c47362ba b6b5242a",
}


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Four 32-bit words from a counter of four and a key of two."""
    a, b, c, d = counter
    k, m = key
    for _ in range(7):
        x, y = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (y >> 32) ^ b ^ k, y & WORD, (x >> 32) ^ d ^ m, x & WORD
        k, m = (k + 0x9E3779B9) & WORD, (m + 0xBB67AE85) & WORD
    return [a, b, c, d]


def draw(seed: int, stream: int, sample: int, lane: int, row: int, col: int) -> int:
    """The 16-bit number of one element."""
    key = seed % (1 << 64)
    words = philox([col // 8, row, stream, sample * 256 + lane], [key & WORD, key >> 32])
    return words[(col % 8) // 2] >> (16 * (col % 2)) & 0xFFFF


def cumulative(p: list[float]) -> list[int]:
    """Orthogonal thresholds."""
    keep = [1.0 - rate for rate in p]
    sums = [math.fsum(keep[: j + 1]) for j in range(len(keep))]
    return [min(65536, math.floor(65536 * total + 0.5)) for total in sums]


def philox_lines() -> Iterator[str]:
    for given, answer in PUBLISHED.items():
        words = [int(word, 16) for word in given.split()]
        found = " ".join(f"{word:08x}" for word in philox(words[:4], words[4:]))
        if found != answer:
            raise AssertionError(f"philox {given}: {found}, published {answer}")
        yield f"philox {given} -> {answer}"


def draw_lines() -> Iterator[str]:
    rows = (0, 1, 2, (1 << 31) - 1, 1 << 31, (1 << 32) - 2, WORD)
    cols = (*range(10), 127, 128, WORD, WORD + 1, 8 * WORD, (1 << 35) - 9, (1 << 35) - 8)
    cols += ((1 << 35) - 1,)
    cases = [(seed, 0, 0, 0, 0, col) for seed in SEEDS for col in range(9)]
    cases += [(42, 0, 0, 0, row, col) for row in rows for col in cols]
    cases += [(-7, 5, 9, lane, 3, 100 + lane) for lane in range(256)]
    for stream in (1, 255, 256, 1 << 31, WORD):
        for sample in (0, 1, 255, 1 << 16, (1 << 24) - 1):
            cases.append((7, stream, sample, 0, 11, 13))
            cases.append((7, stream, sample, 255, 11, 13))
    dice = random.Random(20251003)
    limits = (1 << 32, 1 << 24, 1 << 8, 1 << 32, 1 << 35)
    for _ in range(200):
        signed = dice.randrange(1 << 64) - (1 << 63)
        cases.append((signed, *(dice.randrange(limit) for limit in limits)))
    for case in cases:
        yield f"draw {' '.join(map(str, case))} -> {draw(*case)}"


def block_lines() -> Iterator[str]:
    cases = [
        (3, 0, 0, 0, 0, 2, 0, 17),
        (3, 0, 0, 0, 5, 3, 5, 11),
        (3, 0, 0, 0, 5, 1, 8, 8),
        (-3, 1, 2, 3, 1000, 2, 129, 1),
        (-3, 1, 2, 3, WORD - 1, 2, 4094, 20),
        (-3, WORD, (1 << 24) - 1, 255, WORD, 1, (1 << 35) - 21, 21),
        (9, 8, 7, 6, (1 << 31) - 1, 2, WORD - 3, 9),
        (9, 8, 7, 6, 77, 1, 8 * WORD - 5, 13),
    ]
    for case in cases:
        seed, stream, sample, lane, row0, rows, col0, cols = case
        found = [
            draw(seed, stream, sample, lane, row, col)
            for row in range(row0, row0 + rows)
            for col in range(col0, col0 + cols)
        ]
        yield f"block {' '.join(map(str, case))} -> {' '.join(map(str, found))}"


def threshold_lines() -> Iterator[str]:
    for count in (1, 2, 3, 5, 6, 7, 10, 16, 25, 32, 49, 100, 128, 255):
        p = [1.0 - 1.0 / count] * count
        yield f"thresholds {' '.join(map(repr, p))} -> {' '.join(map(str, cumulative(p)))}"
    smallest = 1.0 - 2.0**-16
    for p in (
        [0.0], [smallest], [0.3], [0.75, 0.5], [0.5, 0.75], [0.7, 0.6, 0.7], [0.1, 0.9],
        [2.0**-16, smallest], [smallest, smallest, 2.0**-15], [0.999, 0.001], [0.9999, 0.5, 0.6],
        [1.0 - (1.0 + 5e-10) / 3] * 3,
    ):  # fmt: skip
        yield f"thresholds {' '.join(map(repr, p))} -> {' '.join(map(str, cumulative(p)))}"
    for p in ([0.0, 0.0], [0.5, 0.1, smallest], [0.25, 0.0, 0.99, 1 / 3]):
        found = [math.floor(65536 * (1.0 - rate) + 0.5) for rate in p]
        yield f"dropout {' '.join(map(repr, p))} -> {' '.join(map(str, found))}"


def decision_lines() -> Iterator[str]:
    numbers = (0, 1, 2, 255, 256, 32767, 32768, 65534, 65535)
    sets = (
        [0], [1], [65535], [65536], [0, 65536], [1, 65535], [1, 65536], [0, 1, 65535, 65536],
        [1, 2, 3], [32768, 65536], [21845, 43691, 65536], [16384, 49152], [1, 65535, 65536],
    )  # fmt: skip
    for limits in sets:
        for u in numbers:
            owner = next((j for j, limit in enumerate(limits) if u < limit), -1)
            yield f"owner {u} {' '.join(map(str, limits))} -> {owner}"
    for limit in (0, 1, 256, 32768, 65535, 65536):
        for u in numbers:
            yield f"keep {u} {limit} -> {int(u < limit)}"


def text() -> str:
    """The whole file."""
    parts = (philox_lines, draw_lines, block_lines, threshold_lines, decision_lines)
    return HEADER + "".join(f"{line}\n" for part in parts for line in part())


if __name__ == "__main__":
    if "--print" in sys.argv[1:]:
        sys.stdout.write(text())
    else:
        partial = TARGET.with_suffix(".partial")
        partial.write_text(text(), encoding="ascii")
        os.replace(partial, TARGET)
