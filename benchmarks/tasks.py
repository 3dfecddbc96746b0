"""Which rows a run measures, in what order, and for how long each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from . import memory, model, record, sections
from .cases import (
    AXES,
    CASES,
    CPU_CASES,
    DTYPES,
    EXPANDED,
    GPU_CASES,
    GPU_PEER_CASES,
    LARGE,
    MEMORY_TOKENS,
    ONE_TOKEN,
    THREADS_CASE,
    TINY_CASES,
    WHOLE_LAYER,
    Case,
)
from .harness import Bench, Effort
from .record import Row

_MEMORY_PEERS = ("direct", "paper", "categorical")  # beside ours, at the largest case
_SKIPPED = {
    "quick": ("scaling", "model"),
    "cpu": ("expand",),
    "gpu": ("threads", "model", "scaling"),
    "rehearsal": ("threads", "model", "scaling"),
}
_ONCE = {"threads": LARGE, "overhead": ONE_TOKEN, "samples": CPU_CASES[2]}
_SOME_ON_GPU = {"peers": GPU_PEER_CASES, "layer": (WHOLE_LAYER,)}
_SECONDS = {
    "forward": 1.5, "backward": 2.0, "threads": 4.0, "overhead": 1.0, "ceilings": 1.0,
    "peers": 2.0, "layer": 1.2, "expand": 1.0, "samples": 1.0, "scaling": 0.5,
}  # fmt: skip
_FEW = ("peers", "layer", "samples")  # sections with slow contenders, and so with few rounds


class Task(NamedTuple):
    """Something to measure: a row, or for the axis of threads and for models some.

    Attributes:
        extra: the contender for memory, the axis for scaling; empty elsewhere.
    """

    section: str
    case: Case
    dtype: str
    extra: str = ""

    def __str__(self) -> str:
        return " ".join(str(part) for part in self if part)


def choose(
    bench: Bench,
    quick: bool,
    only: Sequence[str] | None = None,
    cases: Sequence[Case] | None = None,
    dtypes: Sequence[str] | None = None,
) -> Iterator[Task]:
    """What a run measures; sections named in ``only`` also where they are left out by default."""
    label = bench.device.label
    skipped = {*_SKIPPED[label], *(_SKIPPED["quick"] if quick else ())}
    chosen = only or [name for name in record.SECTIONS if name not in skipped]
    dtypes = dtypes or (list(DTYPES) if label == "cpu" else ["bfloat16"])
    own = CASES[label]
    if "ceilings" in chosen:
        yield from (Task("ceilings", own[-1], dtype) for dtype in dtypes)
    found = [
        task
        for case in cases or own
        for dtype in dtypes
        for section in chosen
        for task in _of_case(section, case, dtype, own)
        if not quick or task.extra in ("", "ours")
    ]
    if label != "cpu":  # time may run out there: what takes longest comes last
        found.sort(key=lambda task: task.section == "peers")
    yield from found
    if cases is None:
        yield from _beyond_cases(chosen, own)


def _of_case(section: str, case: Case, dtype: str, own: tuple[Case, ...]) -> Iterator[Task]:
    """The tasks of a section that belong to one of its own cases."""
    if section == "memory":
        peers = _MEMORY_PEERS if case == LARGE else ()
        yield from (Task(section, case, dtype, contender) for contender in ("ours", *peers))
    elif section == "expand":
        if case in EXPANDED or own == TINY_CASES:
            yield Task(section, case, dtype)
    elif section in _SOME_ON_GPU and own == GPU_CASES:
        if case in _SOME_ON_GPU[section]:
            yield Task(section, case, dtype)
    elif section in _ONCE:
        if case == _once(section, own):
            yield Task(section, case, dtype)
    elif section not in ("ceilings", "scaling", "model"):
        yield Task(section, case, dtype)


def _once(section: str, own: tuple[Case, ...]) -> Case:
    """The one case at which a section measures; in a rehearsal the first."""
    return next((case for case in (_ONCE[section], WHOLE_LAYER) if case in own), own[0])


def _beyond_cases(chosen: Sequence[str], own: tuple[Case, ...]) -> Iterator[Task]:
    """What has sizes of its own."""
    if "scaling" in chosen:
        for axis, cases in AXES.items():
            yield from (Task("scaling", case, "float32", axis) for case in cases)
        yield Task("scaling", THREADS_CASE, "float32", "threads")
        for case in MEMORY_TOKENS:
            for contender in ("ours", "direct", "paper"):
                yield Task("memory", case, "float32", contender)
    if "model" in chosen:
        yield Task("model", own[0], "float32")


def impossible(task: Task, bench: Bench) -> str | None:
    """Why a task cannot be measured on this machine; None where it can."""
    if task.section == "memory" and bench.device.label != "gpu":
        return memory.unavailable()
    if task.section == "model":
        return model.unavailable(bench.device)
    return None


def perform(task: Task, bench: Bench, quick: bool) -> Sequence[Row]:
    """Measure; one row, or of threads and of models some."""
    section, case, dtype, extra = task
    if section == "memory":
        return [sections.extra_memory(bench, case, dtype, extra)]
    if section == "model":
        return model.rows(bench, quick)
    effort = _effort(section, bench, quick)
    if section == "scaling":
        if extra == "threads":
            return sections.threads_scaling(bench, dtype, effort)
        return [sections.scaling(bench, case, dtype, effort, extra)]
    measure = sections.slow_peers if section == "peers" else getattr(sections, section)
    row: Row = measure(bench, case, dtype, effort)
    return [row]


def _effort(section: str, bench: Bench, quick: bool) -> Effort:
    label = bench.device.label
    if label == "rehearsal":
        return Effort(0.0, round_seconds=1e-6, least=2, tries=1)
    seconds = _SECONDS[section] * (0.2 if quick else 1.0)
    if label == "gpu":  # its clock does not see what other processes do here
        return Effort(min(seconds, 0.5), round_seconds=0.005, least=7, most=60, tries=1)
    least = (3 if quick else 15) if section in _FEW else 7
    if section == "scaling":
        least = 5
    return Effort(seconds, least=least, tries=1 if quick else 3)
