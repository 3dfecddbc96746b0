"""`make gpu` where there is no GPU: stages, the environment, what is built, and the probe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gpu_run
import pytest
import torch
from native import ROOT

_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks.stored_mask import _drop_and_shrink as kernel
types = dict.fromkeys(("x_ptr", "a_ptr", "s_ptr"), "*bf16") | {"mask_ptr": "*i8", "keep": "fp32"}
types |= dict.fromkeys(("seed", "tokens", "d_in", "rank", "rank_sum"), "i32")
constants = {"TOKENS": 32, "FEATURES": 64, "RANK": 16, "WIDE": False}
types |= dict.fromkeys(constants, "constexpr")
source = ASTSource(fn=kernel, signature=types, constexprs=constants)
for arch in (80, 90):
    print(len(triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["cubin"]))
"""


def _python(
    *words: str | Path, program: str | Path = sys.executable, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET",)}
    return subprocess.run(
        [program, *words], cwd=ROOT, env=environment | variables, text=True,
        capture_output=True, check=False,
    )  # fmt: skip


def test_stored_mask_compiles_for_gpus() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    done = _python("-c", _COMPILE)
    assert done.returncode == 0, done.stderr
    assert [int(size) > 1000 for size in done.stdout.split()] == [True, True]


def test_a_stage_that_fails_hides_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    stages = gpu_run.Run(rehearsal=False, total=60.0)
    python = sys.executable
    assert stages.stage("one", [python, "-c", "print('here')"], 30) == "here\n"
    assert stages.stage("two", [python, "-c", "raise SystemExit(3)"], 30) is None
    # a stage that does not end, with a process of its own that does not either
    held = "import subprocess; subprocess.run(['sleep', '60'])"
    assert stages.stage("three", [python, "-c", held], 1.0) is None
    stages.absent("four", "not here")
    assert stages.stage("five", [python, "-c", "print(5)"], 30) == "5\n"
    found = {outcome.name: outcome.status for outcome in stages.outcomes}
    assert found == {
        "one": "ok", "two": "failed", "three": "out of time", "four": "absent", "five": "ok",
    }  # fmt: skip
    assert [outcome.name for outcome in stages.outcomes if outcome.bad] == ["two", "three"]
    assert stages.outcomes[2].seconds < 10
    over = gpu_run.Run(rehearsal=False, total=-1.0)
    assert over.stage("late", [python, "-c", "print(1)"], 30) is None
    assert over.outcomes[0].status == "out of time"
    assert "three: out of time" in capsys.readouterr().err


def test_a_gpu_run_without_a_gpu_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    done = _python(
        "tools/gpu_run.py", "--no-build", "--no-tests", **{gpu_run.REHEARSAL: "0"}
    )  # fmt: skip
    assert done.returncode == 1
    assert "torch sees no GPU" in done.stdout


def test_the_kernels_that_sanitizers_run_are_right() -> None:
    done = _python("-m", "tools.gpu_probe", "--backend", "reference")
    assert done.returncode == 0, done.stderr
    assert [line.endswith("reference: right") for line in done.stdout.splitlines()] == [True] * 6


def test_a_gpu_run_builds_for_that_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [gpu_run.architecture(text) for text in ("8.0", "9.0\n", "12.0", "[N/A]", "")]
    assert found == ["80-real", "90a-real", "120-real", None, None]
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 9.0\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpu_run.build_variables(False)["LORA_ORTHO_CUDA_ARCHITECTURES"] == "90a-real"
    assert gpu_run.build_variables(True)["LORA_ORTHO_CUDA"] == "0"


def test_environment_of_a_gpu_run_sees_this_one(tmp_path: Path) -> None:
    python = gpu_run.environment(tmp_path / "venv")
    code = "import sys, torch; print(sys.prefix); print(torch.__version__)"
    done = _python("-c", code, program=python)
    assert done.stdout.split() == [str(tmp_path / "venv"), torch.__version__], done.stderr
