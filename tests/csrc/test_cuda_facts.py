"""What nvcc makes of the CUDA kernels for sm_80, sm_90a, sm_100 and as PTX: no GPU is asked."""

from __future__ import annotations

import ctypes
import re
from functools import cache
from pathlib import Path

import facts
import pytest
from cuda_facts import (
    ARCHITECTURES,
    Kernel,
    collect,
    compiler,
    expand_loop,
    is_counted,
    kernels,
    missing,
    output,
    tool,
)
from native import build

BUDGET = 14.0  # instructions per output element


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    if reason := missing():
        pytest.skip(f"compile-time facts of the CUDA kernels: {reason}")


@cache
def library() -> Path:
    """The shared library with CUDA kernels for every architecture; built once."""
    return build("cuda") / "csrc" / "liblora_ortho.so"


@cache
def compiled() -> tuple[Kernel, ...]:
    return tuple(kernels(library()))


def staged(dtype: str) -> list[Kernel]:
    """expand on the layouts that allow the widest accesses, on every architecture."""
    found = [each for each in compiled() if is_counted(each.row) and each.row["dtype"] == dtype]
    assert [each.row["arch"] for each in found] == [*ARCHITECTURES]
    return found


def test_every_architecture_and_ptx() -> None:
    """Warnings are errors in this build."""
    found: dict[str, set[tuple[str, ...]]] = {}
    for each in compiled():
        names = tuple(str(each.row[key]) for key in ("kernel", "draw", "variant", "dtype"))
        found.setdefault(each.row["arch"], set()).add(names)
    assert set(found) == set(ARCHITECTURES)
    assert len({frozenset(names) for names in found.values()}) == 1
    ptx = output([tool("cuobjdump") or "", "--list-ptx", library()])
    assert len(re.findall(r"\.sm_80\.ptx", ptx)) >= 3


def test_nothing_spills() -> None:
    assert [each.row for each in compiled() if each.row["local_bytes"]] == []
    spills = re.compile(r"\b(LDL|STL)\b")
    assert [each.row for each in compiled() if any(spills.search(x) for x in each.code.code)] == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_accesses_are_16_bytes(dtype: str) -> None:
    for each in staged(dtype):
        accesses = expand_loop(each.code).accesses
        assert len(accesses) == 8, (each.row, accesses)  # base and y of four rows
        assert all(".128" in access for access in accesses), (each.row, accesses)


def test_instruction_budget() -> None:
    for each in staged("bfloat16"):
        assert expand_loop(each.code).elements == 32
        count = each.row["instructions_per_element"]
        print(f"{each.row['arch']}: {count} instructions per element")
        assert count <= BUDGET, each.row


def test_the_committed_facts_are_what_the_compiler_says() -> None:
    committed = facts.read("cuda").compiler
    if compiler() != committed:
        pytest.skip(f"the committed facts are those of {committed}, this is {compiler()}")
    assert collect(compiled()).text() == facts.path("cuda").read_text(encoding="utf-8")


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
