"""What changed between two result files: ``python -m benchmarks.compare OLD NEW --beyond 1.1``.

Compares, row by row, ours by each peer (so that a slower machine alone changes nothing), memory,
speed-up over threads, and with --seconds the times themselves. Exit status: 0 where nothing of ours
became worse by more than the factor, 1 where something did, was refused or is gone, 2 where the
files cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from . import record
from .record import SECTIONS, MemoryRow, ModelRow, Result, Row, ThreadsRow, TimedRow

_SMALL_BYTES = 1 << 18  # memory is exact to about 0.1 MiB


class Figure(NamedTuple):
    """One number of a row, with its quartiles; the larger, the worse for ours."""

    median: float
    low: float
    high: float


class Change(NamedTuple):
    """What became of one figure.

    Attributes:
        name: section, case, dtype, backend and figure.
        factor: new by old; above 1 is worse. None where one of both lacks it.
        words: the values, or why there is none.
        clear: False where the quartiles of old and new overlap.
    """

    name: str
    factor: float | None
    words: str
    clear: bool


def _figures(row: Row, seconds: bool) -> Iterator[tuple[str, Figure]]:
    """The figures of a row by name."""
    if isinstance(row, TimedRow | ModelRow):
        for name, q in row.ratios.items():
            above, _, below = name.partition("/")
            if below == "ours":  # how many times faster: turned round, so that more is worse
                yield f"ours/{above}", Figure(1 / q.median, 1 / q.q3, 1 / q.q1)
            elif above == "ours" or (above, below) == ("several", "one"):
                yield name, Figure(q.median, q.q1, q.q3)
        if seconds:
            for name, q in row.seconds.items():
                yield f"seconds of {name}", Figure(q.median, q.q1, q.q3)
    if isinstance(row, ThreadsRow):
        q = row.speedup["ours"]
        yield "one thread's share", Figure(1 / q.median, 1 / q.q3, 1 / q.q1)
    if isinstance(row, MemoryRow) and row.contender == "ours":
        for name, found in (("forward", row.forward_bytes), ("backward", row.backward_bytes)):
            if found is not None:
                size = float(max(_SMALL_BYTES, found))
                yield f"{name} bytes", Figure(size, size, size)


def changes(old: Result, new: Result, seconds: bool = False) -> list[Change]:
    """Every figure that both have, and those that are gone from ``new`` or refused there."""
    found: list[Change] = []
    for section in SECTIONS:
        fresh = {record.key(row): row for row in new.rows(section)}
        for row in old.rows(section):
            name, now = " ".join((section, *record.key(row))), fresh.get(record.key(row))
            found += _row_changes(name, row, now, seconds)
    return found


def _row_changes(name: str, old: Row, new: Row | None, seconds: bool) -> Iterator[Change]:
    figures = dict(_figures(old, seconds))
    if new is None:
        if figures:
            yield Change(name, None, "no such row any more", True)
        return
    now = dict(_figures(new, seconds))
    for figure, was in figures.items():
        if figure not in now:
            yield Change(f"{name}: {figure}", None, f"gone; refused: {new.refused}", True)
            continue
        is_ = now[figure]
        clear = is_.low > was.high or is_.high < was.low
        words = f"{was.median:.4g} -> {is_.median:.4g}"
        yield Change(f"{name}: {figure}", is_.median / was.median, words, clear)


def report(found: Sequence[Change], beyond: float) -> tuple[str, bool]:
    """What changed by more than a factor, the worst first; and whether that includes the worse."""
    gone = [change for change in found if change.factor is None]
    moved = [c for c in found if c.factor is not None and not 1 / beyond <= c.factor <= beyond]
    moved.sort(key=lambda change: -(change.factor or 0))
    worse = [change for change in moved if (change.factor or 0) > 1]
    lines = [f"{'GONE':>6}  {change.name}: {change.words}" for change in gone]
    for change in moved:
        word = "WORSE" if change in worse else "better"
        note = "" if change.clear else "  (their quartiles overlap)"
        lines.append(f"{word:>6}  x{change.factor:.2f}  {change.name}: {change.words}{note}")
    count = len(found) - len(gone)
    lines.append(
        f"{count} figures compared; beyond a factor of {beyond:g}: {len(worse)} worse, "
        f"{len(moved) - len(worse)} better; {len(gone)} gone"
    )
    return "\n".join(lines), bool(worse or gone)


def _factor(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 1, got {text!r}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--beyond", type=_factor, default=1.1, help="factor; 1.1 unless given")
    parser.add_argument("--seconds", action="store_true", help="compare times too, not only ratios")
    arguments = parser.parse_args(argv)
    try:
        old, new = record.load(arguments.old), record.load(arguments.new)
    except record.ResultError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if old.kind != new.kind:
        print(f"error: of different machines: {old.kind} and {new.kind}", file=sys.stderr)
        return 2
    was, now = ({**vars(result.machine), **result.versions} for result in (old, new))
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            print(f"{name}: {was.get(name)} -> {now.get(name)}")
    text, worse = report(changes(old, new, arguments.seconds), arguments.beyond)
    print(text)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
