"""What the package says of itself, what it asks pip for, and what a built wheel asks of Linux."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pages
import pytest
from installed import copy_sources, install, pip, python
from native import ROOT, run
from packaging.requirements import Requirement
from packaging.version import Version

from lora_ortho.backends import triton

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# The Triton that torch's wheels on PyPI for Linux ask for; the CPU builds ask for none.
TRITON = {"2.13.0": "3.7.1", "2.14.1": "3.8.0", "2.15.0": "3.9.0"}
CONSTRAINTS = ["requirements-dev.txt", "requirements-oldest.txt"]


# ---- what the files say


def test_one_version() -> None:
    version = PROJECT["version"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first = re.search(r"^## \[([^]]+)\]", changes, re.MULTILINE)
    assert first
    assert first[1] == version
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited
    assert cited[1] == version
    said = run([sys.executable, "-c", "import lora_ortho; print(lora_ortho.__version__)"])
    assert said.split() == [version]
    assert run([sys.executable, "-m", "lora_ortho", "--version"]).split() == ["lora-ortho", version]


def pins(file: str) -> dict[str, Requirement]:
    """The requirements of a file that hold for this Python, by name."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {r.name: r for r in found if r.marker is None or r.marker.evaluate()}


@pytest.mark.parametrize("file", CONSTRAINTS)
def test_constraints_admit_what_torch_pins(file: str) -> None:
    """PyPI's builds of the pinned torch and of newer ones, which the matrix puts in its place."""
    pinned = pins(file)
    (version,) = (s.version for s in pinned["torch"].specifier)
    assert version in TRITON
    if "triton" in pinned:
        refused = [t for t in TRITON.values() if t not in pinned["triton"].specifier]
        assert not refused


def test_constraints_admit_what_this_torch_asks_for() -> None:
    pinned = pins("requirements-dev.txt")
    asked = [Requirement(text) for text in importlib.metadata.requires("torch") or []]
    checked = 0
    for requirement in asked:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        checked += 1
        constraint = pinned.get(requirement.name)
        here = Version(importlib.metadata.version(requirement.name))
        assert constraint is None or here in constraint.specifier, requirement
    assert checked


@pytest.mark.parametrize("file", CONSTRAINTS)
def test_constraints_lie_within_what_the_package_admits(file: str) -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = [
        Requirement(text) for texts in (PROJECT["dependencies"], *extras.values()) for text in texts
    ]
    pinned = pins(file)
    checked = set()
    for requirement in wanted:
        for exact in pinned[requirement.name].specifier if requirement.name in pinned else ():
            if (requirement.name, file) == ("transformers", "requirements-oldest.txt"):
                continue  # the demo alone asks for a newer one
            assert exact.version in requirement.specifier, requirement
            checked.add(requirement.name)
    assert {"torch", "safetensors", "peft", "diffusers"} <= checked


def test_the_oldest_triton_is_written_alike() -> None:
    (asked,) = PROJECT["optional-dependencies"]["triton"]
    assert f">={'.'.join(map(str, triton.OLDEST))}" == str(Requirement(asked).specifier)


def test_an_old_triton_is_declined(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text('__version__ = "3.5.1"\n', encoding="utf-8")
    code = "from lora_ortho import doctor\n"
    code += "[found] = [b for b in doctor.diagnose().backends if b.name == 'triton']\n"
    code += "print(found.reason, '|', found.advice)"
    said = run([sys.executable, "-c", code], variables={"PYTHONPATH": str(tmp_path)})
    assert "triton 3.5.1 is older than 3.6" in said
    assert "| install a newer torch" in said


def test_pages_and_extras() -> None:
    """docs/install.md gives every page that runs an extra with all that it needs, or the name."""
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    extras = PROJECT["optional-dependencies"]
    for page, needs in pages.NEEDS.items():
        (row,) = (row for row in rows if f"({page}.md)" in row)
        named = re.search(r'pip install "\.\[(\w+)\]"', row)
        if named:
            offered = {Requirement(text).name for text in extras[named[1]]}
        else:
            plain = re.search(r"pip install \. ([\w -]+)`", row)
            offered = set(plain[1].split() if plain else ())
        assert set(needs.values()) <= offered, page
    for extra in re.findall(r"\[(\w+)\]\"`", text):
        assert extra in extras


@pytest.mark.parametrize(("target", "extras"), [("demo", "demo"), ("lint", "dev,demo")])
def test_make_says_first_what_it_will_download(target: str, extras: str, tmp_path: Path) -> None:
    """In figures that the README and docs/install.md repeat."""
    lines = run(["make", "-n", target, f"VENV={tmp_path / 'new'}"]).splitlines()
    (told,) = (i for i, line in enumerate(lines) if " GB" in line)
    (first,) = (i for i, line in enumerate(lines) if f'-e ".[{extras}]"' in line)
    assert told < first
    sizes = re.findall(r"([\d.]+) GB", lines[told])
    assert len(sizes) == 2
    name = "demo" if target == "demo" else "test"
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert re.search(
        rf"^\| `make {name}` .*\| {sizes[0]} GB, {sizes[1]} GB \|$", page, re.MULTILINE
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for size in sizes:
        assert re.search(rf"\b{size} (and [\d.]+ )?GB", readme), size
    # The compiler's steps go where this command's errors go.
    assert "LORA_ORTHO_PROGRESS=/proc/$$/fd/2" in lines[first]


def test_the_page_of_tested_versions_is_what_was_recorded() -> None:
    """Every row passed, and the page is made from the file of results."""
    recorded = json.loads((ROOT / "docs" / "matrix.json").read_text(encoding="utf-8"))
    assert recorded
    assert [row["failed"] for row in recorded] == [[]] * len(recorded)
    code = "import json, environments\n"
    code += "print(environments.page(json.load(open('docs/matrix.json'))), end='')"
    said = run([sys.executable, "-c", code], variables={"PYTHONPATH": str(ROOT / "tools")})
    assert said == (ROOT / "docs" / "matrix.md").read_text(encoding="utf-8")


# ---- builds that fail


@pytest.mark.parametrize("kind", ["cannot be started", "speaks another encoding"])
def test_a_broken_cmake_is_a_reason(kind: str, tmp_path: Path) -> None:
    """As on a file system that lets nothing run, and with messages that are no UTF-8."""
    package = tmp_path / "path" / "cmake"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"CMAKE_BIN_DIR = {str(package)!r}\n", encoding="utf-8")
    if kind == "cannot be started":
        (package / "cmake").write_text("not a program\n", encoding="utf-8")
        reason = "cmake cannot be started: .*Permission denied"
    else:
        (package / "cmake").write_bytes(b"#!/bin/sh\nprintf 'ERROR: \\344hm\\n'\nexit 3\n")
        (package / "cmake").chmod(0o755)
        reason = r"cmake ended with status 3: ERROR: \\+xe4hm"
    variables = {"PYTHONPATH": str(package.parent), "LORA_ORTHO_REQUIRE_NATIVE": "0"}
    target = install(tmp_path, {**variables, "LORA_ORTHO_CUDA": "0", "PYTHONUTF8": "1"})
    said = python(target, "print(lora_ortho.backends.available()['cpu'])")
    assert re.search(f"not built: {reason}", said), said


# ---- what is built


@dataclass
class Built:
    """A wheel for other machines, what the build printed, and what it told meanwhile."""

    wheel: Path
    printed: str
    told: list[str]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """As `make wheel` builds it, but for auditwheel."""
    folder = tmp_path_factory.mktemp("wheel")
    fifo, told = folder / "progress", list[str]()
    os.mkfifo(fifo)

    def listen() -> None:
        with fifo.open() as lines:
            told.extend(lines)

    variables = {"LORA_ORTHO_PORTABLE": "1", "LORA_ORTHO_REQUIRE_NATIVE": "1"}
    variables |= {"LORA_ORTHO_CUDA": "0", "LORA_ORTHO_PROGRESS": str(fifo)}
    # Each step of the build opens the pipe anew; one writer that stays keeps the listener waiting.
    thread = threading.Thread(target=listen)
    thread.start()
    with fifo.open("w"):
        source = copy_sources(folder / "source")
        printed = pip("wheel", source, variables, "--wheel-dir", str(folder))
    thread.join()
    (wheel,) = folder.glob("*.whl")
    return Built(wheel, printed, told)


@pytest.fixture(scope="module")
def extension(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extension")
    with zipfile.ZipFile(built.wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".so"))
        return Path(archive.extract(name, folder))


def test_contents_of_the_wheel(built: Built) -> None:
    """Every module and nothing else: no sources, no libraries of others, no torch."""
    with zipfile.ZipFile(built.wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        (metadata,) = (n for n in archive.namelist() if n.endswith("/METADATA"))
        text = archive.read(metadata).decode()
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "lora_ortho").rglob("*.py")}
    for folder in ("triton_kernels", "benchmarks"):
        modules |= {f"lora_ortho/{folder}/{p.name}" for p in (ROOT / folder).glob("*.py")}
    modules = {n for n in modules if n != "lora_ortho/_C.py"} | {"lora_ortho/py.typed"}
    (compiled,) = names - modules
    assert re.fullmatch(r"lora_ortho/_C\.[\w-]+\.so", compiled)
    assert not modules - names
    asked = re.findall(r"^Requires-Dist: ([^;\n]*)$", text, re.MULTILINE)
    assert sorted(Requirement(a).name for a in asked) == ["safetensors", "torch"]


def test_every_instruction_set_is_inside(built: Built) -> None:
    kinds = re.findall(r"No (\w+) kernels on this architecture", built.printed)
    if os.uname().machine == "x86_64":
        assert kinds == []
    objects = re.findall(r"lora_ortho_kernels_(\w+)\.dir/cpu/kernels\.cpp", built.printed)
    assert {"baseline", *({"avx2", "avx512", "amx"} - set(kinds))} <= set(objects)


def symbol_versions(extension: Path) -> Iterator[tuple[str, Version]]:
    """What it asks of system libraries: "GLIBC", 2.14; "GOMP", 4.0; ..."""
    listed = run(["readelf", "--version-info", "--wide", extension])
    for kind, number in re.findall(r"Name: (\w+?)_(\d[\d.]*)\s", listed):
        yield kind, Version(number)


def test_the_extension_fits_older_linux(extension: Path) -> None:
    """No more than manylinux_2_28 has, and libgomp, which is torch's."""
    newest: dict[str, Version] = {}
    for kind, version in symbol_versions(extension):
        newest[kind] = max(version, newest.get(kind, version))
    print("newest of each:", {kind: str(version) for kind, version in newest.items()})
    assert Version("2.3") < newest.pop("GLIBC") <= Version("2.28")
    assert newest.pop("GOMP") <= Version("4.5")
    assert newest.pop("OMP") == Version("1.0")
    assert newest.pop("GCC") <= Version("7.0.0")
    assert newest == {}  # libstdc++ is inside
    dynamic = run(["readelf", "-d", extension])
    needed = set(re.findall(r"Shared library: \[([^]]+)\]", dynamic))
    loader = {name for name in needed if name.startswith("ld-linux-")}
    assert needed - loader == {"libgomp.so.1", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
    assert "PATH)" not in dynamic
    assert run(["nm", "-D", "--defined-only", extension]).split()[1:] == ["T", "PyInit__C"]


def test_the_wheel_works_with_torch(built: Built, tmp_path: Path) -> None:
    """With one OpenMP in the process, and exceptions that cross the border."""
    options = ["--no-deps", "--no-index", "--target", str(tmp_path / "target")]
    run([sys.executable, "-m", "pip", "install", *options, built.wheel])
    code = """
import torch
x, A, B = torch.randn(64, 96), [torch.randn(4, 96)] * 2, [torch.randn(80, 4)] * 2
y = lora_ortho.fused_ortho_lora(x, A, B, seed=1, backend="cpu")
reference = lora_ortho.fused_ortho_lora(x, A, B, seed=1, backend="reference")
print("differs by", float((y - reference).abs().max()) > 1e-4)
from lora_ortho import _C
try:
    _C.thresholds("none such", [0.5, 0.5])
except ValueError as error:
    print(error)
maps = open("/proc/self/maps").read().split()
print("OpenMP:", len({word for word in maps if "omp" in word.rsplit("/", 1)[-1]}))
"""
    said = python(tmp_path / "target", code)
    assert "differs by False\n" in said
    assert "method is 'none such'" in said
    assert "OpenMP: 1\n" in said


def test_a_build_tells_of_its_steps(built: Built) -> None:
    steps = [
        re.fullmatch(r"lora_ortho: compiling, (\d+) of (\d+) files, \d+ s\n", t) for t in built.told
    ]
    assert len(steps) >= 8
    numbers = [(int(step[1]), int(step[2])) for step in steps if step]
    assert len(numbers) == len(steps)
    assert numbers == [(i + 1, len(steps)) for i in range(len(steps))]


def test_the_source_distribution_is_whole(tmp_path: Path) -> None:
    """All that a build, the tests of a build and a reader want; nothing built."""
    # Away from an earlier build, whose list of files would be taken over.
    beside = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "_C*")
    shutil.copytree(ROOT, tmp_path / "source", ignore=beside)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    run([sys.executable, "-c", code], cwd=tmp_path / "source")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {n.partition("/")[2] for n in opened.getnames()}
    wanted = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "Makefile", "setup.py"}
    wanted |= {"CMakeLists.txt", "CMakePresets.json", *CONSTRAINTS, "requirements-wheel.txt"}
    for folder in ("csrc", "cmake", "lora_ortho", "triton_kernels", "benchmarks", "tests", "tools"):
        wanted |= {
            path.relative_to(ROOT).as_posix()
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and not re.search(r"__pycache__|/_C\.|/results/", path.as_posix())
        }
    assert sorted(wanted - names) == []
    assert not [n for n in names if n.endswith((".so", ".pyc")) or n == "lora_ortho/_C.py"]
