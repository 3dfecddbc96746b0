"""What a report says of a result."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from benchmark_results import rehearsed, synthetic, synthetic_gpu

from benchmarks.cases import CPU_CASES
from benchmarks.record import Unmeasured
from benchmarks.report import fit, instructions_per_element, report, targets
from benchmarks.targets import judged, views


def test_a_gpu_has_its_own_targets_and_a_column_for_each_backend() -> None:
    result = synthetic_gpu()
    text = report(result)
    assert "NVIDIA Test, CUDA 13.0" in text
    head = "| figure | target | triton, bfloat16 | cuda, bfloat16 |"
    assert head in text
    assert "| forward ÷ direct, geometric mean | ≤ 0.80 | 0.00 met | 0.00 met |" in text
    # 8192 x 4096 elements, read and written, and little else, in 100 us and 80 us at 4e12 bytes/s
    assert "share of copy bandwidth | ≥ 0.90 | **0.34 MISSED** | **0.42 MISSED** |" in text
    assert "13.8 instructions an element" in text
    assert "1 to 16 tokens inside a CUDA graph ÷ direct | ≤ 1.00 | 0.00 met |" in text
    plain = replace(result.forward[0], launch={"ours": "no graph: why", "direct": "graph"})
    result.forward[0] = plain
    assert "not replayed from a graph" in report(result)


def test_a_rehearsal_meets_and_misses_nothing() -> None:
    text = report(rehearsed())
    assert text.startswith("REHEARSAL")
    assert "| forward ÷ direct, geometric mean | ≤ 0.80 | 0.50 rehearsed |" in text
    assert " met" not in text
    assert "MISSED" not in text
    assert all(one.met is None for one in judged(rehearsed()))


def test_report_warns_of_growth_and_shows_floors() -> None:
    result = synthetic()
    text = report(result)
    assert "K 2 … 8: ours 2.00 (**WARNING: above 1.1**" in text
    case = CPU_CASES[0]
    floor = max(case.forward("float32").bytes / 1e3, case.forward("float32").operations / 2e3)
    assert math.isclose(views(result)[0].share("forward", case), floor)
    assert f"| {floor * 100:.0f} % |" in text
    assert "matrix product" in text


def test_a_row_that_failed_is_named_where_its_figure_is_missing() -> None:
    result = synthetic()
    missing = result.forward.pop()
    reason = "failed: RuntimeError: why"
    result.unmeasured.append(Unmeasured("forward", missing.case, "float32", "cpu", reason))
    assert f"| not measured: {missing.case} {reason} |" in targets(result)


def test_exponents_and_late_surprises() -> None:
    straight = fit({n: 3e-6 * n for n in (64, 256, 1024)})
    assert math.isclose(straight.exponent, 1.0, abs_tol=1e-6)
    assert not straight.above(1.2)
    assert fit({n: 1e-9 * n * n for n in (2, 4, 8)}).above(1.2)
    late = fit({1: 1.0, 10: 10.0, 100: 100.0, 200: 400.0})
    assert late.exponent < 1.2 < late.last
    assert late.above(1.2)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_instructions_are_those_of_the_compiled_facts(backend: str) -> None:
    found = instructions_per_element(backend, "9.0", "bfloat16")
    assert found is not None
    assert 5 < found < 60
    assert instructions_per_element(backend, "7.0", "bfloat16") is None
    assert instructions_per_element("reference", "9.0", "bfloat16") is None
