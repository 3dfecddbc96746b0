"""Instructions that draw + expand + add issues for each element, from the compile-time tables.

docs/triton_kernels.md and docs/cuda_kernels.md hold them for K = 3, r = 16 and orthogonal masks,
read off the machine code and not measured. With a GPU's clock they bound the rate of elements.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
LANES = 4 * 32  # instructions that a multiprocessor issues at once, in threads


def per_element(backend: str, capability: str, dtype: str, docs: Path = DOCS) -> float | None:
    """For a GPU of a capability such as "9.0"; None where the tables do not say."""
    path = docs / f"{backend}_kernels.md"
    if not path.is_file():
        return None
    arch = "sm_" + capability.replace(".", "")
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.lstrip().startswith("|")
    ]
    return (_triton if backend == "triton" else _cuda)(rows, arch, dtype)


def _triton(rows: list[list[str]], arch: str, dtype: str) -> float | None:
    """A column for each architecture; a cell is "registers, instructions"."""
    column: int | None = None
    for row in rows:
        if "K × r" in row:
            column = row.index(arch) if arch in row else None
        elif column is not None and row[1:4] == [dtype, "orthogonal", "3 × 16"]:
            found = re.fullmatch(r"\d+, (\d+(?:\.\d+)?)", row[column])
            if found and "forward" in row[0]:
                return float(found[1])
    return None


def _cuda(rows: list[list[str]], arch: str, dtype: str) -> float | None:
    """A row for each dtype and architecture; first where the keep probabilities sum to 1."""
    names = (f"{dtype}, {arch}", f"{dtype}, {arch}a")
    counts = [row[1] for row in rows if row[0] in names and len(row) > 1]
    return float(counts[0]) if counts and re.fullmatch(r"\d+(\.\d+)?", counts[0]) else None


def bound(machine: dict[str, Any], instructions: float) -> float | None:
    """Elements a second that a GPU can issue at its highest clock; None where that is unknown."""
    clock = machine.get("clock_mhz")
    if not isinstance(clock, int):
        return None
    return float(machine["multiprocessors"]) * LANES * clock * 1e6 / instructions
