"""`lora-ortho merge --export`: the adapter that `lora_ortho.export` makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fails
from merge_folder import changed, save_merge
from safetensors import safe_open

import lora_ortho
from lora_ortho.cli import main


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_merge(tmp_path_factory.mktemp("merge"))


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


def test_the_header_names_strata(workplace: Path, tmp_path: Path) -> None:
    file = changed(workplace, ("samples", "strata = 4"))
    arguments = ["merge", str(file), "--export", str(tmp_path / "x"), "--quiet"]
    assert main([*arguments, "--method", "ortho_rows"]) == 0
    with safe_open(tmp_path / "x" / "adapter_model.safetensors", "pt") as opened:
        made = json.loads(opened.metadata()["lora_ortho"])
    assert (made["sample"], made["strata"]) == (0, 4)


@pytest.mark.parametrize("method", ["orthogonal", "dropout", "ties", "element_disjoint"])
def test_export_refuses_what_is_no_weight(
    method: str, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    arguments = ["merge", str(workplace / "merge.toml"), "--export", str(out), "--quiet"]
    line = fails(capsys, *arguments, "--method", method)
    if method == "element_disjoint":
        assert "gives a dense weight, which no adapter holds" in line
    else:
        assert "ortho_rows" in line
        assert "direct" in line
    assert not out.exists()
