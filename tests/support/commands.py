"""Commands of `lora-ortho`, in the process of a test or interrupted in one of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import NamedTuple

import pytest

from lora_ortho.cli import main

_MOST_SECONDS = 300  # until a process that says nothing is killed


class Done(NamedTuple):
    """How a process ended, and what it wrote after the line at which it was interrupted."""

    status: int
    out: str
    err: str


def interrupted(words: Sequence[object], at: str) -> Done:
    """Runs `python -m lora_ortho` with these words, and interrupts it at the first line of its
    standard error that has `at` in it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_ortho", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # not ignored, as behind &
    )  # fmt: skip
    late = threading.Timer(_MOST_SECONDS, process.kill)
    late.start()
    assert process.stderr is not None
    seen = next((line for line in process.stderr if at in line), None)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=_MOST_SECONDS)
    late.cancel()
    assert seen is not None, f"no line with {at!r}"
    return Done(process.returncode, out, err)


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs a command that must fail with status 1; its one line of error without the prefix."""
    assert main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("lora-ortho: error: ")
    return line.removeprefix("lora-ortho: error: ")
