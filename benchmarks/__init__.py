"""Benchmarks: what a merge costs beside its peers, on this machine.

``python -m benchmarks`` in a source checkout, ``lora-ortho bench`` where the package is installed,
which has this one as ``lora_ortho.benchmarks``.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save; see ``run.main``."""
    from . import run

    return run.main(argv)
