"""What compilers made of the GPU kernels: docs/facts/*.json, and the tables rendered from them.

    python tools/cuda_facts.py      compiles the CUDA kernels and writes cuda.json and its page
    python tools/triton_facts.py    compiles the Triton kernels and writes triton.json and its page
    python tools/facts.py           renders both pages again

A file is {"compiler": name and version, "kernels": [row, ...]}, a row for each kernel that ships on
each architecture. Keys of every row: kernel (a step), dtype, draw (the kinds of draw that it was
compiled for, null where it is told at run time or draws nothing), adapters and rank (null where it
serves any; rank 0: unequal ones), arch, registers (of a thread), local_bytes (spills and any other
local memory of a thread), instructions (in the whole kernel) and instructions_per_element (that a
thread issues for each element of its tiles; null where they cannot be counted).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- facts: begin -->\n", "<!-- facts: end -->\n"

Row = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """All rows of one compiler, in the order of the file."""

    compiler: str
    kernels: list[Row]

    def text(self) -> str:
        """As the file has them, a line for each row."""
        rows = ",\n".join("  " + json.dumps(row) for row in self.kernels)
        return f'{{\n "compiler": {json.dumps(self.compiler)},\n "kernels": [\n{rows}\n ]\n}}\n'

    def chosen(self, **wanted: object) -> list[Row]:
        """The rows with these values; LookupError where there are none."""
        found = [row for row in self.kernels if all(row[key] == wanted[key] for key in wanted)]
        if not found:
            raise LookupError(f"no facts of {wanted}")
        return found


def path(name: str) -> Path:
    """The file of "cuda" or "triton"."""
    return ROOT / "docs" / "facts" / f"{name}.json"


def page(name: str) -> Path:
    """The page with its tables."""
    return ROOT / "docs" / f"{name}_kernels.md"


def parse(text: str) -> Facts:
    """Facts from the text of a file."""
    return Facts(**json.loads(text))


def read(name: str) -> Facts:
    """The facts of "cuda" or "triton" as the repository has them."""
    return parse(path(name).read_text(encoding="utf-8"))


def save(name: str, facts: Facts) -> None:
    """Writes the file and the section of its page."""
    _replace(path(name), facts.text())
    render(name)


def render(name: str) -> None:
    """Writes the section of a page anew from its file."""
    text = page(name).read_text(encoding="utf-8")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    _replace(page(name), head + BEGIN + TABLES[name](read(name)) + END + tail)


def section(name: str) -> str:
    """What a page has between its marks."""
    return page(name).read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


def cuda_tables(facts: Facts) -> str:
    """Instructions for each element, then a line for each kernel and dtype, all architectures."""
    archs = _values(facts.kernels, "arch")
    lines = [
        "| expand, K = 3, r = 16 | every element owned | some unowned |",
        "| --- | ---: | ---: |",
    ]
    for row in facts.kernels:
        if row["instructions_per_element"] is not None:
            owned = f"{row['instructions_per_element']:.1f}"
            unowned = f"{row['instructions_per_element_some_unowned']:.1f}"
            lines.append(f"| {row['dtype']}, {row['arch']} | {owned} | {unowned} |")
    lines += [
        "",
        f"{facts.compiler}; registers and instructions on {', '.join(archs)}.",
        "",
        "| kernel | draw | variant | dtype | registers | instructions | local bytes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, rows in _grouped(facts.kernels, ("kernel", "draw", "variant", "dtype")):
        words = [word or "" for word in key]
        for column in ("registers", "instructions"):
            words.append(", ".join(str(row[column]) for row in rows))
        words.append(str(max(row["local_bytes"] for row in rows)))
        lines.append("| " + " | ".join(words) + " |")
    return "\n".join(lines) + "\n"


def triton_tables(facts: Facts) -> str:
    """A line for each kernel and problem, a column for each architecture."""
    archs = _values(facts.kernels, "arch")
    lines = [
        f"{facts.compiler}. Each cell: registers of a thread, instructions for each element of y "
        "or grad.",
        "",
        "| kernel | dtype | draw | K × r | " + " | ".join(archs) + " |",
        "| --- " * 4 + "| ---: " * len(archs) + "|",
    ]
    for key, rows in _grouped(facts.kernels, ("kernel", "dtype", "draw", "adapters", "rank")):
        words = [*key[:3], f"{key[3]} × {key[4] or 'unequal'}"]
        for row in rows:
            count = row["instructions_per_element"]
            words.append(f"{row['registers']}, " + ("-" if count is None else f"{count:.1f}"))
        lines.append("| " + " | ".join(words) + " |")
    most = max(row["local_bytes"] for row in facts.kernels)
    lines += ["", f"{len(facts.kernels)} kernels, at most {most} bytes of local memory or scratch."]
    return "\n".join(lines) + "\n"


def _values(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _grouped(rows: Sequence[Row], keys: Sequence[str]) -> list[tuple[tuple[Any, ...], list[Row]]]:
    """Rows that differ only in their architecture, together."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.items())


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


TABLES = {"cuda": cuda_tables, "triton": triton_tables}

if __name__ == "__main__":
    for each in TABLES:
        render(each)
