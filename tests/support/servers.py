"""Who computes: every backend present, the CPU kernels once for each instruction set."""

from __future__ import annotations

import pytest

from lora_ortho.backends import cpu, triton


class Server(str):
    """A backend and, after a colon, its instruction set: "reference", "cpu:avx2", ..."""

    @property
    def backend(self) -> str:
        """The name to pass as ``backend``."""
        return self.split(":")[0]

    @property
    def isa(self) -> str | None:
        """The instruction set to cap the kernels at; None for a backend without any."""
        return self.split(":")[1] if ":" in self else None


def _servers() -> list[object]:
    found: list[object] = [Server("reference")]
    reason = cpu.unavailable()
    if reason is not None:
        return [*found, pytest.param(Server("cpu"), marks=pytest.mark.skip(reason=reason))]
    return [*found, *(Server(f"cpu:{isa}") for isa in cpu.instruction_sets())]


SERVERS = _servers()

# Triton's kernels on CPU tensors, in its interpreter: too slow to be one of SERVERS, so that the
# tests of test_triton_*.py call what the others are put to, one by one.
TRITON = Server("triton")


def interpreted() -> pytest.MarkDecorator:
    """Skips where the Triton kernels run on a GPU, as tests/gpu has them do, or not at all."""
    reason = triton.unavailable()
    if reason is None and not triton.interpreted():
        reason = "the Triton kernels are compiled for the GPU here, and tests/gpu runs them"
    return pytest.mark.skipif(reason is not None, reason=str(reason))
