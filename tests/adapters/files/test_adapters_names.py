"""Names of adapters: whole names of folders and files, told apart where they are alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_files import write
from safetensors.torch import save_file

from lora_ortho import load_adapter
from lora_ortho.adapters.files.names import titles
from lora_ortho.merge_config import read_config

FACTORS = {f"unet.a.lora_{x}.weight": torch.eye(4) for x in "AB"}


@pytest.mark.parametrize("name", ["Llama-3.1-8B-math", "run.1", "v1.5.safetensors", "x"])
def test_a_folder_is_called_what_it_is_called(tmp_path: Path, name: str) -> None:
    wanted = name.removesuffix(".safetensors")
    assert load_adapter(write(tmp_path / name)).name == wanted
    (tmp_path / "other" / name).mkdir(parents=True)
    save_file(FACTORS, tmp_path / "other" / name / "pytorch_lora_weights.safetensors")
    assert load_adapter(tmp_path / "other" / name).name == wanted


@pytest.mark.parametrize("name", ["foo.v2", "foo", "sd_xl_offset-lora_1.0"])
def test_a_file_loses_its_ending_alone(tmp_path: Path, name: str) -> None:
    save_file(FACTORS, tmp_path / f"{name}.safetensors")
    assert load_adapter(tmp_path / f"{name}.safetensors").name == name


def test_a_link_has_its_own_name(tmp_path: Path) -> None:
    """As in the hub's cache, where files are links to blobs called by their hash."""
    (tmp_path / "blobs").mkdir()
    save_file(FACTORS, tmp_path / "blobs" / ("ab" * 32))
    (tmp_path / "yarn.safetensors").symlink_to(tmp_path / "blobs" / ("ab" * 32))
    assert load_adapter(tmp_path / "yarn.safetensors").name == "yarn"
    (tmp_path / "link").symlink_to(write(tmp_path / "folder"))
    assert load_adapter(tmp_path / "link").name == "link"


def test_a_snapshot_is_called_like_its_repository(tmp_path: Path) -> None:
    folder = tmp_path / "models--somebody--math-lora-v1.2" / "snapshots" / ("0123456789" * 4)
    folder.mkdir(parents=True)
    assert load_adapter(write(folder)).name == "math-lora-v1.2"


def test_dots_and_slashes_that_name_no_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "here")
    (folder / "below").mkdir()
    for path in (f"{folder}/", folder / ".", folder / "below" / ".."):
        assert load_adapter(path).name == "here"


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["run1/checkpoint-500", "run2/checkpoint-500"], None),
        (["a/x", "b/y"], ["x", "y"]),
        (["a/x", "b/x", "c/y"], ["a/x", "b/x", "y"]),
        (["1/a/x", "2/a/x", "2/b/x"], ["1/a/x", "2/a/x", "b/x"]),
        (["x", "x.safetensors"], ["x", "x.safetensors"]),
        (["a/x", "a/x"], ["x", "x"]),
        (["a/adapter_model.safetensors", "b/pytorch_lora_weights.safetensors"], ["a", "b"]),
        ([], []),
    ],
)
def test_names_that_are_alike(paths: list[str], names: list[str] | None) -> None:
    assert titles(paths) == (paths if names is None else names)


def test_names_of_a_configuration(tmp_path: Path) -> None:
    """Given ones as they are; others whole, with as much of the path as tells them apart."""
    file = tmp_path / "merge.toml"

    def names(*tables: str) -> list[str]:
        file.write_text("".join(f"[[loras]]\n{table}\n" for table in tables), encoding="utf-8")
        return read_config(file).names

    assert names('file_path = "Llama-3.1-8B-math"', 'file_path = "Llama-3.1-8B-code"') == [
        "Llama-3.1-8B-math",
        "Llama-3.1-8B-code",
    ]
    assert names('file_path = "run1/ckpt"', 'file_path = "run2/ckpt"') == ["run1/ckpt", "run2/ckpt"]
    assert names(
        'file_path = "a/b"\nfile_name = "x.v1.safetensors"',
        'file_path = "a/c"\nfile_name = "pytorch_lora_weights.safetensors"',
        'file_path = "a/c"\nadapter_name = "own.name"',
    ) == ["x.v1", "c", "own.name"]


def test_the_command_shows_whole_names(tmp_path: Path) -> None:
    """inspect, in text and as JSON, and in the labels of its heat map."""
    for folder in ("run.1/ckpt-5.0", "run.2/ckpt-5.0"):
        (tmp_path / folder).parent.mkdir()
        write(tmp_path / folder)
    arguments = ["inspect", "run.1/ckpt-5.0", "run.2/ckpt-5.0", "--json", "--plot", "map.svg"]
    done = subprocess.run(
        [sys.executable, "-m", "lora_ortho", *arguments],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "MPLCONFIGDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wanted = ["run.1/ckpt-5.0", "run.2/ckpt-5.0"]
    assert [adapter["name"] for adapter in json.loads(done.stdout)["adapters"]] == wanted
    picture = (tmp_path / "map.svg").read_text(encoding="utf-8")
    assert all(name in picture for name in wanted)
