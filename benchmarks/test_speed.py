"""``pytest benchmarks/``: our calls under pytest-benchmark, for its tables and histories.

Each result is checked before it is timed. Ratios to direct and the others come from interleaved
rounds, which ``python -m benchmarks`` makes.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from lora_ortho import backends

from . import checks, peers
from .cases import CPU_CASES, DTYPES, Case
from .harness import Bench

pytestmark = pytest.mark.skipif(
    backends.available()["cpu"] is not None, reason=str(backends.available()["cpu"])
)


@pytest.fixture(params=CPU_CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    """A case of the results."""
    found: Case = request.param
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(benchmark: BenchmarkFixture, case: Case, dtype: str) -> None:
    bench = Bench.of("cpu", compiled=False)
    inputs = bench.inputs(case, dtype)
    with torch.no_grad():
        call = bench.ours(inputs)
        checks.check_forward(call(), inputs, bench.masks(case))
        benchmark(call)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(benchmark: BenchmarkFixture, case: Case, dtype: str) -> None:
    bench = Bench.of("cpu", compiled=False)
    inputs = bench.inputs(case, dtype)
    call = peers.ours_training(inputs, bench.backend)
    checks.check_training(call(), inputs, bench.masks(case), joined=False)
    benchmark(call)
