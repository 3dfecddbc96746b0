"""What the pictures of a result show, and how a page shows them; figures.py draws them.

A picture's data is a plain value taken from the result. Its hash stands in the picture's file, so
that a picture which no longer shows its result is noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .record import Result
from .scaling import MEMORY_TOKENS
from .targets import NotMeasured, View, cases_of, shown_cases, views

IMAGES = Path("docs/images")
THEMES = ("light", "dark")
_MIB = 2**20
_QUARTILES = ("median", "q1", "q3")

Data = dict[str, Any]


def ratio(result: Result) -> Data | None:
    """Time by that of direct, of every case measured: forward, and forward with backward."""
    rows, cases, columns = [], [], []
    sections = ("forward", "backward")
    for case in shown_cases(result):
        found = {
            (view.title, section): _ratio(view, section, str(case))
            for view in views(result)
            for section in sections
        }
        if any(found.values()):
            cases.append(list(case))
            rows.append(found)
    for view in views(result):
        column = {section: [row[view.title, section] for row in rows] for section in sections}
        columns.append({"title": view.title, **column})
    return {"cases": cases, "columns": columns} if cases else None


def _ratio(view: View, section: str, case: str) -> list[float] | None:
    for row in view.result[section]:
        if (row["case"], row["dtype"], row["backend"]) == (case, view.dtype, view.backend):
            found = row.get("ratios", {}).get("ours/direct")
            return None if found is None else [found[name] for name in _QUARTILES]
    return None


def adapters(result: Result) -> Data | None:
    """Seconds against K, by contender."""
    lines: dict[str, dict[str, float]] = {}
    title = ""
    for row in result["scaling"]:
        if row.get("axis") == "K":
            title = f"{row['case'].split('-')[0]}, rank {row['case'].split('x')[-1]}"
            title += f", {row['dtype']}"
            for name, times in row.get("seconds", {}).items():
                lines.setdefault(name, {})[str(row["at"])] = times["median"]
    return {"title": title, "lines": lines} if lines else None


def roofline(result: Result) -> Data | None:
    """Operations a second against operations a byte, and the two ceilings, of every column."""
    columns = []
    for view in views(result):
        try:
            rates = view.ceilings()
        except NotMeasured:
            continue
        points = []
        for case in cases_of(result):
            try:
                row = view.find("forward", case)
            except NotMeasured:
                continue
            if "bytes" in row and "seconds" in row:
                seconds = {name: times["median"] for name, times in row["seconds"].items()}
                points.append(
                    {"case": list(case), "bytes": row["bytes"], "operations": row["operations"],
                     "seconds": seconds}
                )  # fmt: skip
        ceilings = [rates["copy_bytes_per_second"], rates["matmul_operations_per_second"]]
        if points:
            columns.append({"title": view.title, "ceilings": ceilings, "points": points})
    return {"columns": columns} if columns else None


def memory(result: Result) -> Data | None:
    """MiB of one forward pass beyond inputs, output and s, against tokens, by contender."""
    lines: dict[str, dict[str, float]] = {}
    cases = {str(case): case for case in MEMORY_TOKENS}
    for row in result["memory"]:
        if row["case"] in cases and "forward" in row:
            mib = round(max(0, row["forward"]) / _MIB, 2)
            lines.setdefault(row["contender"], {})[str(cases[row["case"]].tokens)] = mib
    sizes = f"{MEMORY_TOKENS[0].d_in} × {MEMORY_TOKENS[0].d_out}"
    many = f"K = {MEMORY_TOKENS[0].adapters}, r = {MEMORY_TOKENS[0].rank}, float32"
    return {"title": f"{sizes}, {many}", "lines": lines} if lines else None


PICTURES: dict[str, Callable[[Result], Data | None]] = {
    "ratio": ratio, "adapters": adapters, "roofline": roofline, "memory": memory,
}  # fmt: skip
_ALT = {
    "ratio": "Time of each case relative to the direct merge, forward and with backward",
    "adapters": "Time of one forward pass against the number of adapters: direct, paper, ours",
    "roofline": "Rate against arithmetic intensity under the measured ceilings, case by case",
    "memory": "Memory beyond inputs and outputs against tokens: direct, paper, ours",
}


def digest(data: Data) -> str:
    """A hash of a picture's data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def path_of(result: Result, name: str, theme: str) -> Path:
    """Where a picture of a result lies, relative to the repository."""
    return IMAGES / f"bench_{result['kind'].split('-')[0]}_{name}_{theme}.svg"


def present(result: Result) -> dict[str, Data]:
    """The data of every picture for which a result has some."""
    found = {name: take(result) for name, take in PICTURES.items()}
    return {name: data for name, data in found.items() if data is not None}


def markup(result: Result) -> str:
    """Every picture of a result as a page shows it, in light and dark."""
    lines = []
    for name in present(result):
        light, dark = (path_of(result, name, theme).as_posix() for theme in THEMES)
        lines += [
            "<picture>",
            f'  <source media="(prefers-color-scheme: dark)" srcset="{dark}">',
            f'  <img alt="{_ALT[name]}" src="{light}">',
            "</picture>",
            "",
        ]
    return "\n".join(lines).rstrip()
