"""The targets on a CPU and on a GPU, and how each figure is taken from a result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from .cases import (
    CASES,
    DTYPES,
    EXPANDED,
    GPU_PEER_CASES,
    LARGE,
    MANY_ADAPTERS,
    WHOLE_LAYER,
    Case,
)
from .record import CaseRow, CeilingsRow, Judgement, MemoryRow, Result, TimedRow

_MIB = 2**20
_Found = TypeVar("_Found", bound=CaseRow)


class NotMeasured(Exception):
    """A figure that a result does not hold, and why."""


class View(NamedTuple):
    """One column of a result's tables."""

    result: Result
    dtype: str
    backend: str

    @property
    def title(self) -> str:
        """The column's head: the dtype, and on a GPU the backend before it."""
        return self.dtype if is_cpu(self.result) else f"{self.backend}, {self.dtype}"

    def of(self, rows: Iterable[_Found]) -> list[_Found]:
        """Those of this column."""
        return [row for row in rows if (row.dtype, row.backend) == (self.dtype, self.backend)]

    def timed(self, section: str, case: Case) -> TimedRow:
        """The row of a case in a section of timed rows; raises NotMeasured."""
        rows: list[TimedRow] = self.of(self.result.rows(section))
        for row in rows:
            if row.case == case:
                return row
        raise self._missing(section, case)

    def memory(self, case: Case, contender: str) -> MemoryRow:
        """What a contender needs on a case; raises NotMeasured."""
        for row in self.of(self.result.memory):
            if (row.case, row.contender) == (case, contender):
                return row
        raise self._missing("memory", case, contender)

    def _missing(self, section: str, case: Case, extra: str = "") -> NotMeasured:
        wanted = (section, case, self.dtype, self.backend, extra)
        for one in self.result.unmeasured:
            if wanted == (one.section, one.case, one.dtype, one.backend, one.extra):
                return NotMeasured(f"{case} {one.reason}")
        return NotMeasured("")

    def ratio(self, section: str, case: Case, name: str) -> float:
        """A median ratio, such as "ours/direct"; raises NotMeasured."""
        row = self.timed(section, case)
        if name not in row.ratios:
            reasons = [f"{k}: {v}" for k, v in row.refused.items() if k in name.split("/")]
            raise NotMeasured(f"{case} " + "; ".join(reasons) if reasons else "")
        return row.ratios[name].median

    def ceilings(self) -> CeilingsRow:
        """The rates measured; raises NotMeasured."""
        for row in self.of(self.result.ceilings):
            return row
        raise NotMeasured("no ceilings")

    def share(self, section: str, case: Case) -> float:
        """Of the floor's speed, the share that ours reaches; raises NotMeasured."""
        row, rates = self.timed(section, case), self.ceilings()
        if "ours" not in row.seconds or row.floor is None:
            raise NotMeasured("")
        floor = row.floor.seconds(rates.copy_bytes_per_second, rates.matmul_operations_per_second)
        return floor / row.seconds["ours"].median


def is_cpu(result: Result) -> bool:
    """Whether a result is of a processor."""
    return result.kind.startswith("cpu")


def cases_of(result: Result) -> tuple[Case, ...]:
    """The cases that belong to a result's kind of machine."""
    return CASES[result.kind.split("-", 1)[0]]


def shown_cases(result: Result) -> list[Case]:
    """Those of its kind of machine, and what else was measured beside direct."""
    found = dict.fromkeys(cases_of(result))
    for section in ("forward", "backward", "peers", "layer"):
        found |= dict.fromkeys(row.case for row in result.rows(section))
    return list(found)


def views(result: Result) -> list[View]:
    """The columns of a result: of a processor every dtype, else what was measured."""
    rows = (row for section, row in result.every_row() if section != "model")
    found = dict.fromkeys((row.dtype, row.backend) for row in rows)
    if is_cpu(result):
        backends = list(dict.fromkeys(backend for _, backend in found)) or ["cpu"]
        return [View(result, dtype, backend) for backend in backends for dtype in DTYPES]
    return [View(result, dtype, backend) for dtype, backend in found]


Value = Callable[[View], float]


@dataclass(frozen=True)
class Target:
    """One figure and its bound.

    Attributes:
        figure: what it is.
        bound: the least or the largest that meets it.
        at_least: which of the two.
        value: takes it from one column of a result; raises NotMeasured.
        unit: printed behind it.
        dtypes: those for which it was set.
        digits: printed behind the point.
        headline: whether it is one of the few that the README shows.
    """

    figure: str
    bound: float
    at_least: bool
    value: Value
    unit: str = ""
    dtypes: tuple[str, ...] = tuple(DTYPES)
    digits: int = 2
    headline: bool = False

    def met(self, value: float) -> bool:
        """Whether a value meets the target, to the digits that are printed."""
        rounded = round(value, self.digits)
        return rounded >= self.bound if self.at_least else rounded <= self.bound

    def goal(self) -> str:
        """The bound as text."""
        return f"{'≥' if self.at_least else '≤'} {self.bound:.{self.digits}f}{self.unit}"


Choice = Callable[[Case], bool]


def _any(case: Case) -> bool:
    return True


def _many_tokens(case: Case) -> bool:
    return case.tokens >= 16


def _compared(case: Case) -> bool:
    return case in GPU_PEER_CASES


def _few_tokens(case: Case) -> bool:
    return case.tokens <= 16


def _chosen(view: View, choice: Choice) -> list[Case]:
    found = [case for case in cases_of(view.result) if choice(case)]
    if not found:
        raise NotMeasured("no such case")
    return found


def _mean(section: str, name: str, choice: Choice = _any) -> Value:
    """Geometric mean over cases."""

    def value(view: View) -> float:
        logs = [math.log(view.ratio(section, case, name)) for case in _chosen(view, choice)]
        return math.exp(sum(logs) / len(logs))

    return value


def _worst(section: str, name: str, choice: Choice) -> Value:
    return lambda view: max(view.ratio(section, case, name) for case in _chosen(view, choice))


def _worst_in_graph(view: View) -> float:
    """Over few tokens, ours and direct both replayed from a graph."""
    for case in _chosen(view, _few_tokens):
        notes = view.timed("forward", case).launch
        if any(notes.get(name) != "graph" for name in ("ours", "direct")):
            raise NotMeasured(f"{case} was not replayed from a graph: {notes}")
    return _worst("forward", "ours/direct", _few_tokens)(view)


def _memory(take: Callable[[MemoryRow], int | None]) -> Value:
    """The most over all cases, in MiB."""

    def value(view: View) -> float:
        found = [take(view.memory(case, "ours")) for case in cases_of(view.result)]
        return max(0, *(_known(size) for size in found)) / _MIB

    return value


def _known(size: int | None) -> int:
    if size is None:
        raise NotMeasured("")
    return size


def _speedup(view: View) -> float:
    for row in view.of(view.result.threads):
        if row.case == LARGE:
            if row.threads != 2:
                raise NotMeasured(f"measured on {row.threads} threads, not 2")
            return row.speedup["ours"].median
    raise NotMeasured("")


def _least_share(view: View) -> float:
    """Of the copy bandwidth measured, by the bytes that draw, expand and add must move."""
    found = []
    for case in EXPANDED:
        row = view.timed("expand", case)
        if "ours" not in row.seconds or row.floor is None:
            raise NotMeasured(row.refused.get("ours", ""))
        rate = row.floor.bytes / row.seconds["ours"].median
        found.append(rate / view.ceilings().copy_bytes_per_second)
    return min(found)


CPU_TARGETS = (
    Target(
        "forward ÷ direct, geometric mean", 0.90, False, _mean("forward", "ours/direct"),
        headline=True,
    ),
    Target(
        "forward ÷ direct, worst with 16 tokens or more", 1.10, False,
        _worst("forward", "ours/direct", _many_tokens), headline=True,
    ),
    Target(
        "forward ÷ direct, one token", 1.50, False,
        _worst("forward", "ours/direct", lambda case: case.tokens == 1),
    ),
    Target(
        "forward + backward ÷ direct, geometric mean", 1.00, False,
        _mean("backward", "ours/direct"), headline=True,
    ),
    Target(
        "forward ÷ direct, 512 × 2048 × 2048, K = 16, r = 32", 0.40, False,
        _worst("forward", "ours/direct", lambda case: case == MANY_ADAPTERS), dtypes=("float32",),
    ),
    Target(
        "paper ÷ ours, forward, geometric mean with 16 tokens or more", 25, True,
        _mean("peers", "paper/ours", _many_tokens), digits=1, headline=True,
    ),
    Target(
        "compiled categorical ÷ ours, likewise", 5, True,
        _mean("peers", "compiled/ours", _many_tokens), digits=1,
    ),
    Target(
        "memory beyond inputs, output and s, forward, most", 2, False,
        _memory(lambda row: row.forward_bytes), " MiB",
    ),
    Target(
        "memory beyond inputs and outputs, backward, most", 2, False,
        _memory(lambda row: row.backward_bytes), " MiB", headline=True,
    ),
    Target("two cores against one, 2048 × 4096 × 4096", 1.8, True, _speedup, " ×"),
)  # fmt: skip

GPU_TARGETS = (
    Target(
        "draw + expand + add, 8192 × 4096 and × 14336, share of copy bandwidth", 0.90, True,
        _least_share, headline=True,
    ),
    Target(
        "whole layer ÷ plain nn.Linear, 8192 × 4096 × 4096, K = 3, r = 16", 1.20, False,
        _worst("layer", "ours/linear", lambda case: case == WHOLE_LAYER),
    ),
    Target(
        "forward ÷ direct, geometric mean", 0.80, False, _mean("forward", "ours/direct"),
        headline=True,
    ),
    Target(
        "forward + backward ÷ direct, geometric mean", 0.90, False,
        _mean("backward", "ours/direct"), headline=True,
    ),
    Target(
        f"paper ÷ ours, forward, geometric mean of {len(GPU_PEER_CASES)} cases", 20, True,
        _mean("peers", "paper/ours", _compared), digits=1, headline=True,
    ),
    Target(
        "compiled categorical ÷ ours, likewise", 3, True,
        _mean("peers", "compiled/ours", _compared), digits=1,
    ),
    Target("1 to 16 tokens inside a CUDA graph ÷ direct", 1.0, False, _worst_in_graph),
    Target(
        "peak memory beyond inputs, output and s, forward, most", 0, False,
        _memory(lambda row: row.forward_bytes), " MiB",
    ),
    Target(
        "peak memory beyond inputs and outputs, backward, most", 0, False,
        _memory(lambda row: row.backward_bytes), " MiB", headline=True,
    ),
)  # fmt: skip


def targets_of(result: Result) -> tuple[Target, ...]:
    """The targets of a result's kind of machine; a rehearsal shows those of a GPU."""
    return CPU_TARGETS if is_cpu(result) else GPU_TARGETS


def judged(result: Result) -> list[Judgement]:
    """Every target of every column."""
    rehearsal = result.kind.startswith("rehearsal")
    found = []
    for target in targets_of(result):
        for view in views(result):
            if view.dtype not in target.dtypes:
                continue
            try:
                value = target.value(view)
            except NotMeasured:
                value = None
            met = None if value is None or rehearsal else target.met(value)
            found.append(Judgement(target.figure, view.title, value, target.bound, met))
    return found


def verdict(target: Target, view: View) -> str:
    """What a table says in the place of a target: the value with "met" or "missed".

    Of a rehearsal neither: its figures are no GPU's.
    """
    if view.dtype not in target.dtypes:
        return ""
    try:
        value = target.value(view)
    except NotMeasured as reason:
        return f"not measured: {reason}" if str(reason) else "not measured"
    text = f"{value:.{target.digits}f}{target.unit}"
    if view.result.kind.startswith("rehearsal"):
        return f"{text} rehearsed"
    return f"{text} met" if target.met(value) else f"**{text} MISSED**"
