"""A certain version of Triton, whichever this environment has: torch's own builds pin theirs."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import native
import pytest


def variables(version: str, *beside: str) -> dict[str, str]:
    """Variables under which a process imports that version; skips where pip cannot install it.

    It goes into a folder of its own under build/, once, unless this environment has it and
    needs nothing beside it.

    Args:
        version: "3.9.0", or "3.6" for the last of its patch releases.
        beside: further requirements that go into the folder.
    """
    if importlib.metadata.version("triton") == version and not beside:
        return {}
    wanted = f"triton=={version}" + (".*" if version.count(".") == 1 else "")
    with native.locked(f"triton-{version}") as folder:
        if not (folder / "complete").exists():
            command = [
                sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade",
                "--target", str(folder), wanted, *beside,
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if "ERROR" in line]
                pytest.skip(f"pip cannot install triton {version}: {' '.join(lines[:1])}")
            (folder / "complete").touch()
    return {"PYTHONPATH": str(folder)}
