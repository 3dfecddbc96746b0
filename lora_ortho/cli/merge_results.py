"""Results of a merge: the folder they go to, whole; and what is kept of a run that failed."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lora_ortho.messages import one_line

from .console import CliError, to_json

RESULT = "comparison.json"  # in every folder of results; --force replaces no other folder
TEXT, GRID = "comparison.txt", "grid.png"
FILES = frozenset([RESULT, TEXT, GRID])
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
        _check_ours(out, "so --force does not replace the folder")
    kept = out.with_name(out.name + UNFINISHED)
    if not _replaceable(kept):
        if not (kept / RESULT).is_file():
            raise CliError(f"{kept} is in the way of results that a failure would leave")
        _check_ours(kept, "and a failure would replace the folder")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CliError(f"{out}: {parent} is no folder that can be written to")


def _check_ours(folder: Path, consequence: str) -> None:
    """CliError where a folder of results holds what no merge wrote."""
    rows = _rows_of_pictures(folder / RESULT)
    for path in sorted(folder.rglob("*")):
        where = path.relative_to(folder).parts
        if path.is_dir():
            known = len(where) == 1 and where[0] in rows
        elif len(where) == 1:
            known = where[0] in FILES
        else:
            known = len(where) == 2 and re.fullmatch(r"\d+\.png", where[1]) is not None
        if not known:
            raise CliError(f"{path} is no result of a merge, {consequence}")


def _rows_of_pictures(result: Path) -> set[str]:
    """The folders of pictures that a comparison says it has; none where it cannot be read."""
    try:
        rows = json.loads(result.read_text(encoding="utf-8"))["difference"]
        return {folder_of(row) for row in rows}
    except (ValueError, TypeError, KeyError):
        return set()


def folder_of(row: str) -> str:
    """The name of the folder with the pictures of a row."""
    return row.replace("/", "_")


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
        (new / TEXT).write_text(made.text + "\n", encoding="utf-8")
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
