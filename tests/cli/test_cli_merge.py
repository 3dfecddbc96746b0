"""`lora-ortho merge`: a language model run by every method, and the folder of results."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fails, interrupted
from merge_folder import changed, save_merge
from tiny_models import WORDS, language_model

import lora_ortho
from lora_ortho.cli import main


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_merge(tmp_path_factory.mktemp("merge"))


def test_files_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "long.toml").write_bytes(b"#" * (1024 * 1024 + 1))
    (tmp_path / "latin.toml").write_bytes(b'prompt = "\xe9"')
    for name, message in {
        "none.toml": "No such file",
        "pipe.toml": "not a regular file",
        "long.toml": "larger than",
        "latin.toml": "not valid TOML",
    }.items():
        assert message in fails(capsys, "merge", tmp_path / name)
    assert "not a regular file" in fails(capsys, "merge", tmp_path)


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the configuration, parts of it replaced, with --json."""

    def call(*arguments: str, **replaced: str) -> dict[str, Any]:
        file = changed(workplace, *replaced.items())
        assert main(["merge", str(file), "--json", "--quiet", *arguments]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        found: dict[str, Any] = json.loads(captured.out)
        return found

    return call


@pytest.mark.parametrize("strata", [1, 2])
def test_language_model_by_every_method(workplace: Path, run: Run, strata: int) -> None:
    """Every loss equals one taken here from the model and the formula's own layers."""
    found = run(samples=f"samples = 3\nstrata = {strata}")
    assert found["strata"] == strata
    model: Any = language_model()
    adapters = [lora_ortho.load_adapter(workplace / name, model) for name in ("one", "two")]
    ids = torch.tensor([[3 + j for j in range(len(WORDS))] * 3])

    def loss() -> float:
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, :-1]
            return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))

    wanted: dict[str, list[float]] = {"bare model": [loss()]}
    for adapter, weight, name in zip(adapters, (1.0, 0.5), ("one", "second"), strict=True):
        with lora_ortho.inject(model, [adapter], weights=[weight], method="direct"):
            wanted[f"{name} alone"] = [loss()]
    for method in ("direct", "dropout", "orthogonal"):
        settings: Any = {"p": [0.5, 0.5], "weights": [1.0, 0.5], "method": method, "seed": 0}
        settings["strata"] = strata
        with lora_ortho.inject(model, adapters, backend="reference", **settings) as handle:
            wanted[method] = []
            for sample in range(1 if method == "direct" else 3):
                handle.set(sample=sample)
                wanted[method].append(loss())
    assert list(found["losses"]) == list(wanted)
    for key, values in wanted.items():
        assert [row[0] for row in found["losses"][key]] == pytest.approx(values, abs=2e-6)
    assert len({row[0] for row in found["losses"]["orthogonal"]}) == 3
    assert set(found["written"]) == set(wanted)


def test_seed_and_methods(run: Run) -> None:
    first = run(samples='samples = 1\nmethods = ["orthogonal"]\nseed = 5')
    assert run(samples='samples = 1\nmethods = ["orthogonal"]\nseed = 5') == first
    other = run(samples='samples = 1\nmethods = ["orthogonal"]\nseed = 6')
    assert list(first["losses"]) == ["bare model", "one alone", "second alone", "orthogonal"]
    assert other["losses"]["orthogonal"] != first["losses"]["orthogonal"]
    assert other["losses"]["bare model"] == first["losses"]["bare model"]


def test_table_and_folder(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    arguments = ["merge", str(workplace / "merge.toml"), "--out", str(out), "--quiet"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "orthogonal" in text
    assert "±" in text
    assert (out / "comparison.txt").read_text(encoding="utf-8") == text
    assert json.loads((out / "comparison.json").read_text())["adapters"] == ["one", "second"]
    assert main(arguments) == 1
    assert "--force" in capsys.readouterr().err
    (out / "comparison.txt").write_text("old")
    assert main([*arguments, "--force"]) == 0
    assert (out / "comparison.txt").read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


@pytest.mark.parametrize(
    "strange", ["thesis.txt", "direct/0.png", "grid.png/0.png", "direct/holiday.png", "bare model"]
)
def test_force_replaces_results_alone(
    strange: str, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What no merge wrote stays, in the folder of results and in that of a run that failed."""
    out = tmp_path / "results"
    arguments = ["merge", workplace / "merge.toml", "--out", out, "--force", "--quiet"]
    for folder in (out, tmp_path / "results.unfinished"):
        (folder / strange).parent.mkdir(parents=True)
        (folder / strange).write_text("precious")
        assert "comparison.json" in fails(capsys, *arguments) or folder != out
        row = "bare model" if strange.startswith("direct/0") else "direct"
        (folder / "comparison.json").write_text(json.dumps({"difference": {row: {}}}))
        first = str(folder / strange.split("/")[0])
        assert fails(capsys, *arguments).startswith(first)
        assert (folder / strange).read_text() == "precious"
        shutil.rmtree(folder)


def test_weight_0_leaves_an_adapter_out(workplace: Path, run: Run) -> None:
    """The other one then has the model to itself, at its own rate or at p = 0."""
    found = run(adapter_weight="adapter_weight = 0.0", dropout_rate="", samples="samples = 1")
    rows = ["bare model", "one alone", "direct", "dropout", "orthogonal"]
    assert list(found["losses"]) == rows
    assert found["weights"] == [1.0, 0.0]
    alone = found["losses"]["one alone"]
    for row in rows[2:]:
        assert found["losses"][row][0] == pytest.approx(alone[0], abs=2e-6)
    assert alone != found["losses"]["bare model"]


@pytest.mark.parametrize("folder", [True, False])
def test_finished_rows_are_kept(folder: bool, workplace: Path, tmp_path: Path) -> None:
    """A run that is interrupted in its last row, as a process."""
    text = (workplace / "merge.toml").read_text(encoding="utf-8")
    slow = text.replace("samples = 3", 'samples = 1000000\nmethods = ["direct", "orthogonal"]')
    (workplace / "slow.toml").write_text(slow, encoding="utf-8")
    out = tmp_path / "results"
    words = ["merge", workplace / "slow.toml", *(["--out", out] if folder else ["--json"])]
    done = interrupted(words, at="] orthogonal, sample")
    assert done.status == 1
    (line,) = (line for line in done.err.splitlines() if not line.startswith("["))
    assert line.startswith("lora-ortho: error: orthogonal: interrupted; the rows that were fin")
    kept = tmp_path / "results.unfinished"
    assert not out.exists()
    assert kept.exists() == folder
    text = (kept / "comparison.json").read_text() if folder else done.out
    found = json.loads(text)
    assert list(found["losses"]) == ["bare model", "one alone", "second alone", "direct"]
    assert found["unfinished"] == {"row": "orthogonal", "error": "interrupted"}
    if folder:
        assert done.out == ""
        assert str(kept) in line
        assert "unfinished: orthogonal" in (kept / "comparison.txt").read_text()
