"""What nvcc makes of the CUDA kernels for sm_80, sm_90a, sm_100 and as PTX: no GPU is asked."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator

import pytest
from cuda_facts import (
    ARCHITECTURES,
    Fact,
    committed,
    expand_loop,
    facts,
    library,
    missing,
    table,
    tool,
)
from native import run

BUDGET = 14.0  # instructions per output element


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    if reason := missing():
        pytest.skip(f"compile-time facts of the CUDA kernels: {reason}")


def staged(dtype: str) -> Iterator[Fact]:
    """The forward kernel on the layouts that allow the widest accesses, on every architecture."""
    for fact in facts():
        if fact.kernel == "expand orthogonal staged" and fact.dtype == dtype:
            yield fact


def test_every_architecture_and_ptx() -> None:
    """Warnings are errors in this build."""
    kernels = {fact.architecture: set[tuple[str, str]]() for fact in facts()}
    for fact in facts():
        kernels[fact.architecture].add((fact.kernel, fact.dtype))
    assert set(kernels) == set(ARCHITECTURES)
    assert len({frozenset(names) for names in kernels.values()}) == 1
    ptx = run([tool("cuobjdump") or "", "--list-ptx", library()])
    assert len(re.findall(r"\.sm_80\.ptx", ptx)) >= 3


def test_nothing_spills() -> None:
    assert {(f.kernel, f.dtype, f.architecture): f.local for f in facts() if f.local} == {}
    spills = [f for f in facts() if any(re.search(r"\b(LDL|STL)\b", x) for x in f.code.code)]
    assert not spills


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_accesses_are_16_bytes(dtype: str) -> None:
    for fact in staged(dtype):
        accesses = expand_loop(fact.code).accesses
        assert len(accesses) == 8, (fact.architecture, accesses)  # base and y of four rows
        assert all(".128" in access for access in accesses), (fact.architecture, accesses)


def test_instruction_budget() -> None:
    for fact in staged("bfloat16"):
        loop = expand_loop(fact.code)
        assert loop.elements == 32
        count = loop.per_element(3, full=True)
        print(
            f"{fact.architecture}: {count:.2f} instructions per element, {fact.registers} registers"
        )
        assert count <= BUDGET, (fact.architecture, count)


def test_the_committed_table_is_what_the_compiler_says() -> None:
    version = re.search(r"release (\d+\.\d+)", run(["nvcc", "--version"]))
    assert version
    if version[1] != "13.0":
        pytest.skip(f"the committed table was made with nvcc 13.0, this is {version[1]}")
    assert committed() == table()


def test_the_library_loads_without_a_driver() -> None:
    loaded = ctypes.CDLL(str(library()))
    loaded.lora_ortho_status_text.restype = ctypes.c_char_p
    status = loaded.lora_ortho_cuda_available()
    text = loaded.lora_ortho_status_text(status).decode()
    assert text in (
        "ok",
        "no NVIDIA GPU, or no driver for one",
        "the current GPU is older than compute capability 8.0",
    )
