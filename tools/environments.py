"""The tests in environments of their own, against the package as it is installed.

    python tools/environments.py wheel dist      the wheel of `make wheel`, without a compiler
    python tools/environments.py matrix docs     each row of ROWS: docs/matrix.json, docs/matrix.md
    python tools/environments.py matrix docs --only 3.13       that row anew, the others as they are

An environment is made, filled by pip, tested from a copy of tests/ away from the sources, and
deleted. With PyPI's torch each takes 3 GB of downloads and 6 GB of disk while it lasts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# Masks against their golden files, values on every instruction set, the module, errors, the op.
WHEEL_TESTS = (
    *("test_mask_stream", "test_masks", "test_values", "test_module", "test_packing"),
    *("test_op", "test_errors", "test_op_graphs"),
)
# And torch.compile down to machine code, PEFT's models and files.
MATRIX_TESTS = (
    *WHEEL_TESTS,
    *("test_reference", "test_attach", "test_attach_models", "test_attach_refusals"),
    *("test_attach_values", "test_adapters_files", "test_adapters_inject", "test_adapters_peft"),
    *("test_export", "test_export_settings", "test_export_refusals", "test_export_pipeline"),
    "test_merges",
    *("test_compile", "test_settings", "test_recomputation", "test_stale_factors"),
)
# What the tests of PEFT's models need beside the package.
BESIDE = ("pytest", "numpy", "peft", "transformers", "accelerate", "diffusers")

# Prints what an environment has; fails where the package is not the installed one.
FACTS = """
import importlib.metadata, json, platform, sys
import torch, lora_ortho
from lora_ortho.backends import cpu
assert lora_ortho.__file__.startswith(sys.prefix), lora_ortho.__file__
assert cpu.unavailable() is None, cpu.unavailable()
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
names = ("torch", "triton", "numpy", "peft", "transformers", "diffusers")
maps = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split("/")[-1]}
print(json.dumps({
    "python": platform.python_version(),
    **{name: version(name) for name in names},
    "cpu": ", ".join(cpu.instruction_sets()),
    "openmp": sorted(path.removeprefix(sys.prefix + "/") for path in maps),
}))
"""


class EnvironmentsError(RuntimeError):
    """Something is missing here; the message is one line that says what."""


@dataclass(frozen=True)
class Row:
    """One environment of the matrix.

    Attributes:
        python: the version of Python, "3.12".
        torch: the release of torch.
        requirements: the file that pins everything else.
        why: two words for the table.
    """

    python: str
    torch: str
    requirements: str
    why: str


def oldest_torch() -> str:
    """The oldest torch that pyproject.toml admits, as a whole version."""
    found = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if found is None:
        raise EnvironmentsError("pyproject.toml names no oldest torch")
    return found[1] + ".0" * (2 - found[1].count("."))


# Python 3.11 and the torch of requirements-dev.txt are what `make test` has.
ROWS = (
    Row("3.10", oldest_torch(), "requirements-oldest.txt", "oldest of all"),
    Row("3.12", "2.14.1", "requirements-dev.txt", "newer torch"),
    Row("3.13", "2.15.0", "requirements-dev.txt", "newest torch"),
)


def interpreter(version: str) -> str:
    """A program that is this version of Python: on PATH, or pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = shutil.which(f"python{version}")
    candidates = [found] if found else []
    candidates += sorted(str(path) for path in pyenv.glob(f"{version}.*/bin/python"))
    for candidate in candidates:
        command = [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return candidate
    raise EnvironmentsError(f"there is no python{version} on PATH")


def run(command: Sequence[str | Path]) -> None:
    """A step, its output shown; EnvironmentsError where it fails."""
    words = [str(word) for word in command]
    print("+", " ".join(words), flush=True)
    if status := subprocess.run(words, check=False).returncode:
        raise EnvironmentsError(f"{' '.join(words[:6])} ... ended with status {status}")


def make(folder: Path, python: str, constraints: Iterable[str], packages: Sequence[str]) -> Path:
    """An environment in `folder` with `packages`; its Python."""
    (folder / "constraints.txt").write_text("\n".join(constraints) + "\n", encoding="utf-8")
    run([python, "-m", "venv", folder / "venv"])
    program = folder / "venv" / "bin" / "python"
    pip: list[str | Path] = [program, "-m", "pip", "install", "--progress-bar", "off"]
    # Interpreters bring the pip of their time.
    run([*pip, "--quiet", "--upgrade", "pip"])
    run([*pip, "--constraint", folder / "constraints.txt", *packages])
    return program


def check(
    folder: Path, python: Path, tests: Sequence[str], environment: Mapping[str, str], *options: str
) -> dict[str, Any]:
    """Runs test files from a copy beside which the sources are not; what was found."""
    for name in ("tests", "benchmarks"):  # tests take the rule about rounding from the latter
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "MASK_STREAM.md", folder)
    done = subprocess.run(
        [str(python), "-c", FACTS],
        cwd=folder, env=dict(environment), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise EnvironmentsError(f"the package does not work: {done.stderr.strip()[-500:]}")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(facts), flush=True)
    report = folder / "report.xml"
    files = [str(next((folder / "tests").rglob(f"{name}.py"))) for name in tests]
    words = ["-q", "-ra", "-p", "no:cacheprovider", "-o", "pythonpath=tests/support"]
    words += [f"--junit-xml={report}", *options, *files]
    print("+ pytest", " ".join(words), flush=True)
    status = subprocess.run(
        [str(python), "-m", "pytest", *words], cwd=folder, env=dict(environment), check=False
    ).returncode
    if status not in (0, 1):
        raise EnvironmentsError(f"pytest ended with status {status}")
    return {**facts, **counts(report)}


def counts(report: Path) -> dict[str, Any]:
    """How many tests passed, which failed, and why some were skipped, by pytest's report."""
    failed, number, seconds = [], 0, 0.0
    skipped: dict[str, int] = {}
    for suite in ElementTree.parse(report).iter("testsuite"):
        seconds += float(suite.get("time", 0))
    for case in ElementTree.parse(report).iter("testcase"):
        number += 1
        name = f"{case.get('classname', '').removeprefix('tests.')}.{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        elif (skip := case.find("skipped")) is not None:
            reason = skip.get("message", "")
            skipped[reason] = skipped.get(reason, 0) + 1
    passed = number - len(failed) - sum(skipped.values())
    return {"passed": passed, "failed": failed, "skipped": skipped, "seconds": round(seconds)}


def wheel(dist: Path) -> int:
    """The wheel in `dist`, in an environment whose PATH is empty."""
    wheels = sorted(dist.resolve().glob("lora_ortho-*.whl"))
    if len(wheels) != 1:
        raise EnvironmentsError(f"expected one wheel in {dist}, found {len(wheels)}: `make wheel`")
    tag = re.search(r"-cp3(\d+)-", wheels[0].name)
    python = interpreter(f"3.{tag[1]}") if tag else sys.executable
    pins = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory(prefix="lora_ortho-") as name:
        folder = Path(name)
        program = make(folder, python, pins, [str(wheels[0]), "pytest", "numpy"])
        (folder / "empty").mkdir()
        kept = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "PYTHONPATH")}
        bare = {**kept, "PATH": str(folder / "empty")}
        # inductor compiles C++.
        found = check(folder, program, WHEEL_TESTS, bare, "-k", "not inductor")
    if len(found["openmp"]) != 1:
        raise EnvironmentsError(f"more than one OpenMP is loaded: {', '.join(found['openmp'])}")
    return 1 if found["failed"] else 0


def row(chosen: Row) -> dict[str, Any]:
    """One row of the matrix, built from the sources."""
    pins = (ROOT / chosen.requirements).read_text(encoding="utf-8").splitlines()
    pins = [line for line in pins if not line.startswith("torch==")] + [f"torch=={chosen.torch}"]
    with tempfile.TemporaryDirectory(prefix="lora_ortho-") as name:
        folder = Path(name)
        program = make(folder, interpreter(chosen.python), pins, [str(ROOT), *BESIDE])
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        found = check(folder, program, MATRIX_TESTS, kept)
    today = datetime.date.today().isoformat()
    return {"row": chosen.python, "why": chosen.why, "date": today, **found}


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """docs/matrix.md."""
    head = ("Python", "torch", "Triton", "numpy", "PEFT", "transformers", "diffusers", "")
    lines = [
        "# Tested versions",
        "",
        "Written by `make matrix`. For each row it makes an environment, builds the package from",
        "source in it and runs the tests of masks, values, the module, torch.compile and PEFT's",
        "models. Every change is tested in full on Python 3.11 with the versions in",
        "requirements-dev.txt.",
        "",
        "| " + " | ".join((*head, "passed", "failed", "skipped", "date")) + " |",
        "|" + " --- |" * len(head) + " ---: |" * 3 + " --- |",
    ]
    for found in rows:
        names = ("python", "torch", "triton", "numpy", "peft", "transformers", "diffusers", "why")
        cells = [str(found[name] or "-") for name in names]
        numbers = [
            found["passed"],
            len(found["failed"]),
            sum(found["skipped"].values()),
            found["date"],
        ]
        lines.append("| " + " | ".join([*cells, *map(str, numbers)]) + " |")
    tried = {found["row"] for found in rows}
    missing = [f"Python {r.python} with torch {r.torch}" for r in ROWS if r.python not in tried]
    if missing:
        lines += ["", f"Not tried yet: {', '.join(missing)}."]
    for found in rows:
        openmp = ", ".join(path.removeprefix("lib/") for path in found["openmp"])
        lines += ["", f"Python {found['python']}, torch {found['torch']}:", ""]
        lines += [f"- CPU kernels for {found['cpu']}", f"- OpenMP by {openmp}"]
        lines += [f"- failed: `{name}`" for name in found["failed"]]
        lines += [f"- skipped, {count}: {why}" for why, count in found["skipped"].items()]
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def matrix(folder: Path, only: Sequence[str]) -> int:
    """The chosen rows, each written when it is done; 1 where a test failed."""
    data, text = folder / "matrix.json", folder / "matrix.md"
    rows = {one["row"]: one for one in json.loads(data.read_text())} if data.exists() else {}
    status = 0
    for chosen in ROWS:
        if only and chosen.python not in only:
            continue
        rows[chosen.python] = row(chosen)
        status |= bool(rows[chosen.python]["failed"])
        ordered = [rows[one.python] for one in ROWS if one.python in rows]
        write(data, json.dumps(ordered, indent=1) + "\n")
        write(text, page(ordered))
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["wheel", "matrix"])
    parser.add_argument("folder", type=Path, help="of the wheel, or of matrix.json and matrix.md")
    known = [one.python for one in ROWS]
    parser.add_argument("--only", nargs="+", default=[], choices=known, help="rows of the matrix")
    options = parser.parse_args(arguments)
    try:
        if options.what == "wheel":
            return wheel(options.folder)
        return matrix(options.folder, options.only)
    except EnvironmentsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
