"""The targets on a CPU, and how each figure is taken from a result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.cases import CPU_CASES, DTYPES, LARGE, MANY_ADAPTERS, Case
from benchmarks.record import Result, Row

_MANY_TOKENS = tuple(case for case in CPU_CASES if case.tokens >= 16)
_ONE_TOKEN = tuple(case for case in CPU_CASES if case.tokens == 1)
_MIB = 2**20


class NotMeasured(Exception):
    """A figure that a result does not hold, and why."""


@dataclass(frozen=True)
class Target:
    """One figure and its bound.

    Attributes:
        figure: what it is.
        bound: the least or the largest that meets it.
        at_least: which of the two.
        value: takes it from a result, for one dtype; raises NotMeasured.
        unit: printed behind it.
        dtypes: those for which it was set.
        digits: printed behind the point.
    """

    figure: str
    bound: float
    at_least: bool
    value: Callable[[Result, str], float]
    unit: str = ""
    dtypes: tuple[str, ...] = tuple(DTYPES)
    digits: int = 2

    def met(self, value: float) -> bool:
        """Whether a value meets the target, to the digits that are printed."""
        rounded = round(value, self.digits)
        return rounded >= self.bound if self.at_least else rounded <= self.bound

    def goal(self) -> str:
        """The bound as text."""
        return f"{'≥' if self.at_least else '≤'} {self.bound:.{self.digits}f}{self.unit}"


def find(result: Result, section: str, case: Case, dtype: str, contender: str | None = None) -> Row:
    """The row of a case; raises NotMeasured."""
    for row in result[section]:
        same = (row["case"], row["dtype"]) == (str(case), dtype)
        if same and row.get("contender") == contender:
            found: Row = row
            return found
    raise NotMeasured("")


def ratio(result: Result, section: str, case: Case, dtype: str, name: str) -> float:
    """A median ratio, such as "ours/direct"; raises NotMeasured."""
    row = find(result, section, case, dtype)
    if name not in row.get("ratios", {}):
        reasons = [f"{k}: {v}" for k, v in row.get("refused", {}).items()]
        raise NotMeasured(f"{case} " + "; ".join(reasons) if reasons else "")
    return float(row["ratios"][name]["median"])


def _mean(section: str, name: str, cases: tuple[Case, ...]) -> Callable[[Result, str], float]:
    """Geometric mean over cases."""

    def value(result: Result, dtype: str) -> float:
        logs = [math.log(ratio(result, section, case, dtype, name)) for case in cases]
        return math.exp(sum(logs) / len(logs))

    return value


def _worst(section: str, name: str, cases: tuple[Case, ...]) -> Callable[[Result, str], float]:
    return lambda result, dtype: max(ratio(result, section, c, dtype, name) for c in cases)


def _memory(direction: str) -> Callable[[Result, str], float]:
    """The most over all cases, in MiB."""

    def value(result: Result, dtype: str) -> float:
        found = []
        for case in CPU_CASES:
            row = find(result, "memory", case, dtype, "ours")
            if direction not in row:
                raise NotMeasured(str(row.get("refused")))
            found.append(row[direction] / _MIB)
        return float(max(0.0, *found))

    return value


def _speedup(result: Result, dtype: str) -> float:
    row = find(result, "threads", LARGE, dtype)
    if row["threads"] != 2:
        raise NotMeasured(f"measured on {row['threads']} threads, not 2")
    return float(row["speedup"]["ours"]["median"])


TARGETS = (
    Target(
        "forward ÷ direct, geometric mean", 0.90, False, _mean("forward", "ours/direct", CPU_CASES)
    ),
    Target(
        "forward ÷ direct, worst with 16 tokens or more", 1.10, False,
        _worst("forward", "ours/direct", _MANY_TOKENS),
    ),
    Target(
        "forward ÷ direct, one token", 1.50, False, _worst("forward", "ours/direct", _ONE_TOKEN)
    ),
    Target(
        "forward + backward ÷ direct, geometric mean", 1.00, False,
        _mean("backward", "ours/direct", CPU_CASES),
    ),
    Target(
        "forward ÷ direct, 512 × 2048 × 2048, K = 16, r = 32", 0.40, False,
        _worst("forward", "ours/direct", (MANY_ADAPTERS,)), dtypes=("float32",),
    ),
    Target(
        "paper ÷ ours, forward, geometric mean with 16 tokens or more", 25, True,
        _mean("peers", "paper/ours", _MANY_TOKENS), digits=1,
    ),
    Target(
        "compiled categorical ÷ ours, likewise", 5, True,
        _mean("peers", "compiled/ours", _MANY_TOKENS), digits=1,
    ),
    Target(
        "memory beyond inputs, output and s, forward, most", 2, False, _memory("forward"), " MiB"
    ),
    Target(
        "memory beyond inputs and outputs, backward, most", 2, False, _memory("backward"), " MiB"
    ),
    Target("two cores against one, 2048 × 4096 × 4096", 1.8, True, _speedup, " ×"),
)  # fmt: skip
