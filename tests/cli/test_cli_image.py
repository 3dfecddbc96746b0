"""`lora-ortho merge` on a diffusers pipeline with random weights, in the paper's TOML format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fails, interrupted
from tiny_models import save_image_adapter, save_image_pipeline

from lora_ortho.cli import main

pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

CONFIG = """
save_folder_name = "one_two"
pipe_id = "base"
prompt = "a cat"
neg_prompt = "a dog"
batch_size = 2
num_batches = 1
steps = 2
device = "cpu"

[[loras]]
file_path = "."
file_name = "one.safetensors"
adapter_name = "one.v1"
dropout_rate = 0.5
adapter_weight = 1.0

[[loras]]
file_path = "."
file_name = "two.safetensors"
adapter_name = "two"
dropout_rate = 0.5
adapter_weight = 0.75
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline, an adapter in diffusers' format and one in kohya's."""
    folder = tmp_path_factory.mktemp("image")
    save_image_pipeline(folder / "base")
    save_image_adapter(folder / "one.safetensors", folder / "base", 1)
    save_image_adapter(folder / "two.safetensors", folder / "base", 2, kohya=True)
    (folder / "merge.toml").write_text(CONFIG, encoding="utf-8")
    return folder


def pictures(folder: Path) -> torch.Tensor:
    """(pictures, bytes) of a folder, as integers."""
    from PIL import Image

    files = sorted(folder.glob("*.png"))
    return torch.stack(
        [
            torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8).int()
            for file in files
        ]
    )


def test_every_method_in_one_grid(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["merge", str(workplace / "merge.toml"), "--json", "--quiet"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert captured.err == ""
    out = tmp_path / "one_two"
    rows = ["bare model", "one.v1 alone", "two alone", "direct", "dropout", "orthogonal"]
    assert list(result["difference"]) == rows
    names = {*rows, "grid.png", "comparison.json", "comparison.txt"}
    assert {path.name for path in out.iterdir()} == names
    made = {row: pictures(out / row) for row in rows}
    assert all(len(images) == 2 for images in made.values())

    wanted = by_diffusers(workplace)
    for row, images in wanted.items():  # a level of rounding apart
        assert int((made[row] - images).abs().max()) <= 1, row
    for one in rows:
        for two in rows:
            if one != two:
                assert not torch.equal(made[one], made[two]), (one, two)
    difference = (made["dropout"] - made["direct"]).abs().float().mean()
    assert result["difference"]["dropout"]["direct"] == pytest.approx(float(difference), rel=1e-6)
    # The masks are drawn from the configuration's seed, whatever the generator was before.
    torch.manual_seed(99)
    assert main(["merge", str(workplace / "merge.toml"), "--force", "--quiet"]) == 0
    assert torch.equal(pictures(out / "orthogonal"), made["orthogonal"])


def by_diffusers(workplace: Path) -> dict[str, torch.Tensor]:
    """What diffusers and PEFT paint by themselves where there are no masks."""
    diffusers: Any = pytest.importorskip("diffusers", reason="diffusers is not installed")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(workplace / "base")
    pipe.set_progress_bar_config(disable=True)

    def paint() -> torch.Tensor:
        images = pipe(
            prompt="a cat", negative_prompt="a dog", num_images_per_prompt=2, guidance_scale=7.0,
            num_inference_steps=2, generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
        return torch.stack(
            [torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).int() for i in images]
        )

    made = {"bare model": paint()}
    for name in ("one", "two"):
        pipe.load_lora_weights(str(workplace), weight_name=f"{name}.safetensors", adapter_name=name)
    pipe.set_adapters(["one"], [1.0])
    made["one.v1 alone"] = paint()
    pipe.set_adapters(["two"], [0.75])
    made["two alone"] = paint()
    pipe.set_adapters(["one", "two"], [1.0, 0.75])
    made["direct"] = paint()
    return made


def test_inspect_finds_kohyas_names_in_the_pipeline(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(workplace / f"{name}.safetensors") for name in ("one", "two")]
    assert main(["inspect", *paths, "--quiet"]) == 1
    assert "give it as --model" in capsys.readouterr().err
    unet = ["--model", str(workplace / "base" / "unet")]
    assert main(["inspect", *paths, *unet, "--quiet"]) == 1
    assert "as model" not in capsys.readouterr().err
    assert main(["inspect", *paths, "--model", str(workplace / "base"), "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [adapter["layers"] for adapter in found["adapters"]] == [16, 16]
    assert len(found["pairs"]) == 16
    assert {layer["name"].partition(".")[0] for layer in found["layers"]} == {"unet"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps", 'texts = ["a.txt"]', "texts are for language models"),
        ("steps", "strata = 2", "strata are for the samples of language models"),
        ("pipe_id", 'pipe_id = "bsae"\ntexts = ["a.txt"]', "pipe_id bsae is no folder here"),
        ("steps", 'scheduler = "UNet2DConditionModel"', "no scheduler 'UNet2DConditionModel'"),
        ("prompt", "", "give a prompt"),
        ('file_name = "one', 'file_name = "base"', "is a .safetensors file"),
        ('file_name = "one', 'file_name = "broken.safetensors"', "truncated"),
        ('file_name = "one', 'file_name = "foreign.safetensors"', "foreign.safetensors"),
    ],
)
def test_refused_runs(
    old: str, new: str, message: str, workplace: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from safetensors.torch import save_file

    whole = (workplace / "one.safetensors").read_bytes()
    (workplace / "broken.safetensors").write_bytes(whole[:-100])
    save_file({"unet.nothing.lora_A.weight": torch.ones(1, 2)}, workplace / "foreign.safetensors")
    text = (workplace / "merge.toml").read_text(encoding="utf-8")
    lines = [new if line.startswith(old) else line for line in text.splitlines()]
    file = workplace / "wrong.toml"
    file.write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "results"
    assert main(["merge", str(file), "--out", str(out), "--quiet"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err.splitlines()[-1]
    assert captured.err.splitlines()[-1].startswith("lora-ortho: error: ")
    assert not out.exists()


def test_rates_are_refused_before_the_pipeline_is_loaded(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two files in one layout, whatever the layout; the pipeline's folder holds nothing."""
    (workplace / "hollow").mkdir()
    (workplace / "hollow" / "model_index.json").write_text("{}")
    save_image_adapter(workplace / "three.safetensors", workplace / "base", 3, kohya=True)
    save_image_adapter(workplace / "four.safetensors", workplace / "base", 4)
    text = CONFIG.replace('"base"', '"hollow"').replace("dropout_rate = 0.5", "dropout_rate = 0.25")
    out = tmp_path / "results"
    for old, new, message in (
        ('"one.safe', '"three.safe', "layer lora_unet_down_blocks_1_attentions_0_transformer_"),
        ('"two.safe', '"four.safe', "layer unet.down_blocks.1.attentions.0.transformer_blocks.0."),
        ("steps", "device = 'abacus' #", "torch cannot use 'abacus' here"),
        ("steps", "scheduler = 'Nothing' #", "no scheduler 'Nothing'"),
    ):
        file = workplace / "early.toml"
        file.write_text(text.replace(old, new).replace('device = "cpu"', ""), encoding="utf-8")
        assert message in fails(capsys, "merge", file, "--out", out, "--quiet")
        assert not out.exists()
    export = ["merge", str(file), "--export", str(out), "--quiet", "--method"]
    file.write_text(text.replace('"two.safe', '"four.safe'), encoding="utf-8")
    for method, message in (("ortho_rows", "layer unet.down_blocks.1"), ("ties", "one of direct")):
        assert message in fails(capsys, *export, method)
        assert not out.exists()


def test_weight_0_leaves_an_adapter_out(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = CONFIG.replace("adapter_weight = 0.75", "adapter_weight = 0")
    (workplace / "off.toml").write_text(text.replace("dropout_rate = 0.5\n", ""), encoding="utf-8")
    out = tmp_path / "results"
    assert main(["merge", str(workplace / "off.toml"), "--out", str(out), "--quiet"]) == 0
    assert "one.v1 1, two off; seed 0" in capsys.readouterr().out
    alone = by_diffusers(workplace)["one.v1 alone"]
    assert not (out / "two alone").exists()
    for row in ("one.v1 alone", "direct", "dropout", "orthogonal"):
        assert int((pictures(out / row) - alone).abs().max()) <= 1, row


def test_finished_pictures_are_kept(workplace: Path, tmp_path: Path) -> None:
    """A run that is interrupted while it paints, as a process."""
    text = CONFIG.replace("num_batches = 1", "num_batches = 20")
    (workplace / "slow.toml").write_text(text, encoding="utf-8")
    words = ["merge", workplace / "slow.toml", "--out", tmp_path / "results"]
    done = interrupted(words, at="] direct, batch")
    assert (done.status, done.out) == (1, "")
    assert "interrupted; the rows that were finished are in" in done.err.splitlines()[-1]
    kept = tmp_path / "results.unfinished"
    result = json.loads((kept / "comparison.json").read_text())
    assert result["unfinished"]["error"] == "interrupted"
    assert result["unfinished"]["row"] not in result["difference"]
    for row in ("bare model", "one.v1 alone", "two alone"):
        assert len(list((kept / row).glob("*.png"))) == 40
    assert (kept / "grid.png").is_file()
    assert not (tmp_path / "results").exists()
