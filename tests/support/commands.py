"""Commands of `lora-ortho` in the process of a test."""

from __future__ import annotations

import pytest

from lora_ortho.cli import main


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs a command that must fail with status 1; its one line of error without the prefix."""
    assert main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("lora-ortho: error: ")
    return line.removeprefix("lora-ortho: error: ")
