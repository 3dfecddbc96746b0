"""``python -m benchmarks`` and its tools as processes: options, files, rehearsal, comparison."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from benchmark_results import empty, quartiles, timed
from native import ROOT

from benchmarks import record
from benchmarks.cases import TINY_CASES, Case
from benchmarks.device import Host
from benchmarks.machine import empty_result

SMALL = Case(24, 64, 160, 3, 4)
SHORT = ["--quick", "--case", str(SMALL), "--dtype", "float32", "--only", "forward"]


class Done(NamedTuple):
    """How a process ended."""

    status: int
    out: str
    err: str


def run(*words: str | Path, cwd: Path = ROOT, module: str = "benchmarks", **more: str) -> Done:
    """``python -m MODULE`` with these words, in an environment with these variables."""
    command = [sys.executable, "-m", module, *map(str, words)]
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **more}, text=True, capture_output=True, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


def compare(*words: str | Path) -> Done:
    """``python -m benchmarks.compare`` with these words."""
    return run(*words, module="benchmarks.compare")


@pytest.mark.parametrize(
    "words",
    [
        ["--case", "1x2"],
        ["--append"],
        ["--only", "nothing"],
        ["--save", "--json", "x.json"],
        ["--budget", "0"],
        ["--plot", "x.txt"],
    ],
)
def test_wrong_usage(words: Sequence[str]) -> None:
    done = run(*words)
    assert done.status == 2
    assert done.out == ""
    assert words[0] in done.err.splitlines()[-1]


def test_figures_of_a_new_kind_of_machine(tmp_path: Path) -> None:
    """Run and save where no result of this machine lies yet."""
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    shutil.rmtree(tmp_path / "benchmarks" / "results")
    kind = empty_result(Host()).kind
    hint = f"no figures of this kind of machine are recorded yet ({kind}): "
    done = run(*SHORT, cwd=tmp_path)
    assert done.status == 0
    assert f"{hint}run `lora-ortho bench --json {kind}.json` and add the file" in done.err
    done = run(*SHORT, "--save", cwd=tmp_path)
    assert done.status == 2
    assert "--save is for a source checkout" in done.err
    results = tmp_path / "benchmarks" / "results"
    results.mkdir()
    assert f"{hint}`python -m benchmarks --save` writes" in run(*SHORT, cwd=tmp_path).err
    done = run(*SHORT, "--save", cwd=tmp_path)
    assert done.status == 0
    assert hint not in done.err
    saved = results / f"{kind}.json"
    assert record.load(saved).forward[0].case == SMALL
    shown = run(saved, cwd=tmp_path, module="benchmarks.report")
    assert shown.out == done.out
    missing = "benchmarks/results/cpu-other.json"
    done = run(missing, saved, cwd=tmp_path, module="benchmarks.compare")
    assert done.status == 2
    assert f"{missing}: there is no such file; on a machine of that kind, `python -m" in done.err


def test_existing_files_are_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "result.svg"
    path.write_text("mine")
    for option, hint in (("--json", "--append adds to it, --force replaces it"), ("--plot", "")):
        done = run(option, path)
        assert done.status == 1
        assert done.err == f"error: {path} exists; {hint or '--force replaces it'}\n"
        assert path.read_text() == "mine"


def test_outputs_are_checked_before_the_work(tmp_path: Path) -> None:
    """All of the targets' cases would take minutes; a status of 1 comes at once."""
    other = tmp_path / "other.json"
    record.save(empty("cpu-other"), other)
    start = time.monotonic()
    done = run("--json", other, "--append")
    assert done.status == 1
    assert "the results differ in kind: cpu-other" in done.err
    done = run("--only", "memory", "--plot", tmp_path / "x.svg")
    assert done.status == 1
    assert "neither is measured" in done.err
    assert time.monotonic() - start < 60
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


def test_a_backend_that_does_not_work_is_an_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    done = run("--backend", "cuda")
    assert done.status == 1
    assert "backend cuda does not work here" in done.err


def test_json_to_standard_output_and_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    done = run(*SHORT, "--only", "ceilings", "--quiet", "--json")
    assert done.status == 0
    assert done.err == ""
    result = json.loads(done.out)
    assert result["forward"][0]["seconds"]["ours"]["median"] > 0
    assert result["ceilings"][0]["copy_bytes_per_second"] > 1e6
    assert set(result["targets"][0]) == {"figure", "dtype", "value", "target", "met"}
    path.write_text(done.out)
    done = run(*SHORT, "--only", "backward", "--json", path, "--append", "--quiet")
    assert done.status == 0
    joined = record.load(path)
    assert [len(joined.rows(name)) for name in ("forward", "backward", "ceilings")] == [1, 1, 1]


def test_rehearsal_of_a_gpu_run(tmp_path: Path) -> None:
    """Every stage's outcome in a file that no one takes for a GPU's."""
    path = tmp_path / "result.json"
    done = run(
        "--quick", "--case", str(TINY_CASES[1]), "--backend", "reference", "--json", path,
        LORA_ORTHO_GPU_REHEARSAL="1", TRITON_INTERPRET="1",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert "REHEARSAL" in done.out
    assert " met" not in done.out
    assert "MISSED" not in done.out
    result = record.load(path)
    assert result.kind.startswith("rehearsal-")
    (found,) = result.peers
    assert {"paper/ours", "stored mask/ours"} <= found.ratios.keys()
    assert found.refused.keys() <= {"vllm"}


def test_a_slower_kernel_is_reported(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    result = empty("cpu-x")
    result.forward.append(timed(SMALL, 1.0))
    record.save(result, old)
    slower = replace(result.forward[0], ratios={"ours/direct": quartiles(0.6)})
    record.save(replace(result, forward=[slower]), new)  # by 20 %
    assert compare(old, old).status == 0
    done = compare(old, new, "--beyond", "1.1")
    assert done.status == 1
    assert " WORSE  x1.20  forward" in done.out
    assert compare(old, new, "--beyond", "1.3").status == 0
    done = compare(new, old, "--beyond", "1.1")
    assert done.status == 0
    assert "better  x0.83" in done.out


def test_rows_that_are_gone_are_reported(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    full = empty("cpu-x")
    full.peers.append(timed(SMALL, 1.0, ratios={"paper/ours": quartiles(1.0)}))
    record.save(full, old)
    record.save(replace(full, peers=[]), new)
    done = compare(old, new)
    assert done.status == 1
    assert "no such row" in done.out
    wrong = replace(full.peers[0], ratios={}, refused={"ours": "wrong result"})
    record.save(replace(full, peers=[wrong]), new)
    done = compare(old, new)
    assert done.status == 1
    assert "gone; refused: {'ours': 'wrong result'}" in done.out
    record.save(replace(full, kind="cpu-other"), new)
    assert compare(old, new).status == 2
    assert compare(old, new, "--beyond", "0.9").status == 2
