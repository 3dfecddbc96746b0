"""Every row of a run as a test: a wrong result fails, and is not timed.

Ratios come from interleaved rounds, as in ``python -m benchmarks``; of ours alone pytest-benchmark
keeps times besides, for its own tables and comparisons.
"""

from __future__ import annotations

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from . import peers, tasks
from .bench import Bench
from .record import Result
from .run import failures, short
from .tasks import Task


def _measure(task: Task, bench: Bench, quick: bool, result: Result) -> None:
    rows = tasks.perform(task, bench, quick)
    result[task.section].extend(rows)
    print(*map(short, rows), sep="; ")
    wrong = failures({**{name: [] for name in result}, task.section: rows})
    assert not wrong, wrong


def test_ours(
    benchmark: BenchmarkFixture, task: Task, bench: Bench, quick: bool, result: Result
) -> None:
    benchmark.group = str(task)
    benchmark._max_time, benchmark._min_rounds = 0.05, 3
    _measure(task, bench, quick, result)
    inputs = bench.inputs(task.case, task.dtype)
    if task.section == "backward":
        benchmark(peers.ours_training(inputs, bench.backend))
        return
    with torch.no_grad():
        benchmark(bench.ours(inputs))


def test_row(task: Task, bench: Bench, quick: bool, result: Result) -> None:
    _measure(task, bench, quick, result)
