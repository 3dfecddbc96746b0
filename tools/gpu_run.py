"""``make gpu``: everything that needs a GPU, in one command, without a network.

Builds the package into an environment of its own that sees this Python's packages, runs the tests
on the device, the benchmark of every GPU backend, and compute-sanitizer where there is one; writes
one result file and prints a short table last. Each stage has its own budget of time; one that
fails, or runs past its budget, does not hide the others, and the exit status says so.

LORA_ORTHO_GPU_REHEARSAL=1 goes the same way without a GPU: Triton's interpreter and CPU tensors
stand in, sizes are tiny, and the result file says "rehearsal" and lies under build/.

Only the standard library is imported here: this runs before anything is built.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import site
import subprocess
import sys
import time
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
REHEARSAL = "LORA_ORTHO_GPU_REHEARSAL"
WORK = ROOT / "build" / "gpu"
TOTAL_SECONDS = 480
_BACKENDS = ("triton", "cuda")
# The equivalence suite; of the folder for GPUs every test says why where it needs one.
_TESTS = ("tests/gpu", "tests/core/test_values.py", "tests/core/test_masks.py")
_GRACE_SECONDS = 5
_PATIENCE = 3.0  # of a rehearsal, whose processor may be anyone's
_LAST_SECONDS = 110  # kept for compute-sanitizer and what comes after the benchmark


class Outcome(NamedTuple):
    """How a stage ended.

    Attributes:
        status: "ok", "failed", "out of time" or "absent".
        note: why, where it is not "ok".
    """

    name: str
    status: str
    seconds: float
    note: str = ""

    @property
    def bad(self) -> bool:
        """Whether the whole run must not count as a success."""
        return self.status in ("failed", "out of time")


class Run:
    """Stages one after the other, and what became of them."""

    def __init__(self, rehearsal: bool, total: float = TOTAL_SECONDS) -> None:
        self.rehearsal = rehearsal
        self.outcomes: list[Outcome] = []
        self._patience = _PATIENCE if rehearsal else 1.0
        self._end = time.monotonic() + total * self._patience
        self.environment = dict(os.environ)
        self.environment["PYTHONUNBUFFERED"] = "1"
        if rehearsal:
            self.environment["TRITON_INTERPRET"] = "1"

    def left(self) -> float:
        """Seconds until the whole run must be over."""
        return self._end - time.monotonic()

    def stage(
        self,
        name: str,
        command: Sequence[str | Path],
        seconds: float,
        variables: Mapping[str, str] | None = None,
    ) -> str | None:
        """Run a command for so long at most; its standard output, None where it was not ok."""
        seconds = min(seconds * self._patience, self.left())
        print(f"== {name} (at most {seconds:.0f} s)", file=sys.stderr, flush=True)
        start = time.monotonic()
        status, note, text = self._execute(command, seconds, variables or {})
        spent = time.monotonic() - start
        self.outcomes.append(Outcome(name, status, round(spent, 1), note))
        print(f"== {name}: {status} after {spent:.0f} s {note}", file=sys.stderr, flush=True)
        return text if status == "ok" else None

    def absent(self, name: str, why: str) -> None:
        """Note a stage that this machine cannot run."""
        self.outcomes.append(Outcome(name, "absent", 0.0, why))
        print(f"== {name}: absent: {why}", file=sys.stderr, flush=True)

    def _execute(
        self, command: Sequence[str | Path], seconds: float, variables: Mapping[str, str]
    ) -> tuple[str, str, str]:
        if seconds <= 0:
            return "out of time", "nothing was left of the whole run's time", ""
        process = subprocess.Popen(
            [str(word) for word in command], cwd=ROOT, env={**self.environment, **variables},
            stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            text, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            return "out of time", f"stopped after {seconds:.0f} s", ""
        sys.stderr.write(text[-6000:])
        if process.returncode:
            last = (text.strip().splitlines() or [""])[-1]
            return "failed", f"exit status {process.returncode}: {last[:200]}", text
        return "ok", "", text


def _end(process: subprocess.Popen[str]) -> None:
    """End a stage with everything it started, which is a process group of its own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(_GRACE_SECONDS)
            break
        except subprocess.TimeoutExpired:
            continue
    process.communicate()


def environment(folder: Path) -> Path:
    """A virtual environment that sees this Python's packages; its interpreter.

    By a path file and not by --system-site-packages, which would pass over the packages of a
    virtual environment that this Python belongs to.
    """
    venv.EnvBuilder(clear=True, symlinks=True, with_pip=False).create(folder)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    own = folder / "lib" / version / "site-packages"
    parents = [path for path in (*site.getsitepackages(), *sys.path) if "-packages" in path]
    (own / "parents.pth").write_text("\n".join(dict.fromkeys(parents)) + "\n")
    return folder / "bin" / "python"


def build_variables(rehearsal: bool) -> dict[str, str]:
    """How setup.py is to build: for this GPU alone, and in a rehearsal without CUDA.

    What cannot be compiled is left out with a warning; the stage after this one says so.
    """
    variables = {"LORA_ORTHO_REQUIRE_NATIVE": "0"}
    if rehearsal:
        return variables | {"LORA_ORTHO_CUDA": "0"}
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return variables
    found = architecture(done.stdout.split("\n", 1)[0])
    return variables if found is None else variables | {"LORA_ORTHO_CUDA_ARCHITECTURES": found}


def architecture(capability: str) -> str | None:
    """What CMake calls a GPU of a capability such as "9.0"; None where that is no capability."""
    digits = capability.strip().replace(".", "")
    if not digits.isdigit():
        return None
    return "90a-real" if digits == "90" else f"{digits}-real"  # 9.0 has instructions of its own


_DOCTOR = """
import json, torch, lora_ortho.backends as b
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
print(json.dumps({"backends": b.available(), "gpu": gpu, "torch": torch.__version__}))
"""


def _look(run: Run, python: Path) -> dict[str, Any]:
    """Which backends work, and the GPU's name."""
    text = run.stage("look", [python, "-c", _DOCTOR], 60)
    found: dict[str, Any] = {"backends": {}, "gpu": None}
    return found if text is None else dict(json.loads(text.strip().splitlines()[-1]))


def _backends(run: Run, found: Mapping[str, Any]) -> list[str]:
    """Those to measure; for each other one the reason is noted."""
    works = []
    for name in _BACKENDS:
        reason = found["backends"].get(name, "the package does not import")
        if reason is None:
            works.append(name)
        else:
            run.absent(f"backend {name}", reason)
    if run.rehearsal and not works:
        return ["reference"]
    return works


def _sanitize(run: Run, python: Path, backends: Sequence[str]) -> None:
    """The kernels on small cases under compute-sanitizer; in a rehearsal without it."""
    tool = shutil.which("compute-sanitizer")
    for backend in backends:
        probe: list[str | Path] = [python, "-m", "tools.gpu_probe", "--backend", backend]
        if tool is None:
            if run.rehearsal:
                run.stage(f"probe {backend}", probe, 60)
            else:
                run.absent(f"compute-sanitizer {backend}", "not on PATH")
            continue
        for check in ("memcheck", "racecheck"):
            command: list[str | Path] = [tool, "--tool", check, "--error-exitcode", "9", *probe]
            # Allocations of their own, so that one tensor's end is not another's beginning.
            run.stage(f"{check} {backend}", command, 45, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def _measure(run: Run, python: Path, backends: Sequence[str]) -> Path | None:
    """One result file of all backends, under build/; None where nothing was measured."""
    path = WORK / "result.json"
    path.unlink(missing_ok=True)
    for number, backend in enumerate(backends):
        share = max(20.0, (run.left() - _LAST_SECONDS) / (len(backends) - number))
        command: list[str | Path] = [python, "-m", "benchmarks", "--backend", backend]
        command += ["--json", path]
        command += ["--append", "--budget", str(int(0.8 * share))]
        run.stage(f"benchmark {backend}", command, share)
    return path if path.exists() else None


_RECORD = """
import json, sys
from dataclasses import replace
from pathlib import Path
from benchmarks import record
result = record.load(Path(sys.argv[1]))
stages = [record.Stage(**stage) for stage in json.loads(sys.argv[2])]
target = Path(sys.argv[3]) / f"{result.kind}.json"
record.save(replace(result, stages=stages), target)
print(target)
"""


def _record(run: Run, python: Path, path: Path) -> Path | None:
    """Put the result, with the stages in it, where results of its kind lie."""
    folder = WORK if run.rehearsal else ROOT / "benchmarks" / "results"
    stages = json.dumps([outcome._asdict() for outcome in run.outcomes])
    text = run.stage("record", [python, "-c", _RECORD, path, stages, folder], 30)
    return None if text is None else Path(text.strip().splitlines()[-1])


def _summary(run: Run, python: Path, path: Path | None) -> None:
    """The targets, then the stages: the short table that comes last."""
    if path is not None:
        command = [str(python), "-m", "benchmarks.report", "--targets", str(path)]
        done = subprocess.run(
            command, cwd=ROOT, env=run.environment, text=True, stdout=subprocess.PIPE, check=False
        )
        print(done.stdout)
        print(f"result: {path}\n")
    if run.rehearsal:
        print("REHEARSAL: no GPU took part.\n")
    print("| stage | outcome | seconds | note |\n| --- | --- | ---: | --- |")
    for outcome in run.outcomes:
        print(f"| {outcome.name} | {outcome.status} | {outcome.seconds:.0f} | {outcome.note} |")


def main(argv: Sequence[str] | None = None) -> int:
    """Run every stage. Returns the exit status: 0 if all that could run was ok."""
    parser = argparse.ArgumentParser(prog="tools/gpu_run.py", description=__doc__)
    parser.add_argument(
        "--no-build", action="store_true", help="use this Python and the package it has"
    )
    parser.add_argument("--no-tests", action="store_true", help="the benchmark alone")
    arguments = parser.parse_args(argv)
    run = Run(os.environ.get(REHEARSAL, "") not in ("", "0"))
    WORK.mkdir(parents=True, exist_ok=True)
    python = Path(sys.executable)
    if not arguments.no_build:
        python = environment(WORK / "venv")
        install: list[str | Path] = [python, "-m", "pip", "install", "--no-build-isolation"]
        install += ["--no-deps", "-e", "."]
        run.stage("build", install, 150, build_variables(run.rehearsal))
    found = _look(run, python)
    if found["gpu"] is None and not run.rehearsal:
        print("error: torch sees no GPU here; LORA_ORTHO_GPU_REHEARSAL=1 rehearses without one")
        return 1
    backends = _backends(run, found)
    if not arguments.no_tests:
        # Under Triton's interpreter the tests for GPUs alone fill the time.
        tests = [name for name in _TESTS[: 1 if run.rehearsal else None] if (ROOT / name).exists()]
        if tests:
            run.stage("tests", [python, "-m", "pytest", "-q", *tests], 120)
        else:
            run.absent("tests", f"there is no {_TESTS[0]}")
    result = _measure(run, python, backends)
    if not arguments.no_tests:
        _sanitize(run, python, backends)
    target = None if result is None else _record(run, python, result)
    _summary(run, python, target)
    return 1 if target is None or any(outcome.bad for outcome in run.outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
