"""Peak memory of a call, as the kernel counts it for a process of its own: outputs and no more.

"Outputs" are y and s forward; the gradients backward. Nothing else may be of the size of the
output, so what is left must not grow with it: 2 MiB whatever the size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_ortho.backends import cpu

LIMIT = 2 << 20

SCRIPT = """
import ctypes, gc, json, sys
import torch
from lora_ortho import Adapter, FusedOrthoLoRALinear, fused_ortho_lora

torch.set_num_threads(2)
tokens, d_in, d_out, count, rank = 2048, 512, 8192, 3, 16


def field(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024


def peak(function):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
    before = field("VmRSS")
    kept = function()
    return field("VmHWM") - before


def measure(what, dtype, method):
    x = torch.randn(tokens, d_in).to(dtype)
    base = torch.ones(tokens, d_out, dtype=dtype)
    lora_A = [torch.randn(rank, d_in).to(dtype) for _ in range(count)]
    lora_B = [torch.randn(d_out, rank).to(dtype) for _ in range(count)]
    size, elements = dtype.itemsize, rank * count * (d_in + d_out)

    def op():
        return fused_ortho_lora(x, lora_A, lora_B, base=base, seed=1, method=method, backend="cpu")

    if what == "backward":
        leaves = [t.requires_grad_() for t in (x, base, *lora_A, *lora_B)]
        grad = torch.ones((), dtype=dtype).expand(tokens, d_out)
        torch.autograd.grad(op(), leaves, grad)
        y = op()
        outputs = tokens * d_in * size + elements * size
        return peak(lambda: torch.autograd.grad(y, leaves, grad)), outputs
    if what == "module":  # it writes over the output of the base
        layer = torch.nn.Linear(d_in, d_out).to(dtype)
        adapters = [Adapter(A, B) for A, B in zip(lora_A, lora_B)]
        module = FusedOrthoLoRALinear(layer, adapters, method=method, backend="cpu")
        op = lambda: module(x)
    with torch.no_grad():
        op()
        return peak(op), tokens * (d_out + rank * count) * size


for dtype in (torch.float32, torch.bfloat16):
    for method in ("orthogonal", "dropout", "direct"):
        print(json.dumps([str(dtype), method, *measure(sys.argv[1], dtype, method)]))
"""


@pytest.mark.skipif(cpu.unavailable() is not None, reason=f"no kernels: {cpu.unavailable()}")
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs of Linux"
)
@pytest.mark.parametrize("what", ["forward", "module", "backward"])
def test_nothing_but_the_outputs(what: str) -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, what], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 6
    for dtype, method, peak, outputs in lines:
        case = f"{what}, {dtype}, {method}: {peak} bytes at the peak, {outputs} of them outputs"
        assert peak - outputs <= LIMIT, case
        assert peak - outputs >= -LIMIT, f"{case}: the measurement is wrong"
