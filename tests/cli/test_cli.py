"""The command line: rules that hold for every command, `inspect`, `doctor` and `bench`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import PREFIX, config, tensors, write
from commands import fails, interrupted
from safetensors.torch import save_file

import lora_ortho
from lora_ortho import backends, diagnostics, doctor
from lora_ortho.backends import cpu
from lora_ortho.cli import console, main
from lora_ortho.cli.overlap import _short, place

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Two adapters of the small model with different factors."""
    other = {key: value.flip(0) + 0.5 for key, value in tensors().items()}
    return [str(write(tmp_path / "one")), str(write(tmp_path / "two", factors=other))]


def test_inspect_table(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *folders]) == 0
    out = capsys.readouterr().out
    assert "one & two" in out
    assert "0.5 each or more" in out


def test_inspect_json_is_the_report(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *folders, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    report = diagnostics.inspect([lora_ortho.load_adapter(folder) for folder in folders])
    assert found == json.loads(console.to_json(report))
    assert [pair["layer"] for pair in found["pairs"]] == ["a", "b.c"]
    assert found["pairs"][0]["alignment"] == report.pairs[0].alignment


def test_inspect_every_layer_and_interference(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"a": torch.ones(2, 3)}, tmp_path / "x.safetensors")
    arguments = ["--layers", "--inputs", f"one={tmp_path / 'x.safetensors'}"]
    assert main(["inspect", *folders, *arguments]) == 0
    out = capsys.readouterr().out
    assert "every layer" in out
    assert "two on one" in out


def test_inspect_says_which_dominates(
    tmp_path: Path, folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    large = {key: 100 * value for key, value in tensors().items()}
    third = str(write(tmp_path / "three", factors=large))
    assert main(["inspect", folders[0], third]) == 0
    words = "three dominates: over layers that adapters share, the updates of three are 1e+04 times"
    assert words in capsys.readouterr().out
    assert main(["inspect", folders[0], third, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dominant"] == "three"
    zero = str(write(tmp_path / "zero", factors={k: 0 * v for k, v in tensors().items()}))
    assert main(["inspect", folders[0], zero]) == 0
    words = "dominates: over layers that adapters share, the updates of zero are 0"
    assert words in capsys.readouterr().out


def test_inspect_says_what_does_not_fit(
    folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *folders, "--p", "0.25", "0.5"]) == 1
    assert "problem: p: 1 - p sums to 1.25 in a" in capsys.readouterr().out


def test_inspect_names_by_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for parent in ("x", "y"):
        (tmp_path / parent).mkdir()
        write(tmp_path / parent / "same")
    paths = [str(tmp_path / parent / "same") for parent in ("x", "y")]
    assert main(["inspect", *paths]) == 0
    assert "x/same & y/same" in capsys.readouterr().out
    assert "given twice" in fails(capsys, "inspect", paths[0], paths[0])


def test_inspect_names_of_files(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factors = {f"unet.a.lora_{f}.weight": torch.ones(2, 2) for f in "AB"}
    for name in ("one", "three"):
        save_file(factors, tmp_path / f"{name}.safetensors")
    files = [str(tmp_path / f"{name}.safetensors") for name in ("one", "three")]
    assert main(["inspect", *files]) == 0
    assert "one & three" in capsys.readouterr().out
    assert main(["inspect", folders[0], *files]) == 0
    assert "one.safetensors & three.safetensors" in capsys.readouterr().out


def test_inspect_one_adapter(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", folders[0]]) == 0
    assert "one adapter: any dropout rate" in capsys.readouterr().out


def test_inspect_plot(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "new" / "map.png"
    assert main(["inspect", *folders, "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(PNG)
    capsys.readouterr()
    picture.write_bytes(b"mine")
    assert "--force" in fails(capsys, "inspect", *folders, "--plot", str(picture))
    assert picture.read_bytes() == b"mine"
    assert main(["inspect", *folders, "--plot", str(picture), "--force"]) == 0
    assert picture.read_bytes().startswith(PNG)
    assert [path.name for path in picture.parent.iterdir()] == ["map.png"]
    odd = folders[0].replace("one", "$\\frac{一}$")
    Path(folders[0]).rename(odd)
    assert main(["inspect", odd, folders[1], "--plot", str(picture), "--force"]) == 0


def test_a_plot_that_fails_leaves_no_file(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nothing to draw" in fails(
        capsys, "inspect", folders[0], "--plot", str(tmp_path / "map.png")
    )
    assert "not supported" in fails(
        capsys, "inspect", *folders, "--plot", str(tmp_path / "map.xyz")
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize(
    ("layer", "wanted"),
    [
        ("model.layers.12.mlp.up_proj", ("model.layers.12", "mlp.up_proj")),
        ("down_blocks.1.attentions.0.to_out.0", ("down_blocks.1.attentions.0.to_out", "0")),
        ("lm_head", ("", "lm_head")),
        ("3.fc1", ("3", "fc1")),
    ],
)
def test_place_of_a_layer(layer: str, wanted: tuple[str, str]) -> None:
    block, part = place(layer)
    if layer.endswith(".0"):  # a number at the end is a part's name
        assert (block, part) == ("down_blocks.1.attentions.0", "to_out.0")
    else:
        assert (block, part) == wanted


def test_blocks_are_labelled_shortly() -> None:
    assert _short(["model.layers.0", "model.layers.12"]) == ["0", "12"]
    blocks = ["unet.mid_block.attentions.0", "unet.up_blocks.1.attentions.2.transformer_blocks.0"]
    assert _short(blocks) == ["mid_block.0", "up_blocks.1.2.0"]


def test_refused_files_are_one_line(
    tmp_path: Path, folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "does not exist" in fails(capsys, "inspect", str(tmp_path / "none"))
    dora = write(tmp_path / "dora", config(use_dora=True))
    assert "use_dora" in fails(capsys, "inspect", str(dora))
    nan = tensors()
    nan[f"{PREFIX}a.lora_A.weight"][0, 0] = torch.nan
    assert "NaN" in fails(capsys, "inspect", str(write(tmp_path / "nan", factors=nan)))
    assert "NAME=FILE" in fails(capsys, "inspect", *folders, "--inputs", "one")
    missing = f"one={tmp_path / 'none'}"
    assert "No such file" in fails(capsys, "inspect", *folders, "--inputs", missing)


@pytest.mark.parametrize("arguments", [[], ["paint"], ["inspect"], ["doctor", "--loud"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().out == ""


def test_progress_waits_a_second_and_can_be_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    """What lasts is said, though nothing follows it; what is over by then is not."""
    for quiet in (False, True):
        with console.Progress(quiet) as progress:
            progress("early")
            progress("late")
            time.sleep(1.3)
            progress("last")  # and at the end of the block it is over
    with console.Progress(False) as progress:
        progress("short")
    time.sleep(1.2)
    captured = capsys.readouterr()
    assert captured.err == "[1 s] late\n[1 s] last\n"
    assert captured.out == ""


def test_interrupt_leaves_no_traceback(tmp_path: Path) -> None:
    """A process that looks at thousands of layers, and says so after a second."""
    factors = {}
    for layer in range(4000):
        for side in "AB":
            shape = (4, 64) if side == "A" else (64, 4)
            factors[f"unet.layer{layer}.lora_{side}.weight"] = torch.randn(shape)
    for name in ("one", "two"):
        save_file(factors, tmp_path / f"{name}.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in ("one", "two")]
    done = interrupted(["inspect", *files], at="[")
    assert (done.status, done.out) == (1, "")
    assert done.err.splitlines()[-1] == "lora-ortho: interrupted; nothing half-written was left"
    assert "Traceback" not in done.err


def test_a_closed_pipe_is_no_traceback(folders: list[str]) -> None:
    command = f"{sys.executable} -m lora_ortho inspect --layers {' '.join(folders * 1)} --json"
    shell = subprocess.run(
        ["bash", "-c", f"({command}; echo status $? >&2) | true"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "Traceback" not in shell.stderr
    assert shell.stderr.splitlines()[-1] in ("status 0", "status 1")


def test_module_and_script_are_the_same_program() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "lora_ortho", "--help"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert shown.stdout.startswith("usage: lora-ortho ")
    root = Path(__file__).resolve().parents[2]
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.scripts]\nlora-ortho = "lora_ortho.cli:main"\n' in project


def test_imports_stay_light() -> None:
    code = (
        "import sys, lora_ortho, lora_ortho.cli; "
        "print([m for m in ('transformers','diffusers','peft','matplotlib','mergekit') "
        "if m in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert shown.stdout == "[]\n"


def test_doctor_says_what_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] is True
    reasons = {backend["name"]: backend["reason"] for backend in found["backends"]}
    assert reasons == backends.available()
    for backend in found["backends"]:
        assert backend["check"] == ("ok" if backend["reason"] is None else None)
        assert (backend["advice"] is None) == (backend["reason"] is None)
    versions = {package["name"]: package["version"] for package in found["packages"]}
    assert versions["torch"] == torch.__version__
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("all well\n")


def test_doctor_notices_wrong_masks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_ortho.reference import masks

    def shifted(*args: Any) -> Any:
        return [mask.roll(1, dims=1) for mask in masks(*args)]

    monkeypatch.setattr("lora_ortho.backends.reference.masks", shifted)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "BROKEN: wrong output" in out
    assert "something is broken" in out


def test_doctor_survives_parts_of_different_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise AttributeError("no cuda_unavailable")

    monkeypatch.setattr(backends.get("cpu"), "unavailable", missing)
    (found,) = (b for b in doctor.diagnose().backends if b.name == "cpu")
    assert found.reason == "broken installation: AttributeError: no cuda_unavailable"
    assert found.advice is not None
    assert "install it again" in found.advice


def test_doctor_notices_wrong_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_ortho.mask_stream.ROUNDS", 6)
    assert doctor.check_draws().startswith("drew ")


def test_doctor_advice_and_openmp(tmp_path: Path) -> None:
    wanted = {  # by the reason, with a torch for GPUs and with one for CPUs
        "lora_ortho was installed without its compiled CPU kernels": ("compiler", "compiler"),
        "triton cannot be imported: No module named 'x'": ("pip install triton", "build of torch"),
        "the library was built without its CUDA kernels": ("nvcc", "build of torch"),
        "no NVIDIA GPU, or no driver for one": ("nvidia-smi", "build of torch"),
        "torch sees no NVIDIA or AMD GPU": ("an NVIDIA GPU that torch sees", "build of torch"),
        "the stars are wrong": ("see README.md", "see README.md"),
    }
    for reason, words in wanted.items():
        for for_gpus, part in zip((True, False), words, strict=True):
            found = doctor.advice(reason, for_gpus)
            assert part in found
            assert for_gpus or not any(useless in found for useless in ("pip install t", "driver"))
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00 r-xp 00 fe:00 1 /a/libgomp.so.1\n7f01 r-xp 00 fe:00 1 /a/libgomp.so.1\n"
        "7f02 r-xp 00 fe:00 1 /b/libomp-abc.so\n7f03 r-xp 00 fe:00 1 /c/libcomp.so\n"
    )
    assert doctor.loaded_openmp(maps) == ("/a/libgomp.so.1", "/b/libomp-abc.so")
    assert doctor.loaded_openmp(tmp_path / "none") == ()


def test_doctor_warns_of_a_capped_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = cpu.instruction_sets()
    if len(sets) < 2:
        pytest.skip("this processor has one instruction set only")
    monkeypatch.setenv("LORA_ORTHO_CPU_ISA", sets[0])
    found = doctor.diagnose()
    assert found.instruction_set == sets[0]
    assert any("LORA_ORTHO_CPU_ISA" in text for text in found.warnings)


def test_outputs_are_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def half(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, os.strerror(28))

    with pytest.raises(OSError, match="space"):
        console.write_whole(target, half)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
