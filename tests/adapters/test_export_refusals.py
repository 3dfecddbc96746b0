"""export: what is refused leaves no file, and what was there stays."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import refused
from peft_models import Small, make, peft

from lora_ortho import export, load_adapter
from lora_ortho.adapters import adapters_of


@pytest.mark.parametrize("method", ["orthogonal", "dropout"])
def test_stochastic_merges_are_refused(tmp_path: Path, method: str) -> None:
    refused(tmp_path, make(), ValueError, method, "new masks for every token", '"ortho_rows"',
            '"direct"', "attach or inject", method=method)  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "error", "part"),
    [
        ({"method": "ties"}, ValueError, "method must be"),
        ({"rank": 0}, ValueError, "rank must be at least 1"),
        ({"rank": 2.0}, TypeError, "rank must be an int"),
        ({"p": [0.5]}, ValueError, "p must hold 2 values"),
        ({"p": [0.1, 0.1], "method": "ortho_rows"}, ValueError, "smallest admissible rate"),
        ({"weights": [1.0]}, ValueError, "weights must hold 2 values"),
        ({"adapters": ["three"]}, ValueError, "model has no 'three'"),
        ({"seed": "x", "method": "ortho_rows"}, TypeError, "seed must be"),
        ({"dtype": torch.int8}, TypeError, "dtype must be"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, arguments: dict[str, Any], error: type[Exception], part: str
) -> None:
    refused(tmp_path, make(), error, part, **arguments)


def test_wrong_sources(tmp_path: Path) -> None:
    refused(tmp_path, [], ValueError, "at least one adapter")
    refused(tmp_path, [3], TypeError, "source[0] must come from load_adapter")
    refused(tmp_path, 3, TypeError, "source must be a list of what load_adapter returns, got int")
    refused(tmp_path, Small(), ValueError, "holds no PEFT layers")
    loaded = adapters_of(make())
    refused(tmp_path, loaded, ValueError, "of a module only", adapters=["one"])
    with pytest.raises(TypeError, match="path must be a path"):
        export(loaded, 3)  # type: ignore[arg-type]
    del (other := Small()).up
    refused(tmp_path, loaded, ValueError, "model has no layer up", model=other)


def test_what_an_adapter_would_lose(tmp_path: Path) -> None:
    """Variants, saved modules and biases are not low-rank factors."""
    for name, fields, part in (
        ("up", {"use_dora": True}, "is a variant"),
        ("head", {"modules_to_save": ["head"]}, "saves this module, which would be lost"),
        ("the model", {"bias": "lora_only"}, "replaces biases of the model"),
    ):
        config = peft.LoraConfig(r=2, target_modules=["up"], **fields)
        model = peft.get_peft_model(Small(), config, "one")
        refused(tmp_path, model, ValueError, "cannot take adapters", name, "'one'", part)


def test_existing_folder(tmp_path: Path) -> None:
    model = make()
    export(model, tmp_path / "refused")
    before = (tmp_path / "refused" / "adapter_model.safetensors").read_bytes()
    refused(tmp_path, model, FileExistsError, "exists; force=True", weights=[2.0, 1.0])
    assert (tmp_path / "refused" / "adapter_model.safetensors").read_bytes() == before
    export(model, tmp_path / "refused", weights=[2.0, 1.0], force=True)
    assert (tmp_path / "refused" / "adapter_model.safetensors").read_bytes() != before
    assert os.listdir(tmp_path) == ["refused"]


def test_force_replaces_none_of_the_inputs(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        export(make(), folder)
    before = {path: path.read_bytes() for folder in folders for path in folder.iterdir()}
    (tmp_path / "link").symlink_to(folders[0])
    for path in (folders[0], tmp_path / "link"):
        adapters = [load_adapter(folder) for folder in folders]
        with pytest.raises(ValueError, match=r"^path must not be one of the adapters .* 'one' was"):
            export(adapters, path, force=True)
    assert {path: path.read_bytes() for folder in folders for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "strange",
    ["thesis.txt", "other.safetensors", "unet/config.json", "unet/deep/adapter_config.json", "x/"],
)
def test_force_replaces_adapters_alone(tmp_path: Path, strange: str) -> None:
    model, folder = make(), tmp_path / "refused"
    folder.mkdir()
    export(model, folder, force=True)  # an empty one
    (folder / "README.md").write_text("the card that PEFT writes", encoding="utf-8")
    for part in ("unet", "text_encoder"):
        export(model, folder / part)
    export(model, folder, force=True)
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    export(model, folder / "unet")
    (folder / strange).parent.mkdir(exist_ok=True)
    if strange.endswith("/"):
        (folder / strange).mkdir()
    else:
        (folder / strange).write_text("precious", encoding="utf-8")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    first = "/".join(strange.split("/")[:2]).rstrip("/")
    refused(tmp_path, model, FileExistsError, str(folder / first), "no part of an", force=True)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_force_replaces_no_file_and_no_readme(tmp_path: Path) -> None:
    model, path = make(), tmp_path / "refused"
    path.write_text("precious", encoding="utf-8")
    refused(tmp_path, model, FileExistsError, "refused is no part of an exported", force=True)
    assert path.read_text(encoding="utf-8") == "precious"
    path.unlink()
    path.mkdir()
    (path / "README.md").write_text("precious", encoding="utf-8")
    refused(tmp_path, model, FileExistsError, "README.md is no part of an exported", force=True)
    assert (path / "README.md").read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize("path", [".", "", "..", "/", "../here"])
@pytest.mark.parametrize("force", [False, True])
def test_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, force: bool
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="path must be a folder to be made"):
        export(make(), path, force=force)
    assert list(tmp_path.rglob("*")) == [tmp_path / "here"]


@pytest.mark.parametrize("force", [False, True])
def test_a_failure_on_the_way_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    model = make()
    if force:
        export(model, tmp_path / "refused")
        before = (tmp_path / "refused" / "adapter_model.safetensors").read_bytes()
    files: Any = sys.modules["lora_ortho.adapters.files.export_files"]
    for place, name in ((files, "save"), (os, "rename")):

        def fail(*_: Any, **__: Any) -> None:
            raise OSError("no space left")

        with monkeypatch.context() as patch:
            patch.setattr(place, name, fail)
            refused(tmp_path, model, OSError, "no space left", force=force, weights=[2.0, 1.0])
    if force:
        assert (tmp_path / "refused" / "adapter_model.safetensors").read_bytes() == before
