"""How often the CPU backend packs."""

from __future__ import annotations

from typing import Any

import pytest

from lora_ortho.backends import cpu

NEEDS_KERNELS = pytest.mark.skipif(
    cpu.unavailable() is not None, reason=f"no kernels: {cpu.unavailable()}"
)


def count_packs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one whenever the CPU backend packs; it packs as ever."""
    counted: list[int] = []
    pack = cpu.pack

    def counting(*arguments: Any, **named: Any) -> Any:
        counted.append(1)
        return pack(*arguments, **named)

    monkeypatch.setattr(cpu, "pack", counting)
    return counted
