"""Peak memory of one call beyond its inputs, its output and s.

On a processor: a fresh process for each case and the kernel's own count (VmHWM), so that it holds
whatever any library allocates. In that process every allocation of 64 KiB or more is a mapping of
its own that is given back when freed, and no huge page rounds it up: nothing can hide in memory
that was free before. On a GPU: the most that torch's allocator had handed out.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import peers
from .cases import DTYPES, Case, Inputs, make
from .device import Device

_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}
_FORWARDS: dict[str, Callable[[Inputs], peers.Forward]] = {
    "direct": peers.direct,
    "paper": peers.paper,
    "categorical": peers.categorical,
}
_TRAINED = ("ours", "direct")  # those whose backward pass is measured too
_PR_SET_THP_DISABLE = 41


class Peaks(NamedTuple):
    """Bytes of one pass; None where a pass was not measured."""

    forward_bytes: int | None
    backward_bytes: int | None


def unavailable() -> str | None:
    """Why memory cannot be measured here; None where it can."""
    return None if Path("/proc/self/clear_refs").exists() else "needs Linux's /proc/self/clear_refs"


def beyond(case: Case, dtype: str, contender: str, backend: str) -> Peaks:
    """Bytes beyond inputs, output and s; backward for ours and direct only.

    Raises:
        RuntimeError: the process that measures failed.
    """
    command = [sys.executable, "-m", f"{__package__}.memory", str(case), dtype, contender, backend]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return Peaks(*json.loads(done.stdout))


def _environment() -> dict[str, str]:
    """This process's, with the folder of this package where Python looks for packages."""
    above = Path(__file__).resolve().parents[(__package__ or "").count(".") + 1]
    paths = [str(above), os.environ.get("PYTHONPATH", "")]
    return os.environ | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def on_gpu(inputs: Inputs, contender: str, backend: str, device: Device) -> Peaks:
    """As :func:`beyond`, by the allocator's own count in this process."""
    call = _forward_call(inputs, contender, backend)
    with torch.no_grad():
        forward = device.peak(call)
    if forward is not None:
        forward = max(0, forward - _s_bytes(inputs))
    if contender not in _TRAINED:
        return Peaks(forward, None)
    backward = device.peak(_backward_call(inputs, contender, backend)[0])
    return Peaks(forward, None if backward is None else max(0, backward))


def _s_bytes(inputs: Inputs) -> int:
    case = inputs.case
    return inputs.x.element_size() * case.tokens * case.adapters * case.rank


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


def _forward_call(inputs: Inputs, contender: str, backend: str) -> peers.Forward:
    if contender == "ours":
        return peers.ours(inputs, backend)
    return _FORWARDS[contender](inputs)


def _backward_call(
    inputs: Inputs, contender: str, backend: str
) -> tuple[Callable[[], list[torch.Tensor]], torch.Tensor]:
    """The backward pass of a forward pass that was done, as a call; and its output."""
    y, leaves = peers.recorded(inputs, contender, backend)

    def call() -> list[torch.Tensor]:
        found = torch.autograd.grad(y, leaves, inputs.grad, retain_graph=True)
        return [t for t in found if t.data_ptr() != inputs.grad.data_ptr()]

    return call, y


def _forward(inputs: Inputs, contender: str, backend: str) -> int:
    call = _forward_call(inputs, contender, backend)
    with torch.no_grad():
        peak, y = _peak(call)
    return peak - int(y.nbytes) - _s_bytes(inputs)


def _backward(inputs: Inputs, contender: str, backend: str) -> int:
    call, _ = _backward_call(inputs, contender, backend)
    peak, found = _peak(call)
    return peak - sum(int(t.nbytes) for t in found)


def _main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    case, dtype, *whose = Case.parse(sys.argv[1]), DTYPES[sys.argv[2]], *sys.argv[3:]
    contender, backend = whose
    inputs = make(case, dtype)
    # Loads the code and starts the threads, on sizes too small to leave room for the real ones.
    small = make(case._replace(tokens=16, d_in=128, d_out=128), dtype)
    _forward(small, contender, backend)
    backward = None
    if contender in _TRAINED:
        _backward(small, contender, backend)
    forward = _forward(inputs, contender, backend)
    if contender in _TRAINED:
        backward = _backward(inputs, contender, backend)
    print(json.dumps(Peaks(forward, backward)))


if __name__ == "__main__":
    _main()
