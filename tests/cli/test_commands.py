"""Every command with every option it has, as a process: exit status, output, errors, progress."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from commands import interrupted
from native import ROOT, environment
from tiny_models import WORDS, language_model, save_adapter, save_language_model

import lora_ortho
from benchmarks.targets import CPU_TARGETS

BENCH = "bench --quick --case 24x64x160-3x4 --dtype float32 --only forward"
CONFIG = """
pipe_id = "base"
texts = ["text.txt"]
samples = 2
device = "cpu"

[[loras]]
file_path = "one"
dropout_rate = 0.5

[[loras]]
file_path = "two"
dropout_rate = 0.5
adapter_weight = 0.5
"""


class Done(NamedTuple):
    """What a process did."""

    status: int
    out: str
    err: str


def run(*arguments: str, cwd: Path = ROOT, seconds: int = 300) -> Done:
    """``lora-ortho`` with these arguments, in a process of its own."""
    command = [sys.executable, "-m", "lora_ortho", *arguments]
    variables = environment({"HF_HUB_OFFLINE": "1"})
    done = subprocess.run(
        command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=seconds,
        check=False,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, two adapters, inputs of one, and a merge of both."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    made = tmp_path_factory.mktemp("commands")
    save_language_model(made / "base")
    for seed, name in enumerate(["one", "two"], start=1):
        save_adapter(made / name, language_model(), seed)
    part = lora_ortho.load_adapter(made / "one").layers
    layer, adapter = next(iter(part.items()))
    from safetensors.torch import save_file

    save_file({layer: torch.ones(2, adapter.lora_A.shape[1])}, made / "inputs.safetensors")
    (made / "text.txt").write_text(" ".join(WORDS * 3), encoding="utf-8")
    (made / "merge.toml").write_text(CONFIG, encoding="utf-8")
    return made


# Every run ends with status 0 and leaves these files. {out} is an empty folder.
RUNS = {
    "--version": (),
    "doctor": (),
    "doctor --json --quiet": (),
    "methods": (),
    "methods --json --quiet": (),
    "inspect one two --p 0.5 0.5 --layers --plot {out}/map.svg --inputs one=inputs.safetensors": (
        "map.svg",
    ),
    "inspect one two --model base --plot {out}/map.svg --force --json --quiet": ("map.svg",),
    "merge merge.toml --out {out}/made": ("made/comparison.json", "made/comparison.txt"),
    "merge merge.toml --out {out}/made --force --json --quiet": ("made/comparison.json",),
    "merge merge.toml --export {out}/saved --method ortho_rows --mixed-ranks --json": (
        "saved/adapter_model.safetensors",
        "saved/adapter_config.json",
    ),
    "merge merge.toml --export {out}/saved --rank 3 --force": ("saved/adapter_config.json",),
    f"{BENCH} --json {{out}}/r.json --append --budget 60 --quiet": ("r.json",),
    f"{BENCH} --json {{out}}/r --plot {{out}}/r.svg --backend cpu --force": ("r", "r.svg"),
}


@pytest.mark.parametrize("line", RUNS)
def test_it_runs(line: str, folder: Path, tmp_path: Path) -> None:
    given = line.replace("{out}", str(tmp_path)).split()
    if given[0] == "bench" and lora_ortho.backends.available()["cpu"] is not None:
        pytest.skip("the compiled CPU kernels are not installed")
    for name in RUNS[line] if "--force" in given else ():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    done = run(*given, cwd=folder)
    assert done.status == 0, done
    assert done.out
    assert "Traceback" not in done.err
    if "--quiet" in given:
        assert done.err == ""
    if "--json" in given and given[0] != "bench":
        json.loads(done.out)
    for name in RUNS[line]:
        assert (tmp_path / name).stat().st_size > len("old")
    assert list(tmp_path.rglob(".*")) == []


@functools.cache
def help_of(*command: str) -> str:
    """The text of --help; it ends with status 0."""
    done = run(*command, "--help")
    assert done.status == 0, done
    return done.out


def options(text: str) -> set[str]:
    """The options that a help text lists."""
    return set(re.findall(r"^ +(?:-\w, )?(--[\w-]+)", text, re.MULTILINE)) - {"--help"}


def test_every_option_is_among_the_runs() -> None:
    commands = re.findall(r"^    (\w+) ", help_of(), re.MULTILINE)
    assert {"inspect", "merge", "methods", "bench", "doctor"} <= set(commands)
    listed = {("", option) for option in options(help_of())}
    listed |= {(command, option) for command in commands for option in options(help_of(command))}
    used = {
        ("" if line.startswith("--") else line.split()[0], word)
        for line in RUNS
        for word in line.split()
        if word.startswith("--")
    }
    # It writes into the sources; test_run.py runs it on a copy of its folder.
    assert listed - used == {("bench", "--save")}
    assert used <= listed


def test_version_is_that_of_the_package() -> None:
    assert run("--version") == Done(0, f"lora-ortho {lora_ortho.__version__}\n", "")


def test_script_of_the_installation_is_the_same_program() -> None:
    script = Path(sys.executable).with_name("lora-ortho")
    if not script.exists():
        pytest.skip(f"{script} is not installed")
    done = subprocess.run([script, "bench", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout == help_of("bench")
    assert done.stdout.startswith("usage: lora-ortho bench ")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "paint",
        "inspect",
        "inspect one --colour",
        "inspect one --p much",
        "merge",
        "merge merge.toml --rank few",
        "merge merge.toml --mthod direct",
        "merge merge.toml --method ortho_rows",
        "merge merge.toml --rank 3 --out new",
        "doctor --loud",
        "bench --case 3",
        "bench --only nothing",
        "bench --append",
    ],
)
def test_wrong_usage_is_status_2(line: str) -> None:
    done = run(*line.split())
    assert done.status == 2, done
    assert done.out == ""
    commands = [word for word in line.split()[:1] if word in ("inspect", "merge", "doctor")]
    assert done.err.startswith(" ".join(["usage: lora-ortho", *commands, ""]))
    assert "error: " in done.err.splitlines()[-1]


# What fails with status 1, and a part of its one line of error.
FAILURES = {
    "inspect nowhere": "does not exist",
    "inspect one one": "given twice",
    "inspect one two --plot text.txt": "--force replaces it",
    "merge nowhere.toml": "No such file",
    "merge merge.toml --out one": "--force replaces it",
    "merge merge.toml --out one --force": "holds no comparison.json",
    "merge merge.toml --export one": "--force replaces it",
    "merge merge.toml --export new --method dropout": "ortho_rows",
    "bench --json text.txt": "--force replaces it",
    "bench --backend cuda": "does not work here",
}


@pytest.mark.parametrize("line", FAILURES)
def test_a_failure_is_status_1_and_one_line(line: str, folder: Path) -> None:
    if "cuda" in line and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    before = sorted(path.name for path in folder.iterdir())
    done = run(*line.split(), cwd=folder)
    assert done.status == 1, done
    assert done.out == ""
    (words,) = (text for text in done.err.splitlines() if not text.startswith("["))
    assert "error: " in words
    assert FAILURES[line] in words
    assert sorted(path.name for path in folder.iterdir()) == before


def bench(*arguments: str, **variables: str) -> tuple[Done, dict[str, Any]]:
    """A short run of the benchmarks that prints JSON."""
    if lora_ortho.backends.available()["cpu"] is not None:
        pytest.skip("the compiled CPU kernels are not installed")
    command = [sys.executable, "-m", "lora_ortho", *BENCH.split(), "--json", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Done(done.returncode, done.stdout, done.stderr), json.loads(done.stdout)


def test_bench_measures_and_holds_its_targets() -> None:
    done, result = bench("--quiet")
    assert done.err == ""
    (row,) = result["forward"]
    assert "refused" not in row
    assert row["ratios"]["ours/direct"]["median"] > 0
    targets = result["targets"]
    assert {target.figure for target in CPU_TARGETS} == {entry["figure"] for entry in targets}
    for entry in targets:
        assert set(entry) == {"figure", "dtype", "value", "target", "met"}
        assert entry["value"] is None  # of none of the targets' own cases
        assert entry["met"] is None


def test_bench_on_a_processor_without_figures_says_how_to_give_them() -> None:
    """A processor of another kind, by the cap on the instruction set."""
    from lora_ortho.backends import cpu

    done, result = bench(**{cpu.ISA_VARIABLE: cpu.instruction_sets()[0]})
    name = f"{result['kind']}.json"
    if (ROOT / "benchmarks" / "results" / name).exists():
        pytest.skip(f"figures of {result['kind']} are recorded")
    assert f"`python -m benchmarks --save` writes benchmarks/results/{name}" in done.err


def test_bench_keeps_what_it_measured_when_it_is_interrupted(tmp_path: Path) -> None:
    if lora_ortho.backends.available()["cpu"] is not None:
        pytest.skip("the compiled CPU kernels are not installed")
    path = tmp_path / "result.json"
    case = "--case 24x64x160-3x4 " * 2000
    words = f"bench --quick {case} --dtype float32 --only forward --json {path}".split()
    done = interrupted(words, at="[2/2000]")
    assert done.status == 1
    assert "| forward ÷ direct" in done.out
    line = done.err.splitlines()[-1]
    assert line.startswith("error: interrupted: ")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["interrupted"] is True
    assert len(result["forward"]) >= 2
    assert line == f"error: interrupted: {2000 - len(result['forward'])} rows were not measured"
