"""The C++ tests, as they are and under AddressSanitizer and UBSan; the mask stream in CUDA."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
from native import ROOT, build, environment, run

TESTS = [
    *["test_mask_stream", "test_kernels", "test_api", "test_headers"],
    *["test_cuda_api", "test_cuda_kernels"],
]
ISAS = ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]
INCLUDE = ROOT / "csrc" / "include"


@cache
def output_of(preset: str, test: str) -> str:
    """What one C++ test program prints."""
    return run([build(preset) / "tests" / "cpp" / test], variables={"OMP_WAIT_POLICY": "passive"})


@pytest.mark.parametrize("preset", ["release", "sanitized"])
@pytest.mark.parametrize("test", TESTS)
def test_program(preset: str, test: str) -> None:
    output = output_of(preset, test)
    assert re.search(r"^[1-9]\d* passed, 0 failed$", output, re.MULTILINE), output


def test_fuzzed_arguments() -> None:
    """200000 inputs under AddressSanitizer and UBSan; every status that a check gives occurs."""
    output = output_of("sanitized", "fuzz_arguments")
    print(output)
    assert re.search(r"^200000 inputs tried, [1-9]\d{4,} calls accepted$", output, re.MULTILINE)
    assert len(re.findall(r"^ +[1-9]\d* ", output, re.MULTILINE)) >= 12, output


def test_threads_without_races() -> None:
    """The library and its C interface under ThreadSanitizer, many calls at once."""
    output = output_of("threads", "test_threads")
    assert re.search(r"^[1-9]\d* passed, 0 failed$", output, re.MULTILINE), output


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_set(isa: str) -> None:
    found = re.search(rf"^  {isa}: (.*)$", output_of("release", "test_kernels"), re.MULTILINE)
    assert found
    if found[1] != "tested":
        pytest.skip(f"{isa} kernels: {found[1]}")


@pytest.mark.parametrize("test", ["kernels_keep_their_symbols", "library_exports_its_interface"])
def test_symbols(test: str) -> None:
    folder = build("release")
    run(["ctest", "--output-on-failure", "--no-tests=error", "-R", f"^{test}$"], cwd=folder)


@pytest.mark.parametrize("standard", ["c99", "c11"])
def test_headers_are_plain_c(standard: str, tmp_path: Path) -> None:
    strict = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror"]
    for header in sorted((INCLUDE / "lora_ortho").glob("*.h")):
        source = tmp_path / "alone.c"
        source.write_text(f'#include "lora_ortho/{header.name}"\n', encoding="utf-8")
        run(["cc", f"-std={standard}", *strict, "-I", INCLUDE, "-c", source, "-o", tmp_path / "o"])


def test_mask_stream_in_cuda(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("mask_stream.h in CUDA: nvcc is not installed")
    source, program = ROOT / "tests" / "cpp" / "device_draws.cu", tmp_path / "device_draws"
    run(["nvcc", "-Werror", "all-warnings", "-I", INCLUDE, source, "-o", program])
    output = run([program])
    assert "host: ok\n" in output
    if "device: not run" in output:
        pytest.skip("mask_stream.h in CUDA: compiled for device and host, run on the host only")
    assert "device: ok\n" in output


def test_a_failing_check_fails_the_program(tmp_path: Path) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text(
        '#include "check.h"\nTEST(good) { CHECK(true); }\nTEST(bad) { CHECK_EQ(1, 2); }\n'
        "TEST(empty) {}\n",
        encoding="utf-8",
    )
    folder, program = ROOT / "tests" / "cpp", tmp_path / "broken"
    run(["c++", "-std=c++17", "-I", folder, source, folder / "main.cpp", "-o", program])
    done = subprocess.run([program], capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 1
    assert "1 == 2: 1 is not 2" in done.stdout
    assert done.stdout.endswith("1 passed, 2 failed\n")
