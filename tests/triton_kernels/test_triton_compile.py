"""What every shipped Triton kernel takes on each GPU, compiled here without one.

Compiled by the Triton that made docs/facts/triton.json, which this environment need not have
(test_triton_versions.py has the oldest): other versions' compilers allocate otherwise. The
committed facts are held to that compilation, figure for figure.
"""

from __future__ import annotations

import itertools
import sys

import facts
import native
import other_triton
import pytest

pytest.importorskip("triton", reason="triton is not installed")

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> facts.Facts:
    """The command in a process of its own, where nothing is interpreted and nothing cached."""
    committed = facts.read("triton").compiler
    own = other_triton.variables(committed.removeprefix("Triton "))
    cache = str(tmp_path_factory.mktemp("triton"))
    printed = native.run(
        [sys.executable, "tools/triton_facts.py", "--print"],
        variables={**own, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache},
    )
    found = facts.parse(printed[printed.index("{") :])
    assert found.compiler == committed
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_no_spills_and_no_local_memory(compiled: facts.Facts, arch: str) -> None:
    kernels = compiled.chosen(arch=arch)
    assert [k for k in kernels if k["local_bytes"]] == []
    assert all(0 < k["registers"] <= (255 if arch.startswith("sm_") else 512) for k in kernels)
    # the least of what a program may take without asking for more
    assert all(k["shared_bytes"] <= 48 << 10 for k in kernels)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_output_is_written_128_bits_at_a_time(compiled: facts.Facts, arch: str) -> None:
    wide = ["STG.E.128"] if arch.startswith("sm_") else ["global_store_dwordx4"]
    for kernel in compiled.chosen(arch=arch, kernel="expand"):
        assert kernel["stores"] == wide, kernel
        assert any("128" in load or "x4" in load for load in kernel["loads"]), kernel


def test_the_budget_of_instructions(compiled: facts.Facts) -> None:
    """At most 24 for each output element, bfloat16, three adapters of rank 16, on sm_90."""
    (kernel,) = compiled.chosen(
        arch="sm_90", kernel="expand", dtype="bfloat16", draw="shared", adapters=3, rank=16
    )
    print("instructions for each element:", kernel["instructions_per_element"])
    assert kernel["instructions_per_element"] <= 24


def test_the_committed_facts(compiled: facts.Facts) -> None:
    assert compiled.text() == facts.path("triton").read_text(encoding="utf-8")


def test_every_configuration_is_among_those_compiled() -> None:
    """Over all sizes, what the launch configuration may return differs only in counts from it."""
    from lora_ortho.triton_kernels import launch_config as config
    from triton_variants import GPUS, variants

    def kinds(gpu: config.Gpu, sizes: config.Sizes) -> set[tuple[object, ...]]:
        e = config.expand(gpu, sizes)
        hoisted = (sizes.adapters, sizes.width) if e.hoist else ()
        tile = (e.block_m, e.block_n, e.chunk, e.hoist, e.warps, e.max_registers)
        found: set[tuple[object, ...]] = {(gpu.arch, sizes.itemsize, "expand", *tile, *hoisted)}
        for name in ("grad_s", "grad_B"):
            b = getattr(config, name)(gpu, sizes)
            sums = (b.block_m, b.block_n, b.chunk, b.group, b.warps)
            found.add((gpu.arch, sizes.itemsize, name, *sums))
        return found

    covered = set()
    for variant in variants():
        if variant.draw == "shared":
            width = config.width_of(variant.rank or 13)
            sizes = config.Sizes(8192, 4096, variant.adapters, width, variant.dtype.itemsize)
            covered |= kinds(variant.gpu, sizes)
    all_sizes = itertools.product(
        (1, 16, 300, 8192, 1 << 20), (7, 768, 14336), (1, 2, 3, 4, 5, 32, 255),
        (16, 32, 64, 128, 256), (2, 4), GPUS,
    )  # fmt: skip
    for tokens, d_out, adapters, width, itemsize, gpu in all_sizes:
        missing = kinds(gpu, config.Sizes(tokens, d_out, adapters, width, itemsize)) - covered
        assert not missing


def test_configurations_of_unknown_gpus_are_the_defaults() -> None:
    from lora_ortho.triton_kernels import launch_config as config

    sizes = config.Sizes(8192, 4096, 3, 16, 2)
    for function in (config.expand, config.grad_s, config.grad_B):
        unknown = function(config.Gpu("sm_999", 132), sizes)
        assert unknown == function(config.Gpu("sm_86", 132), sizes)
        assert unknown == function(config.Gpu("gfx1100", 132), sizes)
        assert str(unknown).startswith(type(unknown).__name__ + "(block_m=")


def test_counting_instructions() -> None:
    from triton_facts import per_element

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
