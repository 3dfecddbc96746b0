"""`lora-ortho merge`: what is refused, by one line, before the model is loaded where it can be."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from commands import fails
from merge_folder import CONFIG, changed, save_merge
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_merge(tmp_path_factory.mktemp("merge"))


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
    file, out = changed(workplace, (old, new)), tmp_path / "results"
    assert message in fails(capsys, "merge", file, "--out", out, "--quiet")
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
    text = CONFIG.replace('"base"', '"hollow"')
    if "every" in message:
        text = text.replace("adapter_weight = 0.5\n", "")
    file = changed(workplace, (old, new), text=text)
    line = fails(capsys, "merge", file, "--quiet")
    assert message in line
    assert ("cannot load" in line) == (message == "cannot load")
