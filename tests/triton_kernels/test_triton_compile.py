"""What every shipped Triton kernel takes on each GPU, compiled here without one.

Compiled by the Triton that made the table of docs/triton_kernels.md, which this environment need
not have (test_triton_versions.py has the oldest): other versions' compilers allocate otherwise.
The committed table is held to that compilation, figure for figure.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import native
import other_triton
import pytest

pytest.importorskip("triton", reason="triton is not installed")

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
TABLE = Path("docs/triton_kernels.md")
BEGIN, END = "<!-- resources: begin -->\n", "<!-- resources: end -->\n"


def committed() -> str:
    """The table of the page."""
    return (native.ROOT / TABLE).read_text().split(BEGIN)[1].split(END)[0].strip()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The command in a process of its own, where nothing is interpreted and nothing cached."""
    made_with = re.match(r"Triton ([\d.]+\d)\.", committed())
    assert made_with
    own = other_triton.variables(made_with[1])
    cache = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "lora_ortho.triton_kernels.resources", "--json"]
    printed = native.run(
        command, variables={**own, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
    )
    found = json.loads(printed[printed.index("{") :])
    assert found["triton"] == made_with[1]
    return found


def chosen(kernels: Sequence[dict[str, Any]], **wanted: object) -> list[dict[str, Any]]:
    found = [k for k in kernels if all(k[name] == value for name, value in wanted.items())]
    assert found
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_no_spills_and_no_local_memory(compiled: Any, arch: str) -> None:
    kernels = chosen(compiled["kernels"], arch=arch)
    assert [k for k in kernels if k["stack"]] == []
    assert all(0 < k["registers"] <= (255 if arch.startswith("sm_") else 512) for k in kernels)
    # the least of what a program may take without asking for more
    assert all(k["shared"] <= 48 << 10 for k in kernels)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_output_is_written_128_bits_at_a_time(compiled: Any, arch: str) -> None:
    wide = {"STG.E.128"} if arch.startswith("sm_") else {"global_store_dwordx4"}
    for kernel in chosen(compiled["kernels"], arch=arch, kernel="forward"):
        assert set(kernel["stores"]) == wide, kernel
        assert any("128" in load or "x4" in load for load in kernel["loads"]), kernel


def test_the_budget_of_instructions(compiled: Any) -> None:
    """At most 24 for each output element, bfloat16, three adapters of rank 16, on sm_90."""
    (kernel,) = chosen(
        compiled["kernels"], arch="sm_90", kernel="forward", dtype="bfloat16",
        method="orthogonal", adapters=3, rank=16,
    )  # fmt: skip
    print("instructions for each element:", kernel["per_element"])
    assert kernel["per_element"] <= 24


def test_the_committed_table(compiled: Any) -> None:
    from lora_ortho.triton_kernels.resources import Figures, table

    found = table([Figures(**kernel) for kernel in compiled["kernels"]], compiled["triton"])
    assert found == committed()


def test_every_configuration_is_among_those_compiled() -> None:
    """Over all sizes, what the launch configuration may return differs only in counts from it."""
    from lora_ortho.triton_kernels import launch_config as config
    from lora_ortho.triton_kernels.shipped import GPUS, shipped

    def kinds(gpu: config.Gpu, merge: config.Merge) -> set[tuple[object, ...]]:
        f = config.forward(gpu, merge)
        hoisted = (merge.adapters, merge.width) if f.hoist else ()
        tile = (f.block_m, f.block_n, f.chunk, f.hoist, f.warps, f.max_registers)
        found: set[tuple[object, ...]] = {(gpu.arch, merge.itemsize, "forward", *tile, *hoisted)}
        for name in ("grad_s", "grad_B"):
            b = getattr(config, name)(gpu, merge)
            sums = (b.block_m, b.block_n, b.chunk, b.group, b.warps)
            found.add((gpu.arch, merge.itemsize, name, *sums))
        return found

    covered = set()
    for item in shipped():
        if item.method == "orthogonal":
            width = config.width_of(item.rank or 13)
            merge = config.Merge(8192, 4096, item.adapters, width, item.dtype.itemsize)
            covered |= kinds(item.gpu, merge)
    sizes = itertools.product(
        (1, 16, 300, 8192, 1 << 20), (7, 768, 14336), (1, 2, 3, 4, 5, 32, 255),
        (16, 32, 64, 128, 256), (2, 4), GPUS,
    )  # fmt: skip
    for tokens, d_out, adapters, width, itemsize, gpu in sizes:
        missing = kinds(gpu, config.Merge(tokens, d_out, adapters, width, itemsize)) - covered
        assert not missing


def test_configurations_of_unknown_gpus_are_the_defaults() -> None:
    from lora_ortho.triton_kernels import launch_config as config

    merge = config.Merge(8192, 4096, 3, 16, 2)
    for function in (config.forward, config.grad_s, config.grad_B):
        unknown = function(config.Gpu("sm_999", 132), merge)
        assert unknown == function(config.Gpu("sm_86", 132), merge)
        assert unknown == function(config.Gpu("gfx1100", 132), merge)
        assert str(unknown).startswith(type(unknown).__name__ + "(block_m=")


def test_counting_instructions() -> None:
    from lora_ortho.triton_kernels.resources import per_element

    body = ["FMA"] * 30
    straight = ["MOV"] * 10 + body
    assert per_element(straight, 1, 8) == 40 / 8
    loop = ["MOV"] * 10 + ["L:", *body, "jump L"] + ["EXIT"] * 4
    assert per_element(loop, 5, 8) == (14 + 5 * 31) / 40
    wait = ["MOV"] * 10 + ["L:", *body, "W:", "TRY", "jump W", "jump L"]
    assert per_element(wait, 2, 8) == (10 + 2 * 33) / 16
    nested = ["L:", *body, "I:", *body, "jump I", "jump L"]
    assert per_element(nested, 2, 8) is None
    assert per_element([*straight, "L:"], 3, 8) is None
