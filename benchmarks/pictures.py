"""What the pictures of a result show; drawing.py draws them.

A picture's data is taken from the result alone. Its hash stands in the picture's file, so that a
picture which no longer shows its result is noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .cases import MEMORY_TOKENS, Case
from .record import Quartiles, Result, encode
from .targets import View, shown_cases, views

IMAGES = Path("docs/images")
_MIB = 2**20


@dataclass(frozen=True)
class Column:
    """Time by that of direct, a value for each case; None where it was not measured."""

    title: str
    forward: list[Quartiles | None]
    backward: list[Quartiles | None]


@dataclass(frozen=True)
class Ratios:
    """Every case measured, forward and forward with backward, in every column of a result."""

    kind: str
    cases: list[Case]
    columns: list[Column]


@dataclass(frozen=True)
class Lines:
    """A contender's values by size; of seconds against K, of MiB against tokens."""

    kind: str
    title: str
    lines: dict[str, dict[int, float]] = field(default_factory=dict)


Data = Ratios | Lines


def ratio(result: Result) -> Ratios | None:
    """Time by that of direct."""
    columns, sections = views(result), ("forward", "backward")
    cases = [
        case
        for case in shown_cases(result)
        if any(_ratio(view, section, case) for view in columns for section in sections)
    ]
    found = [
        Column(
            view.title, *([_ratio(view, section, case) for case in cases] for section in sections)
        )
        for view in columns
    ]
    return Ratios(result.kind, cases, found) if cases else None


def _ratio(view: View, section: str, case: Case) -> Quartiles | None:
    rows = view.of(view.result.rows(section))
    return next((row.ratios.get("ours/direct") for row in rows if row.case == case), None)


def adapters(result: Result) -> Lines | None:
    """Seconds of one forward pass against K, by contender."""
    lines: dict[str, dict[int, float]] = {}
    title = ""
    for row in result.scaling:
        if row.axis == "K":
            t, d_in, d_out, _, rank = row.case
            title = f"{t} × {d_in} × {d_out}, rank {rank}, {row.dtype}"
            for name, times in row.seconds.items():
                lines.setdefault(name, {})[row.size] = times.median
    return Lines(result.kind, title, lines) if lines else None


def memory(result: Result) -> Lines | None:
    """MiB of one forward pass beyond inputs, output and s, against tokens, by contender."""
    lines: dict[str, dict[int, float]] = {}
    for row in result.memory:
        if row.case in MEMORY_TOKENS and row.forward_bytes is not None:
            mib = round(max(0, row.forward_bytes) / _MIB, 2)
            lines.setdefault(row.contender, {})[row.case.tokens] = mib
    _, d_in, d_out, count, rank = MEMORY_TOKENS[0]
    title = f"{d_in} × {d_out}, K = {count}, r = {rank}, float32"
    return Lines(result.kind, title, lines) if lines else None


PICTURES: dict[str, Callable[[Result], Data | None]] = {
    "ratio": ratio, "adapters": adapters, "memory": memory,
}  # fmt: skip
DESCRIPTIONS = {
    "ratio": "Time of each case relative to the direct merge, forward and with backward",
    "adapters": "Time of one forward pass against the number of adapters: direct, paper, ours",
    "memory": "Memory beyond inputs and outputs against tokens: direct, paper, ours",
}


def digest(data: Data) -> str:
    """A hash of a picture's data."""
    return hashlib.sha256(json.dumps(encode(data), sort_keys=True).encode()).hexdigest()


def path_of(result: Result, name: str) -> Path:
    """Where a picture of a result lies, relative to the repository."""
    return IMAGES / f"bench_{result.kind.split('-')[0]}_{name}.svg"


def present(result: Result) -> dict[str, Data]:
    """The data of every picture for which a result has some."""
    found = {name: take(result) for name, take in PICTURES.items()}
    return {name: data for name, data in found.items() if data is not None}
