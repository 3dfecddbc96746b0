"""Builds lora_ortho._C with CMake and ninja; everything else about the package is pyproject.toml.

The package works without its compiled part, so a build that fails is a warning, and importing
``lora_ortho._C`` then raises ImportError with the reason. LORA_ORTHO_REQUIRE_NATIVE=1 in the
environment makes it an error.

LORA_ORTHO_CUDA says whether the CUDA kernels are compiled in: 1 yes, 0 no, unset where nvcc is
found; then a failure leaves them out with a warning. LORA_ORTHO_CUDA_ARCHITECTURES names others
than those of cmake/cuda.cmake. LORA_ORTHO_PORTABLE=1 links for Linux machines with older system
libraries, as `make wheel` does. LORA_ORTHO_PROGRESS names a terminal or pipe that is told of each
step: pip keeps the output of builds to itself until they end.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class NativeBuildError(Exception):
    """The compiled part could not be built; the text says why, in one line."""


def find_tool(name: str) -> str:
    """The program that the PyPI package of the same name carries, else the one on PATH."""
    try:
        folder = importlib.import_module(name)
        program = Path(getattr(folder, "CMAKE_BIN_DIR", None) or folder.BIN_DIR) / name
        if program.exists():
            return str(program)
    except (ImportError, AttributeError):
        pass
    if found := shutil.which(name):
        return found
    raise NativeBuildError(f"{name} was not found (pip install {name})")


@contextmanager
def progress() -> Iterator[TextIO | None]:
    """The terminal or pipe of LORA_ORTHO_PROGRESS; None where there is none to be told."""
    name = os.environ.get("LORA_ORTHO_PROGRESS")
    try:
        stream = open(name, "a", encoding="utf-8") if name else None  # noqa: SIM115
    except OSError:
        stream = None
    if stream is None:
        yield None
        return
    with stream:
        # In a file, lines from here and those of pip's own would overwrite one another.
        yield None if stat.S_ISREG(os.fstat(stream.fileno()).st_mode) else stream


def run_tool(arguments: list[str]) -> None:
    """Runs a build step with its output shown; a failure names the first line that says error."""
    print("lora_ortho:", " ".join(arguments), flush=True)
    step = "cmake --build" if "--build" in arguments else "cmake"
    lines = []
    begin = time.monotonic()
    try:
        # Compilers speak the user's language, and not always in the encoding that is announced.
        process = subprocess.Popen(
            arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="backslashreplace",
        )
    except OSError as error:
        raise NativeBuildError(f"{step} cannot be started: {error}") from error
    with process, progress() as told:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.strip())
            if told and (found := re.match(r"\[(\d+)/(\d+)\]", line)):
                seconds = time.monotonic() - begin
                print(
                    f"lora_ortho: compiling, {found[1]} of {found[2]} files, {seconds:.0f} s",
                    file=told,
                    flush=True,
                )
    if process.returncode:
        marks = [i for i, line in enumerate(lines) if "error" in line.lower()]
        first = " ".join(line for line in lines[marks[0] : marks[0] + 3] if line) if marks else ""
        raise NativeBuildError(f"{step} ended with status {process.returncode}: {first}")


def cmake_build(folder: Path, output_dir: Path) -> None:
    """Builds the extension in `folder`, with CUDA kernels where they are wanted and can be had."""
    wanted = os.environ.get("LORA_ORTHO_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise NativeBuildError(f"LORA_ORTHO_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "1" or (not wanted and shutil.which("nvcc")):
        try:
            return cmake_build_with(folder, output_dir, cuda=True)
        except NativeBuildError as error:
            if wanted == "1":
                raise
            print(
                f"lora_ortho: WARNING: building without CUDA kernels, since {error}",
                file=sys.stderr,
                flush=True,
            )
    cmake_build_with(folder, output_dir, cuda=False)


def cmake_build_with(folder: Path, output_dir: Path, *, cuda: bool) -> None:
    """Configures and builds the extension in `folder`; it appears in `output_dir`."""
    try:
        import pybind11
    except ImportError:
        raise NativeBuildError("pybind11 was not found (pip install pybind11)") from None
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    architectures = os.environ.get("LORA_ORTHO_CUDA_ARCHITECTURES", "")
    portable = os.environ.get("LORA_ORTHO_PORTABLE", "0") not in ("", "0")
    folder.mkdir(parents=True, exist_ok=True)
    # Another build environment may have left its paths; objects that still fit are kept.
    (folder / "CMakeCache.txt").unlink(missing_ok=True)
    run_tool(
        [
            cmake,
            "-G",
            "Ninja",
            "-S",
            str(ROOT),
            "-B",
            str(folder),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DLORA_ORTHO_PYTHON_OUTPUT_DIR={output_dir}",
            "-DCMAKE_BUILD_TYPE=Release",
            "-DLORA_ORTHO_BUILD_PYTHON=ON",
            f"-DLORA_ORTHO_CUDA={'ON' if cuda else 'OFF'}",
            f"-DLORA_ORTHO_CUDA_ARCHITECTURES={architectures}",
            f"-DLORA_ORTHO_PORTABLE={'ON' if portable else 'OFF'}",
            "-DLORA_ORTHO_BUILD_SHARED=OFF",
            "-DLORA_ORTHO_BUILD_STATIC=OFF",
        ]
    )
    run_tool([cmake, "--build", str(folder), "--target", "_C"])


def write_reason(path: Path, reason: str) -> None:
    """A module in place of the extension, whose import gives the reason that there is none."""
    text = f"not built: {reason}"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(
        f'"""Stands where the extension could not be built."""\n\nraise ImportError({text!r})\n',
        encoding="utf-8",
    )
    os.replace(temporary, path)


class CMakeBuild(build_ext):
    """Builds the one extension of this project, or a module that says why there is none."""

    def run(self) -> None:
        (extension,) = self.extensions
        # The source tree for `pip install -e .` and `build_ext --inplace`, else the build folder.
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        reason_file = target.parent / "_C.py"
        try:
            cmake_build(Path(self.build_temp).resolve(), target.parent)
            reason_file.unlink(missing_ok=True)
        except NativeBuildError as error:
            if os.environ.get("LORA_ORTHO_REQUIRE_NATIVE", "0") not in ("", "0"):
                raise
            target.unlink(missing_ok=True)
            write_reason(reason_file, str(error))
            bar = "*" * 78
            print(
                f"\n{bar}\nWARNING: lora_ortho is installed WITHOUT its compiled CPU kernels.\n"
                f"Reason: {error}\n"
                "The slow reference backend works. A C++17 compiler (GCC or Clang) and\n"
                f"installing again give the kernels.\n{bar}\n",
                file=sys.stderr,
                flush=True,
            )


# Packages whose folders lie beside lora_ortho's own.
ELSEWHERE = {
    "lora_ortho.triton_kernels": "triton_kernels",
    "lora_ortho.benchmarks": "benchmarks",
}

setup(
    packages=[*find_packages(include=["lora_ortho", "lora_ortho.*"]), *ELSEWHERE],
    package_dir=ELSEWHERE,
    package_data={"lora_ortho": ["py.typed"]},
    ext_modules=[Extension("lora_ortho._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
