"""Peak memory of one call beyond its inputs, its output and s: a fresh process for each case.

The kernel's own count (VmHWM), so that it holds whatever any library allocates. In that process
every allocation of 64 KiB or more is a mapping of its own that is given back when freed, and no
huge page rounds it up: nothing can hide in memory that was free before.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lora_ortho
from benchmarks import peers
from benchmarks.cases import DTYPES, SEED, Case, Inputs, make

_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}
_FORWARDS: dict[str, Callable[[Inputs], peers.Forward]] = {
    "ours": peers.ours,
    "direct": peers.direct,
    "paper": peers.paper,
    "categorical": peers.categorical,
}
_PR_SET_THP_DISABLE = 41


def unavailable() -> str | None:
    """Why memory cannot be measured here; None where it can."""
    return None if Path("/proc/self/clear_refs").exists() else "needs Linux's /proc/self/clear_refs"


def extra(case: Case, dtype: str, contender: str) -> dict[str, int]:
    """Bytes beyond inputs, output and s, in "forward" and, for ours and direct, "backward".

    Raises:
        RuntimeError: the process that measures failed.
    """
    command = [sys.executable, "-m", "benchmarks.memory", str(case), dtype, contender]
    done = subprocess.run(
        command, env=os.environ | _ENVIRONMENT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    found: dict[str, int] = json.loads(done.stdout)
    return found


def _status(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def _peak(call: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes that a call needed at its peak, its result included; and the result."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    result = call()
    return _status("VmHWM") - before, result


def _forward(inputs: Inputs, contender: str) -> int:
    call = _FORWARDS[contender](inputs)
    with torch.no_grad():
        peak, y = _peak(call)
    case = inputs.case
    s_bytes = int(y.element_size()) * case.tokens * case.adapters * case.rank
    return peak - int(y.nbytes) - s_bytes


def _backward(inputs: Inputs, contender: str) -> int:
    if contender == "direct":
        A, B = torch.cat(inputs.lora_A), torch.cat(inputs.lora_B, 1)
        leaves = [t.detach().requires_grad_() for t in (inputs.x, inputs.base, A, B)]
        y = torch.addmm(leaves[1], leaves[0] @ leaves[2].T, leaves[3].T)
    else:
        tensors = (inputs.x, inputs.base, *inputs.lora_A, *inputs.lora_B)
        leaves = [t.detach().requires_grad_() for t in tensors]
        half = len(inputs.lora_A)
        y = lora_ortho.fused_ortho_lora(
            leaves[0], leaves[2 : 2 + half], leaves[2 + half :], base=leaves[1], seed=SEED,
            backend="cpu",
        )  # fmt: skip
    peak, found = _peak(lambda: torch.autograd.grad(y, leaves, inputs.grad, retain_graph=True))
    made = (t for t in found if t.data_ptr() != inputs.grad.data_ptr())
    return peak - sum(int(t.nbytes) for t in made)


def _main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    case, dtype, contender = Case.parse(sys.argv[1]), DTYPES[sys.argv[2]], sys.argv[3]
    inputs = make(case, dtype)
    # Loads the code and starts the threads, on sizes too small to leave room for the real ones.
    small = make(case._replace(tokens=16, d_in=128, d_out=128), dtype)
    _forward(small, contender)
    found = {}
    trains = contender in ("ours", "direct")
    if trains:
        _backward(small, contender)
    found["forward"] = _forward(inputs, contender)
    if trains:
        found["backward"] = _backward(inputs, contender)
    print(json.dumps(found))


if __name__ == "__main__":
    _main()
