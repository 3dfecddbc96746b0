"""What the Triton backend declines, and the reason it gives."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from cases import Case, make, same_rank
from servers import interpreted

from lora_ortho import backends, fused_ortho_lora
from lora_ortho.backends import cpu

CASE = same_rank(3, 8, 16, 2, 4)

PROBE = """
import torch
from lora_ortho import backends, fused_ortho_lora
print(backends.available()["triton"])
x, A, B = torch.ones(3, 4), torch.ones(2, 4), torch.ones(5, 2)
try:
    fused_ortho_lora(x, [A], [B], seed=0, backend="triton")
except ValueError as error:
    print(error)
"""


def probe(**variables: str) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROBE]
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_without_a_gpu() -> None:
    reason, error = probe()
    assert reason == "torch sees no NVIDIA or AMD GPU (torch.cuda.is_available() is False)"
    assert error == f"backend 'triton' cannot serve this call: {reason}"


def test_without_triton(tmp_path: pytest.TempPathFactory) -> None:
    broken = tmp_path / "triton"  # type: ignore[operator]
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('not for this machine')")
    reason, error = probe(PYTHONPATH=str(tmp_path))
    assert reason == "triton cannot be imported: not for this machine"
    assert error == f"backend 'triton' cannot serve this call: {reason}"


@interpreted()
def test_dtypes_and_ranks_that_the_kernels_do_not_serve() -> None:
    for case, dtype, message in (
        (CASE, torch.float64, "x is torch.float64, and the kernels take float32, bfloat16 and fl"),
        (Case(2, 4, 8, (3, 257)), torch.float32, "a rank is 257, and .* ranks up to 256"),
    ):
        tensors = make(case, dtype)
        with pytest.raises(ValueError, match=f"^backend 'triton' cannot serve .* {message}"):
            fused_ortho_lora(*tensors[:3], seed=0, backend="triton")


@interpreted()
def test_the_interpreter_serves_only_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_ortho.problem import Place, Rule, check

    tensors = make(CASE, torch.float32)
    problem, _ = check(Rule.make(2, None, None, "direct"), *tensors[:3], None, Place())
    monkeypatch.setattr(cpu, "_REASON", "it was not built")
    assert backends.available()["triton"] is None
    assert backends.choose(None, problem) == "reference"
    assert backends.choose("triton", problem) == "triton"


@interpreted()
def test_other_devices() -> None:
    tensors = make(CASE, torch.float32)
    meta = [t.to("meta") for t in (tensors.x, *tensors.lora_A, *tensors.lora_B)]
    with pytest.raises(ValueError, match="x is on a meta device, and the kernels run on cpu or cu"):
        fused_ortho_lora(meta[0], meta[1:3], meta[3:], seed=0, backend="triton")
