"""The package built and installed by pip from a copy of its sources, in a folder of its own."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from native import ROOT, run

# What an installation of the package is made from.
SOURCES = [
    *["CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"],
    *["benchmarks", "cmake", "csrc", "lora_ortho", "triton_kernels"],
]


def copy_sources(folder: Path) -> Path:
    """A copy of what the package is made from, in a new folder."""
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "_C*")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def pip(command: str, source: Path, variables: dict[str, str], *options: str) -> str:
    """`pip COMMAND` of a copy of the sources without a network; what it printed."""
    words = ["--no-build-isolation", "--no-deps", "--no-index", "-v", *options, str(source)]
    return run([sys.executable, "-m", "pip", command, *words], variables=variables)


def install(tmp_path: Path, variables: dict[str, str]) -> Path:
    """`pip install` of a copy of the sources into a folder of its own; that folder."""
    source, target = copy_sources(tmp_path / "source"), tmp_path / "target"
    output = pip("install", source, variables, "--target", str(target))
    (tmp_path / "output").write_text(output, encoding="utf-8")
    return target


def python(target: Path, code: str) -> str:
    """What `code` prints under the package installed in `target`."""
    assert "lora_ortho" in os.listdir(target)
    begin = f"import sys; sys.path.insert(0, {str(target)!r}); import lora_ortho\n"
    begin += f"assert lora_ortho.__file__.startswith({str(target)!r}), lora_ortho.__file__\n"
    return run([sys.executable, "-c", begin + code], cwd=target)
