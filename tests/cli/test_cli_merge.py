"""`lora-ortho merge`: the TOML file, and a language model run by every method."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import WORDS, language_model, save_adapter, save_language_model

import lora_ortho
from lora_ortho.cli import main
from lora_ortho.merge_config import MergeConfig, read_config

# As the paper's reference code has them, values apart.
PAPER = """
save_folder_name = "duck_toy_yarn"

pipe_id = "stabilityai/stable-diffusion-xl-base-1.0"
prompt = "[B] duck, guaguazhenzhi (style), best quality"
neg_prompt = ""
batch_size = 4
num_batches = 1

[[loras]]
file_path = "anonymousrepos/SDXL_LoRA_Models"
file_name = "community/yarn.safetensors"
adapter_name = "yarn"
dropout_rate = 0.5
adapter_weight = 1.0

[[loras]]
file_path = "anonymousrepos/SDXL_LoRA_Models"
file_name = "trained/duck_toy.safetensors"
adapter_name = "duck_toy"
dropout_rate = 0.25
adapter_weight = 0.75
"""


def parse(tmp_path: Path, text: str) -> MergeConfig:
    file = tmp_path / "config.toml"
    file.write_text(text, encoding="utf-8")
    return read_config(file)


def test_the_papers_file_as_it_is(tmp_path: Path) -> None:
    config = parse(tmp_path, PAPER)
    assert config.pipe_id == "stabilityai/stable-diffusion-xl-base-1.0"
    assert (config.batch_size, config.num_batches, config.neg_prompt) == (4, 1, "")
    assert config.save_folder_name == "duck_toy_yarn"
    assert config.names == ["yarn", "duck_toy"]
    assert config.p == [0.5, 0.25]
    assert config.weights == [1.0, 0.75]
    assert config.loras[0].file_name == "community/yarn.safetensors"
    assert (config.steps, config.guidance_scale, config.clip_skip) == (40, 7.0, None)


def test_no_rate_and_no_name(tmp_path: Path) -> None:
    config = parse(tmp_path, '[[loras]]\nfile_path = "x/yarn"\n')
    assert config.p is None
    assert config.names == ["yarn"]
    assert config.weights == [1.0]


LORA = '[[loras]]\nfile_path = "x"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt = ", "not valid TOML"),
        (f"prompt = {'[' * 100000}", "nested too deeply"),
        ('prompt = "\\x00', "not valid TOML"),
        ('prompt = "x"', r"needs at least one \[\[loras\]\] table"),
        ("loras = 3", r"needs at least one \[\[loras\]\] table"),
        ("[[loras]]\n", r"loras\[0\]: file_path is missing"),
        (f"{LORA}rate = 0.5\n", r"loras\[0\]: unknown key 'rate'; known are file_path"),
        (f'colour = "red"\n{LORA}', "unknown key 'colour'; known are pipe_id"),
        (f"{LORA}dropout_rate = 1.0\n", r"loras\[0\]: dropout_rate must be in \[0, 1\), got 1.0"),
        (f"{LORA}dropout_rate = nan\n", r"loras\[0\]: dropout_rate must be finite"),
        (f'{LORA}dropout_rate = "0.5"\n', r"loras\[0\]: dropout_rate must be a number, got '0.5'"),
        (f"{LORA}adapter_weight = true\n", r"adapter_weight must be a number, got True"),
        (f"{LORA}{LORA}", "adapter_name 'x' occurs twice"),
        (
            f'{LORA}dropout_rate = 0.5\n{LORA}adapter_name = "y"\n',
            r"loras\[1\] has no dropout_rate while others have one",
        ),
        (f"batch_size = 0\n{LORA}", "batch_size must be at least 1, got 0"),
        (f"steps = 1.5\n{LORA}", "steps must be an integer, got 1.5"),
        (f'kind = "audio"\n{LORA}', "kind must be one of language, image, got 'audio'"),
        (f'methods = ["ortho"]\n{LORA}', "methods must be some of orthogonal, dropout, direct"),
        (f"methods = []\n{LORA}", "methods must be some of"),
        (f"texts = [1]\n{LORA}", "texts must be a list of texts"),
        (f'save_folder_name = "../up"\n{LORA}', "save_folder_name must be the name of a folder"),
    ],
)
def test_refused_files(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    file = tmp_path / "wrong.toml"
    file.write_text(text, encoding="utf-8")
    assert main(["merge", str(file)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert str(file) in line
    assert re.search(message, line), line


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
        assert main(["merge", str(tmp_path / name)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert main(["merge", str(tmp_path)]) == 1
    assert "not a regular file" in capsys.readouterr().err


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, two adapters, a text, and a configuration for them."""
    folder = tmp_path_factory.mktemp("merge")
    save_language_model(folder / "base")
    for seed, name in enumerate(["one", "two"], start=1):
        save_adapter(folder / name, language_model(), seed)
    (folder / "text.txt").write_text(" ".join(WORDS * 3), encoding="utf-8")
    (folder / "merge.toml").write_text(
        """
pipe_id = "base"
prompt = "the model"
texts = ["text.txt"]
max_new_tokens = 4
samples = 3
device = "cpu"

[[loras]]
file_path = "one"
dropout_rate = 0.5

[[loras]]
file_path = "."
file_name = "two/adapter_model.safetensors"
adapter_name = "second"
dropout_rate = 0.5
adapter_weight = 0.5
""",
        encoding="utf-8",
    )
    return folder


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the configuration, parts of it replaced, with --json."""

    def call(*arguments: str, **replaced: str) -> dict[str, Any]:
        text = (workplace / "merge.toml").read_text(encoding="utf-8")
        for old, new in replaced.items():
            before = text
            text = "\n".join(new if line.startswith(old) else line for line in text.splitlines())
            assert text != before
        file = workplace / "changed.toml"
        file.write_text(text, encoding="utf-8")
        assert main(["merge", str(file), "--json", "--quiet", *arguments]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        found: dict[str, Any] = json.loads(captured.out)
        return found

    return call


def test_language_model_by_every_method(workplace: Path, run: Run) -> None:
    """Every loss equals one taken here from the model and the formula's own layers."""
    found = run()
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


def test_force_never_replaces_a_strangers_folder(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("precious")
    arguments = ["merge", str(workplace / "merge.toml"), "--out", str(tmp_path), "--force"]
    assert main(arguments) == 1
    assert "comparison.json" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("pipe_id", 'pipe_id = "one"', "has neither model_index.json nor config.json"),
        ("pipe_id", "", "no pipe_id"),
        ("texts", 'texts = ["none.txt"]', "there is no file none.txt"),
        ("prompt", 'prompt = ""', "no token"),
        ("device", 'device = "abacus"', "device: torch cannot use 'abacus' here"),
        ("samples", 'backend = "abacus"', "backend must be None or one of"),
        ("dropout_rate", "dropout_rate = 0.25", "layer model.layers.0.mlp.down_proj: p: the orth"),
        ('file_path = "one"', 'file_path = "base"', "has no adapter_config.json"),
    ],
)
def test_refused_runs(
    old: str, new: str, message: str, workplace: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    text = (workplace / "merge.toml").read_text(encoding="utf-8")
    lines = [new if line.startswith(old) else line for line in text.splitlines()]
    file = workplace / "wrong.toml"
    file.write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "results"
    assert main(["merge", str(file), "--out", str(out), "--quiet"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert message in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("samples", "", "cannot load"),  # as it is, all is well up to the model
        ("dropout_rate", "dropout_rate = 0.25", "layer model.layers.0.mlp.down_proj: p: the orth"),
        ("texts", 'texts = ["latin.txt"]', "latin.txt is not UTF-8"),
        ("texts", 'texts = ["none.txt"]', "there is no file none.txt"),
        ("device", 'device = "abacus"', "torch cannot use 'abacus'"),
        ("samples", 'backend = "cuda"', "backend 'cuda' cannot serve this merge"),
        ('file_path = "one"', 'file_path = "nan"', "NaN"),
        ('file_path = "one"', 'file_path = "none"', "none"),
        ("adapter_weight", "adapter_weight = 0.0", "cannot load"),
        ("[[loras]]", "[[loras]]\nadapter_weight = 0.0", "every adapter_weight is 0"),
    ],
)
def test_refused_before_the_model_is_loaded(
    old: str, new: str, message: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model's folder has nothing but its config.json: loading it is an error of its own."""
    (workplace / "hollow").mkdir(exist_ok=True)
    shutil.copy(workplace / "base" / "config.json", workplace / "hollow")
    (workplace / "latin.txt").write_bytes(b"\xe9")
    factors = load_file(workplace / "one" / "adapter_model.safetensors")
    next(iter(factors.values()))[0, 0] = torch.nan
    shutil.copytree(workplace / "one", workplace / "nan", dirs_exist_ok=True)
    save_file(factors, workplace / "nan" / "adapter_model.safetensors")
    text = (workplace / "merge.toml").read_text(encoding="utf-8").replace('"base"', '"hollow"')
    if "every" in message:
        text = text.replace("adapter_weight = 0.5\n", "")
    lines = [new if line.startswith(old) else line for line in text.splitlines()]
    (workplace / "early.toml").write_text("\n".join(lines), encoding="utf-8")
    assert main(["merge", str(workplace / "early.toml"), "--quiet"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert message in line
    assert ("cannot load" in line) == (message == "cannot load")


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
    words = [sys.executable, "-m", "lora_ortho", "merge", str(workplace / "slow.toml")]
    words += ["--out", str(out)] if folder else ["--json"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    late = threading.Timer(120, process.kill)
    late.start()
    seen = next((line for line in process.stderr if "] orthogonal, sample" in line), None)
    process.send_signal(signal.SIGINT)
    late.cancel()
    assert seen is not None
    shown, err = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = (line for line in err.splitlines() if not line.startswith("["))
    assert line.startswith("lora-ortho: error: orthogonal: interrupted; the rows that were fin")
    kept = tmp_path / "results.unfinished"
    assert not out.exists()
    assert kept.exists() == folder
    text = (kept / "comparison.json").read_text() if folder else shown
    found = json.loads(text)
    assert list(found["losses"]) == ["bare model", "one alone", "second alone", "direct"]
    assert found["unfinished"] == {"row": "orthogonal", "error": "interrupted"}
    if folder:
        assert shown == ""
        assert str(kept) in line
        assert "unfinished: orthogonal" in (kept / "comparison.txt").read_text()


@pytest.mark.parametrize("method", ["direct", "ortho_rows"])
def test_export(
    method: str, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The saved adapter is the one that `lora_ortho.export` makes of the same settings."""
    out = tmp_path / "merged"
    arguments = ["merge", str(workplace / "merge.toml"), "--export", str(out), "--quiet"]
    assert main([*arguments, "--method", method, "--json"]) == 0
    ranks = json.loads(capsys.readouterr().out)["ranks"]
    assert set(ranks.values()) == {8}
    adapters = [lora_ortho.load_adapter(workplace / name) for name in ("one", "two")]
    settings: Any = {"p": [0.5, 0.5], "weights": [1.0, 0.5], "seed": 0}
    lora_ortho.export(adapters, tmp_path / "wanted", method, **settings)
    wanted = lora_ortho.load_adapter(tmp_path / "wanted").layers
    found = lora_ortho.load_adapter(out).layers
    assert list(found) == list(wanted) == list(ranks)
    for name, part in wanted.items():
        assert torch.equal(found[name].lora_A, part.lora_A)
        assert torch.equal(found[name].lora_B, part.lora_B)
    before = (out / "adapter_model.safetensors").read_bytes()
    assert main([*arguments, "--method", "direct"]) == 1
    assert "--force" in capsys.readouterr().err
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert main([*arguments, "--force", "--rank", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["ranks"].values()) == {3}
    assert all(0 < error < 1 for error in result["errors"].values())


@pytest.mark.parametrize("method", ["orthogonal", "dropout", "ties"])
def test_export_refuses_what_is_no_weight(
    method: str, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    arguments = ["merge", str(workplace / "merge.toml"), "--export", str(out), "--quiet"]
    assert main([*arguments, "--method", method]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "ortho_rows" in line
    assert "direct" in line
    assert not out.exists()
