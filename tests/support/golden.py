"""The golden files of the mask stream."""

from __future__ import annotations

from pathlib import Path

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def golden_lines(*directives: str) -> list[tuple[list[str], list[str]]]:
    """Arguments and results of the golden lines of some directives, from all files."""
    found = []
    for name in ("mask_stream.kat", "independent.kat", "strata.kat"):
        for line in (GOLDEN / name).read_text().splitlines():
            arguments, _, results = line.partition(" -> ")
            if arguments.split(" ")[0] in directives:
                found.append((arguments.split()[1:], results.split()))
    return found
