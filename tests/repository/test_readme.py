"""The README runs as it is written, and so does every command of every page."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from native import ROOT
from pages import DOCS, NEEDS, blocks, call, commands, run_python, run_shell, shell, spans
from tiny_models import WORDS, language_model, save_adapter, save_language_model

import lora_ortho
from lora_ortho import backends

README = ROOT / "README.md"
GENERATED = "api.md"  # signatures, from docstrings
PAGES = [
    README,
    *sorted(page for page in DOCS.glob("*.md") if page.name != GENERATED),
    ROOT / "benchmarks" / "README.md",
    ROOT / "examples" / "README.md",
]
MERGE = """
pipe_id = "base"
texts = ["text.txt"]
samples = 2
[[loras]]
file_path = "one"
[[loras]]
file_path = "two"
"""
# Only these rows of a benchmark, since all of them take minutes.
SHORT = "--quick --case 24x64x160-3x4 --dtype float32 --only forward"
FOLDER, SOURCES = "folder", "sources"  # of adapters; of the project
# A command as it is written, where it is run, and what is run: itself, or what is given.
RUN: dict[str, tuple[str, str]] = {
    "lora-ortho inspect one two": (FOLDER, ""),
    "lora-ortho merge merge.toml": (FOLDER, ""),
    "lora-ortho merge": (FOLDER, "lora-ortho merge --help"),
    "lora-ortho methods": (FOLDER, ""),
    "lora-ortho doctor": (FOLDER, ""),
    "lora-ortho bench": (FOLDER, f"lora-ortho bench {SHORT}"),
    "lora-ortho bench --help": (FOLDER, ""),
    "lora-ortho bench --quick": (FOLDER, f"lora-ortho bench {SHORT}"),
    "python -m lora_ortho": (FOLDER, "python -m lora_ortho --help"),
    "python -m lora_ortho.plugins.mergekit": (
        FOLDER,
        "python -m lora_ortho.plugins.mergekit --help",
    ),
    "python -m benchmarks": (SOURCES, f"python -m benchmarks {SHORT}"),
    "python -m benchmarks --quick": (SOURCES, f"python -m benchmarks {SHORT}"),
    "python -m benchmarks --case 512x2048x2048-16x32 --dtype float32 --only forward": (SOURCES, ""),
    "python -m benchmarks --json OLD": (
        FOLDER,
        f'PYTHONPATH="$LORA_ORTHO" python -m benchmarks {SHORT} --json OLD; test -s OLD',
    ),
    "python -m benchmarks --json result.json --plot ratios.svg": (
        SOURCES,
        f'cd "$OUT"; for more in "" --force --append; do PYTHONPATH="$LORA_ORTHO" python -m '
        f"benchmarks {SHORT} --json result.json $more; done; rm -f ratios.svg; "
        f'PYTHONPATH="$LORA_ORTHO" python -m benchmarks {SHORT} --force --json result.json --plot '
        "ratios.svg; test -s ratios.svg",
    ),
    "python -m benchmarks.report result.json": (
        SOURCES,
        "python -m benchmarks.report benchmarks/results/*.json",
    ),
    "pytest benchmarks/": (
        SOURCES,
        "python -m pytest -q benchmarks -k 'forward and 512x768' --benchmark-max-time=0.05 "
        "--benchmark-min-rounds=3",
    ),
    "python -m benchmarks.compare OLD NEW": (
        SOURCES,
        "set -- benchmarks/results/*.json; python -m benchmarks.compare $1 $1",
    ),
    "python -m benchmarks.compare OLD NEW --beyond 1.1": (
        SOURCES,
        "set -- benchmarks/results/*.json; python -m benchmarks.compare $1 $1 --beyond 1.1",
    ),
}
NOT_RUN = {
    "cmake --preset release -DLORA_ORTHO_CUDA=ON && cmake --build --preset release": "compiles for "
    "minutes and needs nvcc; cpp.md builds without CUDA kernels, test_consumers.py installs",
    "cmake --install build/release --prefix <prefix>": "the same",
    "cmake --preset python": "architecture.md names the preset; pip builds by the same CMake files",
    "cmake --build --preset python": "the same",
    "python tools/cuda_facts.py": "needs nvcc; test_cuda_facts.py calls what it calls",
    "python tools/triton_facts.py": "compiles 288 kernels for minutes; "
    "tests/triton_kernels/test_triton_compile.py runs it with --print",
    "python -m benchmarks --save": "writes into the sources; test_run.py runs it on a copy of them",
    "shrink   s = x Aᵀ                                   (tokens, d_in) × (Σr, d_in)": "a formula",
    "```SmolLM2-135M-Instruct, 4 adapters on 120 layers, float32, 2 threads, seed 0": "what `make "
    "demo` prints in three minutes; tests/repository/test_demo.py runs the demo in small",
    "adapters ─ pack ─▶ packed factors                      seed, stream, sample, strata, row, "
    "column": "a picture",
}

# The same for all commands that begin so.
FAMILIES = {
    "make ": "takes minutes and downloads; that there is such a target is tested below",
    "pytest tests/": "these tests; test_architecture.py looks that they are there",
    "pip install": "installs from the network; tests of packaging install",
    "export PIP_": "the same",
}


def written() -> dict[str, list[str]]:
    """Commands that no page's own test runs, by what is written; the pages that have them."""
    found: dict[str, list[str]] = {}
    for page in PAGES:
        run_there = [
            line
            for block in blocks(page)
            if page.parent == DOCS and page.stem in NEEDS and block.kind == "sh"
            for line in block.text.splitlines()
        ]
        for command in commands(page):
            if command not in run_there:
                found.setdefault(command, []).append(page.name)
    return found


def test_every_command_is_run_or_has_a_reason() -> None:
    found = {c: pages for c, pages in written().items() if not c.startswith(tuple(FAMILIES))}
    assert found.keys() - RUN.keys() - NOT_RUN.keys() == set(), "write down how it is run"
    assert (RUN.keys() | NOT_RUN.keys()) - found.keys() == set(), "on no page any more"


def test_every_target_of_make_is_there(variables: dict[str, str]) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    targets = {command for command in written() if command.startswith("make ")}
    assert {"make demo", "make test", "make results"} <= targets
    for command in sorted(targets):
        assert run_shell(command.replace("make", "make -n", 1), variables, ROOT, command)


def test_calls_in_prose_fit_the_signatures() -> None:
    """Those of public functions: `lora_ortho.export(…)`, or `export(…)`."""
    checked = []
    for page in PAGES:
        for words in spans(page):
            found = call(words)
            name = "" if found is None else ast.unparse(found.func).removeprefix("lora_ortho.")
            if found is None or name not in lora_ortho.__all__:
                continue
            given = {keyword.arg: None for keyword in found.keywords if keyword.arg}
            inspect.signature(getattr(lora_ortho, name)).bind_partial(*found.args, **given)
            checked.append(words)
    assert checked


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What README.md and the commands name: a model and two adapters, a merge, a text."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    made = tmp_path_factory.mktemp("readme") / "work"
    save_language_model(made / "base")
    for seed, name in enumerate(["one", "two"], start=1):
        save_adapter(made / name, language_model(), seed)
    (made / "text.txt").write_text(" ".join(WORDS * 3), encoding="utf-8")
    (made / "merge.toml").write_text(MERGE, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of the commands."""
    made = tmp_path_factory.mktemp("shell")
    return {**shell(made / "tools"), "OUT": str(made)}


@pytest.mark.parametrize("command", RUN)
def test_command(command: str, folder: Path, variables: dict[str, str]) -> None:
    where, instead = RUN[command]
    if "bench" in command and backends.available()["cpu"] is not None:
        pytest.skip("the compiled CPU kernels are not installed")
    if "mergekit" in command:
        pytest.importorskip("mergekit", reason="mergekit is not installed")
    cwd = folder if where == FOLDER else ROOT
    assert run_shell(instead or command, variables, cwd, command)


def test_readme_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    code = [block for block in blocks(README) if block.kind == "python"]
    assert len(code) == 3
    names: dict[str, Any] = {}
    run_python(code[0], README, names)
    assert names["y"].shape == (2, 77, 4096)
    assert names["layer"].method == "direct"
    assert len([line for line in code[0].text.splitlines() if line]) <= 10
    tokens = torch.arange(8)[None]
    bare = language_model()(tokens).logits
    run_python(code[1], README, names)
    assert not torch.allclose(names["merged"], bare, atol=1e-3)
    assert torch.equal(names["model"](tokens).logits, bare)
    run_python(code[2], README, names)
    assert not torch.allclose(names["first"], bare, atol=1e-3)
    assert not torch.allclose(names["first"], names["second"], atol=1e-3)
    assert torch.equal(names["model"](tokens).logits, bare)
    assert (folder / "merged" / "adapter_model.safetensors").is_file()


def test_readme_is_short_above_its_figures() -> None:
    """What it does, a picture, installing, ten lines, use: on two or three screens."""
    head, _, _ = README.read_text(encoding="utf-8").partition("## How fast it is")
    assert head.count("\n") <= 100
    for needed in ("c_j", "docs/images/demo.svg", "pip install", "make demo", "make test"):
        assert needed in head
    assert len(re.findall(r"!\[", head)) == 1
