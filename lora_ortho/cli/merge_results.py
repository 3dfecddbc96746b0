"""Results of a merge: the folder they go to, whole; and what is kept of a run that failed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .console import CliError, one_line, to_json

RESULT = "comparison.json"  # in every folder of results; --force replaces no other folder
UNFINISHED = ".unfinished"  # behind the name of a folder that a failed run leaves


class Made(NamedTuple):
    """A comparison: as plain data and as text, and what writes further files into its folder."""

    result: dict[str, Any]
    text: str
    write: Callable[[Path], object] = lambda folder: None


class Unfinished(Exception):
    """A row failed, by its cause, after others had been finished.

    Attributes:
        made: the rows that were finished.
        row: the one that failed.
    """

    def __init__(self, made: Made, row: str) -> None:
        super().__init__(row)
        self.made, self.row = made, row


def check_results(out: Path, force: bool) -> None:
    """Refuses a folder of results that exists, and with --force any that holds something else."""
    if not _replaceable(out):
        if not force:
            raise CliError(f"{out} exists; --force replaces it")
        if not (out / RESULT).is_file():
            raise CliError(f"{out} holds no {RESULT}, so --force does not replace it")
    kept = out.with_name(out.name + UNFINISHED)
    if not _replaceable(kept) and not (kept / RESULT).is_file():
        raise CliError(f"{kept} is in the way of results that a failure would leave")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CliError(f"{out}: {parent} is no folder that can be written to")


def _replaceable(out: Path) -> bool:
    """Whether nothing, or an empty folder, is there."""
    return not out.exists() or (out.is_dir() and not any(out.iterdir()))


def write_results(out: Path, made: Made) -> None:
    """A folder with comparison.json, comparison.txt and further files: whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".writing-") as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        (new / RESULT).write_text(to_json(made.result) + "\n", encoding="utf-8")
        (new / "comparison.txt").write_text(made.text + "\n", encoding="utf-8")
        made.write(new)
        if out.exists():
            os.replace(out, Path(scratch) / "old")
        try:
            os.replace(new, out)
        except OSError:
            if (Path(scratch) / "old").exists():
                shutil.move(Path(scratch) / "old", out)
            raise


def keep(stop: Unfinished, out: Path | None) -> str:
    """Writes the finished rows of a run that failed; the line that says so.

    They go to a folder beside `out`, which holds whole comparisons only; a row of "unfinished"
    says why. Without `out` the caller prints them.
    """
    cause = stop.__cause__
    reason = "interrupted" if isinstance(cause, KeyboardInterrupt) else one_line(cause or stop)
    made = stop.made
    made.result["unfinished"] = {"row": stop.row, "error": reason}
    line = f"unfinished: {stop.row}: {reason}"
    made = made._replace(text=f"{made.text}\n\n{line}")
    stop.made = made
    if out is None:
        return f"{stop.row}: {reason}; the rows that were finished are printed"
    kept = out.with_name(out.name + UNFINISHED)
    write_results(kept, made)
    return f"{stop.row}: {reason}; the rows that were finished are in {kept}"
