"""Who computes: every backend present, the CPU kernels once for each instruction set."""

from __future__ import annotations

import pytest

from lora_ortho.backends import cpu


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
