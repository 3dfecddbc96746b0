"""Ours and direct under pytest-benchmark; a wrong result fails before it is timed.

For times one by one. Ratios come from ``python -m benchmarks.bench_cpu``, which interleaves.
"""

from __future__ import annotations

import functools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import checks, peers
from benchmarks.cases import DTYPES, Case, Inputs, make

pytestmark = pytest.mark.benchmark(max_time=0.2, min_rounds=3, disable_gc=True)


@functools.lru_cache(maxsize=1)
def _inputs(case: Case, dtype: str) -> tuple[Inputs, checks.Masks]:
    return make(case, DTYPES[dtype]), checks.orthogonal(case)


def test_forward_ours(benchmark: BenchmarkFixture, case: Case, dtype: str) -> None:
    benchmark.group = f"forward {case} {dtype}"
    inputs, masks = _inputs(case, dtype)
    call = peers.ours(inputs)
    with torch.no_grad():
        checks.check_forward(call(), inputs, masks)
        benchmark(call)


def test_forward_direct(benchmark: BenchmarkFixture, case: Case, dtype: str) -> None:
    benchmark.group = f"forward {case} {dtype}"
    inputs, _ = _inputs(case, dtype)
    call = peers.direct(inputs)
    with torch.no_grad():
        checks.check_forward(call(), inputs, checks.everything(case))
        benchmark(call)


def test_backward_ours(benchmark: BenchmarkFixture, case: Case, dtype: str) -> None:
    benchmark.group = f"forward and backward {case} {dtype}"
    inputs, masks = _inputs(case, dtype)
    call = peers.ours_training(inputs)
    checks.check_training(call(), inputs, masks, joined=False)
    benchmark(call)


def test_backward_direct(benchmark: BenchmarkFixture, case: Case, dtype: str) -> None:
    benchmark.group = f"forward and backward {case} {dtype}"
    inputs, _ = _inputs(case, dtype)
    call = peers.direct_training(inputs)
    checks.check_training(call(), inputs, checks.everything(case), joined=True)
    benchmark(call)
