"""Timing side by side: interleaved repetitions, medians with quartiles, ratios round by round."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Cores that others may keep busy in an undisturbed measurement, and how often one is tried.
DISTURBED = 0.15
_TRIES = 3


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of a number of measurements."""

    median: float
    q1: float
    q3: float
    count: int

    @staticmethod
    def of(values: list[float]) -> Quartiles:
        """Of at least one value."""
        q1, median, q3 = np.quantile(values, (0.25, 0.5, 0.75))
        return Quartiles(float(median), float(q1), float(q3), len(values))

    def json(self) -> dict[str, Any]:
        """As JSON, four significant digits."""
        return {k: float(f"{v:.4g}") if k != "count" else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: aimed at for one group of contenders, warm-up aside.
        round_seconds: shortest span that is timed at once; short calls repeat to fill it.
        least, most: bounds on the number of rounds.
    """

    seconds: float
    round_seconds: float = 0.002
    least: int = 7
    most: int = 400


@dataclass(frozen=True)
class Times:
    """Seconds per call of each contender, one value a round.

    Attributes:
        seconds: by contender; the lists are of one length.
        others: processor cores that other processes and virtual machines kept busy meanwhile;
            None where the system does not tell.
    """

    seconds: Mapping[str, list[float]]
    others: float | None

    def of(self, name: str) -> Quartiles:
        """Time of one contender."""
        return Quartiles.of(self.seconds[name])

    def ratio(self, above: str, below: str) -> Quartiles:
        """Time of one contender by that of another, round by round."""
        pairs = zip(self.seconds[above], self.seconds[below], strict=True)
        return Quartiles.of([a / b for a, b in pairs])


def measure(calls: Mapping[str, Callable[[], object]], effort: Effort) -> Times:
    """Times contenders side by side; once more, and again, where others took the processor."""
    best: Times | None = None
    for _ in range(_TRIES):
        times = _interleave(calls, effort)
        if times.others is None or times.others <= DISTURBED:
            return times
        if best is None or best.others is None or times.others < best.others:
            best = times
        print(f"  others kept {times.others:.1f} cores busy: once more", file=sys.stderr)
    assert best is not None
    return best


def _interleave(calls: Mapping[str, Callable[[], object]], effort: Effort) -> Times:
    """Every round times every contender; the order turns from round to round."""
    repeats = {}
    for name, call in calls.items():
        _time(call, 2)
        repeats[name] = max(1, round(effort.round_seconds / _time(call, 1)))
    order = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in order}
    with _no_collection():
        load, start, rounds = _Load(), time.perf_counter(), 0
        while rounds < effort.least or (
            rounds < effort.most and time.perf_counter() - start < effort.seconds
        ):
            for name in order:
                seconds[name].append(_time(calls[name], repeats[name]))
            order = order[::-1] if rounds % 2 else order[1:] + order[:1]
            rounds += 1
        return Times(seconds, load.others())


class _Load:
    """Counts the processor time that did not go to this process, from its making on."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._busy, self._own = _busy_seconds(), time.process_time()

    def others(self) -> float | None:
        """In cores."""
        busy, own = _busy_seconds(), time.process_time()
        if busy is None or self._busy is None:
            return None
        foreign = (busy - self._busy) - (own - self._own)
        return max(0.0, foreign) / (time.perf_counter() - self._start)


def _busy_seconds() -> float | None:
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, soft, steal = map(int, fields)
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def _time(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
