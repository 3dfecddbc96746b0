"""How time grows with one size while the others stay: the points, and the exponent of a fit."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

from .cases import Case

_BASE = Case(256, 1024, 1024, 3, 16)


class Axis(NamedTuple):
    """One size that grows.

    Attributes:
        name: "tokens", "d_out", "K", "rank" or "threads".
        cases: one for each point; empty for threads, whose points the machine decides.
        bound: exponent of ours above which growth is a surprise.
    """

    name: str
    cases: tuple[Case, ...]
    bound: float

    def at(self, case: Case) -> int:
        """A case's place on the axis."""
        return {
            "tokens": case.tokens, "d_out": case.d_out, "K": case.adapters, "rank": case.rank,
        }[self.name]  # fmt: skip


# Time proportional to a size has exponent 1; what lies above that by more than noise is a warning.
AXES = {
    axis.name: axis
    for axis in (
        Axis("tokens", tuple(_BASE._replace(tokens=n) for n in (64, 256, 1024, 4096)), 1.2),
        Axis("d_out", tuple(_BASE._replace(d_out=n) for n in (512, 1024, 2048, 4096, 8192)), 1.2),
        Axis("K", tuple(_BASE._replace(adapters=n) for n in (2, 4, 8, 16, 32, 64)), 1.1),
        Axis("rank", tuple(_BASE._replace(rank=n) for n in (4, 8, 16, 32, 64, 128)), 1.1),
        Axis("threads", (), 0.1),
    )
}
THREADS_CASE = _BASE._replace(tokens=1024)
# Memory against tokens.
MEMORY_TOKENS = tuple(Case(n, 1024, 1024, 3, 16) for n in (256, 1024, 4096, 16384))


def thread_counts(most: int) -> list[int]:
    """1, 2, 4 … and the most."""
    return sorted({min(1 << n, most) for n in range(most.bit_length() + 1)})


class Growth(NamedTuple):
    """A fit of log time against log size.

    Attributes:
        exponent: slope of the least-squares line.
        last: slope between the two largest sizes, where a late surprise shows first.
    """

    exponent: float
    last: float

    def above(self, bound: float) -> bool:
        """Whether either slope is more than the bound."""
        return max(self.exponent, self.last) > bound


def fit(seconds: Mapping[int, float]) -> Growth:
    """From seconds by size, two sizes or more.

    Raises:
        ValueError: fewer than two sizes.
    """
    sizes = sorted(seconds)
    if len(sizes) < 2:
        raise ValueError(f"a fit needs two sizes or more, got {sizes}")
    x, y = [math.log(n) for n in sizes], [math.log(seconds[n]) for n in sizes]
    slope = statistics.linear_regression(x, y).slope
    return Growth(slope, (y[-1] - y[-2]) / (x[-1] - x[-2]))
