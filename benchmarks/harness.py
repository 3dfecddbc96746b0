"""Timing side by side: interleaved repetitions, medians with quartiles, ratios round by round."""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .device import Stopwatch

# Cores that others may keep busy in an undisturbed measurement.
DISTURBED = 0.15
_LONG = 25  # rounds


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
        several = values if len(values) > 1 else values * 2
        q1, median, q3 = statistics.quantiles(several, n=4, method="inclusive")
        return Quartiles(median, q1, q3, len(values))

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
        tries: how often at most, where others take the processor.
    """

    seconds: float
    round_seconds: float = 0.002
    least: int = 7
    most: int = 400
    tries: int = 3


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

    def rounded_others(self) -> float | None:
        """``others`` as result files hold it."""
        return None if self.others is None else round(self.others, 3)

    def ratio(self, above: str, below: str) -> Quartiles:
        """Time of one contender by that of another, round by round."""
        pairs = zip(self.seconds[above], self.seconds[below], strict=True)
        return Quartiles.of([a / b for a, b in pairs])


def measure(contenders: Mapping[str, Stopwatch], effort: Effort) -> Times:
    """Times contenders side by side; once more, and again, where others took the processor."""
    best: Times | None = None
    for left in reversed(range(effort.tries)):
        times = _interleave(contenders, effort)
        if times.others is None or times.others <= DISTURBED:
            return times
        if best is None or best.others is None or times.others < best.others:
            best = times
        if left:
            print(f"  others kept {times.others:.1f} cores busy: once more", file=sys.stderr)
    assert best is not None
    return best


def _interleave(contenders: Mapping[str, Stopwatch], effort: Effort) -> Times:
    """Every round times every contender; the order turns from round to round."""
    rotations = {}
    for name, stopwatch in contenders.items():
        span = stopwatch(1) * stopwatch.sets
        if span < _LONG * effort.round_seconds:  # a long warm-up is its own estimate
            stopwatch(1)
            span = stopwatch(1) * stopwatch.sets
        rotations[name] = max(1, round(effort.round_seconds / span))
    order = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in order}
    with _no_collection():
        load, start, rounds = _Load(), time.perf_counter(), 0
        while rounds < effort.least or (
            rounds < effort.most and time.perf_counter() - start < effort.seconds
        ):
            for name in order:
                seconds[name].append(contenders[name](rotations[name]))
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


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
