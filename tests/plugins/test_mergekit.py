"""Adapters merged inside mergekit: its program, its refusals, its tensors one by one."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from plugin_models import (
    EXAMPLES,
    SQUARES,
    TRANSPOSED,
    assert_weights,
    expected,
    gpt2,
    gpt2_adapter,
    needs,
    run_program,
    save_examples,
)
from tiny_models import language_model, save_adapter

pytestmark = needs("mergekit", "mergekit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_examples(tmp_path_factory.mktemp("plugins"))


def merge_by_command(folder: Path) -> subprocess.CompletedProcess[str]:
    """The direct merge of folder/one and folder/base, in a process without mergekit's caches."""
    (folder / "merge.toml").write_text('[[loras]]\nfile_path = "one"\n')
    text = (EXAMPLES / "mergekit.yml").read_text().replace("ortho_rows ", "direct ")
    (folder / "direct.yml").write_text(text)
    return run_program("lora_ortho.plugins.mergekit", "direct.yml", "merged", cwd=folder)


@pytest.mark.parametrize("targets", SQUARES)
def test_mergekit_and_weights_that_lie_transposed(targets: list[str], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    wanted = gpt2_adapter(tmp_path / "one", targets)
    gpt2().save_pretrained(tmp_path / "base")
    done = merge_by_command(tmp_path)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "merged" / "model.safetensors")
    torch.testing.assert_close(found[TRANSPOSED], wanted[TRANSPOSED])
    torch.testing.assert_close(found["lm_head.weight"], wanted["lm_head.weight"])


@pytest.mark.parametrize("kind", ["class", "scale", "codes"])
def test_mergekit_and_weights_that_cannot_be_told(kind: str, tmp_path: Path) -> None:
    """A class that nobody knows; a scale beside the weight; a weight of codes."""
    from safetensors.torch import load_file, save_file

    gpt2_adapter(tmp_path / "one", SQUARES[0])
    gpt2().save_pretrained(tmp_path / "base")
    file, weights = tmp_path / "base" / "config.json", tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    if kind == "class":
        file.write_text(file.read_text().replace("GPT2LMHeadModel", "GPT2OfSomebody"))
    elif kind == "scale":
        tensors[TRANSPOSED.replace("weight", "weight_scale")] = torch.ones(())
    else:
        tensors[TRANSPOSED] = tensors[TRANSPOSED].to(torch.float8_e4m3fn)
    save_file(tensors, weights, {"format": "pt"})
    done = merge_by_command(tmp_path)
    messages = {
        "class": "whether this square weight lies transposed cannot be told",
        "scale": "has weight_scale besides its weight, which may scale it",
        "codes": "its weight is torch.float8_e4m3fn: codes",
    }
    assert done.returncode != 0
    assert messages[kind] in done.stderr, done.stderr
    assert TRANSPOSED.removesuffix(".weight") in done.stderr


def test_mergekit_example_as_it_is(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    done = run_program("lora_ortho.plugins.mergekit", "mergekit.yml", str(out), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert_weights(out, expected(folder, "ortho_rows"))


def merge_by_mergekit(out: Path, **parameters: Any) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    import lora_ortho.plugins.mergekit  # noqa: F401

    base = {"model": "./base"}
    config = MergeConfiguration.model_validate(
        {
            "merge_method": "lora_ortho",
            "base_model": base,
            "models": [{"model": base}],
            "parameters": {"loras": "merge.toml", **parameters},
        }
    )
    run_merge(config, str(out), MergeOptions(write_model_card=False, quiet=True))


@pytest.mark.parametrize("method", ["direct", "element_disjoint"])
def test_mergekit_other_methods(
    method: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    place: Any = {"seed": 4, "sample": 3, "strata": 2}
    merge_by_mergekit(tmp_path / "merged", method=method, **place)
    assert_weights(tmp_path / "merged", expected(folder, method, **place))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "orthogonal"}, "method must be one of direct, element_disjoint, ortho_rows"),
        ({"loras": "none.toml"}, "No such file"),
        ({"loras": "over.toml"}, "the orthogonal method needs keep probabilities"),
        ({"loras": "other.toml"}, "adapter 'other' adapts model.layers.2.mlp.down_proj, which"),
        ({"loras": "biased.toml"}, r"adapter 'biased' has a bias \(lora_bias\)"),
    ],
)
def test_mergekit_refusals(
    change: dict[str, str], message: str, folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name in ("one", "other", "biased"):
        shutil.copytree(folder / "one", tmp_path / name)
        (tmp_path / f"{name}.toml").write_text(f'[[loras]]\nfile_path = "{name}"\n')
    (tmp_path / "base").symlink_to(folder / "base")
    text = (EXAMPLES / "merge.toml").read_text().replace("0.5", "0.25").replace('"two"', '"other"')
    (tmp_path / "over.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    name = change.get("loras", "").removesuffix(".toml")
    if name == "other":
        deeper = language_model()
        deeper.model.layers.append(copy.deepcopy(deeper.model.layers[0]))
        save_adapter(tmp_path / "other", deeper, 1)
    if name == "biased":
        save_adapter(tmp_path / "biased", language_model(), 1, lora_bias=True)
    with pytest.raises((ValueError, OSError), match=message):
        merge_by_mergekit(tmp_path / "merged", **change)
    assert not list((tmp_path / "merged").glob("*.safetensors"))


def test_mergekit_errors_are_one_line(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from lora_ortho.plugins.mergekit import main

    text = (folder / "mergekit.yml").read_text().replace("ortho_rows ", "orthogonal ")
    (tmp_path / "wrong.yml").write_text(text)
    monkeypatch.chdir(folder)
    arguments = ["mergekit", str(tmp_path / "wrong.yml"), str(tmp_path / "out"), "--quiet"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert main() == 1
    assert "error: method must be one of" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("mergekit.yml", "  seed: 0", "  sed: 3", "unknown parameter 'sed'; known are loras, "),
        (
            "mergekit.yml", "  - model: ./base", "  - model: ./base\n    parameters: {weight: 1}",
            "unknown parameter 'weight'; known are loras, method, seed, sample, strata",
        ),
        ("merge.toml", "\n[[loras]]", "\nsed = 3\n[[loras]]", "unknown key 'sed'; known are p"),
        ("merge.toml", "dropout_rate", "rate", "unknown key 'rate'; known are file_path"),
        ("merge.toml", "\n[[loras]]", "\nseed = 3\n[[loras]]", "seed = 3, the parameters have 0"),
        ("merge.toml", "\n[[loras]]", "\nstrata = 4\n[[loras]]", "strata = 4, the parameters"),
        ("mergekit.yml", "parameters:", "parameters: [", "while parsing a flow"),
    ],
)  # fmt: skip
def test_mergekit_ignores_no_key(
    file: str, old: str, new: str, message: str, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "work")
    text = (tmp_path / "work" / file).read_text()
    assert old in text
    (tmp_path / "work" / file).write_text(text.replace(old, new, 1))
    words = ("mergekit.yml", "merged", "--quiet")
    done = run_program("lora_ortho.plugins.mergekit", *words, cwd=tmp_path / "work")
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "work" / "merged").glob("*.safetensors"))
