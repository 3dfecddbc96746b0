"""Results of benchmarks made up for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.cases import CPU_CASES, GPU_CASES, MEMORY_TOKENS, TINY_CASES, Case
from benchmarks.device import Host
from benchmarks.machine import empty_result
from benchmarks.record import (
    CeilingsRow,
    Gpu,
    MemoryRow,
    Quartiles,
    Result,
    ScalingRow,
    TimedRow,
)


def quartiles(median: float) -> Quartiles:
    """Of nine measurements that were all the same."""
    return Quartiles(median, median, median, 9)


def empty(kind: str) -> Result:
    """Without rows, of a kind of machine that there is not."""
    return replace(empty_result(Host()), kind=kind)


def timed(case: Case, seconds: float, **more: Any) -> TimedRow:
    """Ours and paper take so long, direct two seconds."""
    times = {"ours": quartiles(seconds), "direct": quartiles(2.0), "paper": quartiles(seconds)}
    ratios = {"ours/direct": quartiles(seconds / 2)}
    own = {"dtype": "float32", "backend": "cpu", "others_cores": 0.0}
    return TimedRow(**{**own, "case": case, "seconds": times, "ratios": ratios, **more})


def ceilings(row: TimedRow, copy: float, matmul: float) -> CeilingsRow:
    """These rates, in bytes and operations a second, on a row's machine."""
    rates = {"copy_bytes_per_second": copy, "matmul_operations_per_second": matmul}
    return CeilingsRow(**vars(row) | rates)


def synthetic() -> Result:
    """Something of everything that pictures show, and a quadratic surprise in K."""
    result = empty("cpu-synthetic")
    for j, case in enumerate(CPU_CASES):
        result.forward.append(timed(case, 1.0 + j, floor=case.forward("float32")))
    result.ceilings.append(ceilings(timed(CPU_CASES[0], 1.0), 1e3, 2e3))
    for count in (2, 4, 8):
        row = timed(Case(256, 1024, 1024, count, 16), count**2 / 100)
        result.scaling.append(ScalingRow(**vars(row), axis="K", size=count))
    for case in MEMORY_TOKENS[:2]:
        for name in ("ours", "direct", "paper"):
            needed = MemoryRow(
                case=case, dtype="float32", backend="cpu", contender=name, forward_bytes=1 << 20
            )
            result.memory.append(needed)
    return result


def synthetic_gpu() -> Result:
    """What a GPU run of two backends gives, in small."""
    result = empty("gpu-nvidia-test")
    gpu = Gpu("NVIDIA Test", "9.0", 132, 80 << 30, 50 << 20, "13.0", "1", 1980)
    result = replace(result, machine=replace(result.machine, gpu=gpu))
    for backend, seconds in (("triton", 1e-4), ("cuda", 8e-5)):
        own = {"dtype": "bfloat16", "backend": backend}
        result.ceilings.append(ceilings(timed(GPU_CASES[0], seconds, **own), 4e12, 8e14))
        for case in GPU_CASES:
            for section in ("forward", "backward", "expand"):
                floor = getattr(case, section)("bfloat16")
                graph = {"launch": {"ours": "graph", "direct": "graph"}, "buffer_sets": 2}
                result.rows(section).append(timed(case, seconds, floor=floor, **own, **graph))
    return result


def rehearsed() -> Result:
    """What a rehearsal of a GPU run gives, in small."""
    result = empty("rehearsal-here")
    own = {"dtype": "bfloat16", "backend": "triton"}
    result.forward.extend(timed(case, 1.0, **own) for case in TINY_CASES)
    return result
