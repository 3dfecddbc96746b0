"""Building and running native code from a test."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).resolve().parents[2]


def environment(variables: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """This process's environment, with the programs beside its Python first on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, **variables}


def run(
    command: Sequence[str | Path],
    *,
    cwd: Path = ROOT,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Runs a program and returns what it prints; AssertionError with all of it if it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment(variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    words = " ".join(str(word) for word in command)
    assert done.returncode == 0, f"{words}: exit status {done.returncode}\n{done.stdout}"
    return done.stdout


@contextmanager
def locked(preset: str) -> Iterator[Path]:
    """Its build folder, for this process alone: tests run in several."""
    folder = ROOT / "build" / preset
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


@cache
def build(preset: str) -> Path:
    """Configures and builds a preset of CMakePresets.json, once; its build folder."""
    with locked(preset) as folder:
        run(["cmake", "--preset", preset, "--fresh"])
        run(["cmake", "--build", "--preset", preset])
    return folder
