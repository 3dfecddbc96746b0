"""Timing side by side: checked first, then interleaved repetitions, ratios round by round."""

from __future__ import annotations

import functools
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import checks, peers
from .cases import DTYPES, Case, Inputs, make
from .device import Call, Device, Stopwatch, device_of
from .record import Quartiles, TimedRow

# Cores that others may keep busy in an undisturbed measurement.
DISTURBED_CORES = 0.15
_LONG = 25  # rounds

Check = Callable[[Any], None]
Contender = tuple[Callable[[Inputs], Call], Check]
Pairs = Sequence[tuple[str, str]]


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
        rounds: by contender; the lists are of one length.
        others_cores: processor cores that other processes and virtual machines kept busy
            meanwhile; None where the system does not tell.
    """

    rounds: Mapping[str, list[float]]
    others_cores: float | None

    @property
    def seconds(self) -> dict[str, Quartiles]:
        """By contender."""
        return {name: Quartiles.of(values) for name, values in self.rounds.items()}

    def ratios(self, pairs: Pairs) -> dict[str, Quartiles]:
        """Time of one contender by that of another, round by round, of pairs that are there."""
        return {
            f"{above}/{below}": Quartiles.of(
                [a / b for a, b in zip(self.rounds[above], self.rounds[below], strict=True)]
            )
            for above, below in pairs
            if above in self.rounds and below in self.rounds
        }


@dataclass(frozen=True)
class Bench:
    """Whose kernels are measured, and where.

    Attributes:
        backend: of lora_ortho.
        device: where its tensors lie.
        compiled: whether torch.compile's contender is run.
    """

    backend: str
    device: Device
    compiled: bool = True

    @staticmethod
    def of(backend: str, compiled: bool = True) -> Bench:
        """On this machine's device for a backend."""
        return Bench(backend, device_of(backend), compiled)

    def ours(self, inputs: Inputs) -> peers.Forward:
        """See ``peers.ours``."""
        return peers.ours(inputs, self.backend)

    def inputs(self, case: Case, dtype: str) -> Inputs:
        """The tensors of a case on the device."""
        return _inputs(case, dtype, self.device)

    def masks(self, case: Case) -> checks.Masks:
        """Ours."""
        return _orthogonal(case, self.device)

    def everything(self, case: Case) -> checks.Masks:
        """Those of the direct merge."""
        return checks.everything(case, self.device.torch_device)

    def time(self, calls: Mapping[str, Call], effort: Effort) -> Times:
        """Times calls that need no check, side by side."""
        watches = {name: self.device.stopwatch([call]) for name, call in calls.items()}
        return measure(watches, effort)

    def compare(
        self,
        inputs: Inputs,
        contenders: Mapping[str, Contender],
        effort: Effort,
        pairs: Pairs,
    ) -> TimedRow:
        """Check, then time those that passed; a ratio needs both of its contenders."""
        refused, watches = {}, {}
        sets = [inputs, *(inputs.copy() for _ in range(self.device.sets(inputs.nbytes) - 1))]
        for name, (build, check) in contenders.items():
            try:
                check(build(inputs)())
            except checks.WrongResult as error:
                refused[name] = f"wrong result: {error}"
            else:
                watches[name] = self.device.stopwatch([build(one) for one in sets])
        times = measure(watches, effort) if watches else Times({}, None)
        dtype = str(inputs.dtype).removeprefix("torch.")
        launch = {name: watch.note for name, watch in watches.items() if watch.note}
        row = self.row(inputs.case, dtype, times, pairs)
        return replace(row, refused=refused, buffer_sets=len(sets), launch=launch)

    def row(self, case: Case, dtype: str, times: Times, pairs: Pairs = ()) -> TimedRow:
        """What these times say of a case."""
        return TimedRow(
            case=case,
            dtype=dtype,
            backend=self.backend,
            seconds=times.seconds,
            ratios=times.ratios(pairs),
            others_cores=times.others_cores,
        )


@functools.lru_cache(maxsize=2)
def _inputs(case: Case, dtype: str, device: Device) -> Inputs:
    return make(case, DTYPES[dtype], device)


@functools.lru_cache(maxsize=2)
def _orthogonal(case: Case, device: Device) -> checks.Masks:
    return checks.orthogonal(case, device.torch_device)


def measure(contenders: Mapping[str, Stopwatch], effort: Effort) -> Times:
    """Times contenders side by side; once more, and again, where others took the processor."""
    best: Times | None = None
    for left in reversed(range(effort.tries)):
        times = _interleave(contenders, effort)
        if times.others_cores is None or times.others_cores <= DISTURBED_CORES:
            return times
        if best is None or best.others_cores is None or times.others_cores < best.others_cores:
            best = times
        if left:
            print(
                f"  other processes kept {times.others_cores:.1f} cores busy: measuring again",
                file=sys.stderr,
            )
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
        return round(max(0.0, foreign) / (time.perf_counter() - self._start), 3)


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
