"""What all commands share: errors, progress, output files, tables."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import threading
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from lora_ortho.messages import one_line

_QUIET_SECONDS = 1.0  # nothing is said of work that takes less


class CliError(RuntimeError):
    """Something the user can put right; the message is the one line to show."""


def in_words_of(error: BaseException, option: str) -> str:
    """A message that speaks of the argument `model`, for those who have an option instead."""
    return (
        one_line(error)
        .replace("as model, or choose with part=", f"as {option}")
        .replace("as model", f"as {option}")
    )


class Progress:
    """Lines on standard error: what is done now, with the seconds since the start.

    Silent for the first second, and with --quiet throughout. A step that lasts is shown though no
    other follows it: a timer says what is pending, until the end of the `with` block.
    """

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self._start = self._said = time.monotonic()
        self._pending: str | None = None
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._pending = None
            if self._timer is not None:
                self._timer.cancel()

    def __call__(self, text: str) -> None:
        """One more step is beginning."""
        if self.quiet:
            return
        with self._lock:
            self._pending = text
            due = max(self._start + _QUIET_SECONDS, self._said + _QUIET_SECONDS / 4)
            wait = due - time.monotonic()
            if wait > 0:
                if self._timer is None or not self._timer.is_alive():
                    self._timer = threading.Timer(wait, self._say_in_time)
                    self._timer.daemon = True
                    self._timer.start()
                return
            self._say()

    def _say_in_time(self) -> None:
        with self._lock:
            self._say()

    def _say(self) -> None:
        if self._pending is None:
            return
        self._said = time.monotonic()
        print(f"[{self._said - self._start:.0f} s] {self._pending}", file=sys.stderr, flush=True)
        self._pending = None


def add_common(parser: ArgumentParser) -> None:
    """The options that every command has."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")


def check_free(path: Path, force: bool) -> None:
    """Refuses an output that exists already, before any work is done."""
    if path.exists() and not force:
        raise CliError(f"{path} exists; --force replaces it")
    if path.is_dir() and force:
        raise CliError(f"{path} is a folder; an output file cannot replace it")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Calls write with a temporary path beside `path` and renames it: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as scratch:
        temporary = Path(scratch) / path.name
        write(temporary)
        os.replace(temporary, path)


def to_json(value: Any) -> str:
    """JSON of records, numbers and names; what is not a finite number becomes null."""
    return json.dumps(_plain(value), indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def quieten(*loggings: Any) -> None:
    """Errors only, and no progress bars, from `transformers.logging` and its like."""
    for logging in loggings:
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def table(header: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Columns as wide as their widest cell; the first to the left, the others to the right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        parts = [row[0].ljust(widths[0])]
        parts += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append((indent + "  ".join(parts)).rstrip())
    return "\n".join(lines)


def number(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}" if math.isfinite(value) else "inf" if value > 0 else str(value)


def span(low: float, high: float) -> str:
    """One number, or the range from one to another."""
    return number(low) if low == high else f"{number(low)}-{number(high)}"


def weights_text(names: Sequence[str], weights: Sequence[float]) -> str:
    """Adapters with their merge weights; 0 is off."""
    pairs = zip(names, weights, strict=True)
    return ", ".join(f"{name} {weight:g}" if weight else f"{name} off" for name, weight in pairs)
