"""Single files that are refused: other kinds of adapters, left-over and ambiguous keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import refused_file, write_file
from models import SUBJECTS, adapted, pipeline
from torch import Tensor, nn

from lora_ortho import inject, load_adapter


class Net(nn.Module):
    """Two layers whose flattened names are one, and two whose are not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.plain = nn.Module(), nn.Linear(3, 4)
        self.a.b_c, self.a_b = nn.Linear(3, 4), nn.Module()
        self.a_b.c, self.image = nn.Linear(3, 4), nn.Conv2d(3, 4, 3)
        self.grouped, self.words = nn.Conv2d(4, 4, 3, groups=2), nn.Embedding(3, 4)


def pair(stem: str, down: str = "lora_down", up: str = "lora_up", **shapes: Any) -> Any:
    A, B = shapes.get("A", (2, 3)), shapes.get("B", (4, 2))
    return {f"{stem}.{down}.weight": torch.ones(A), f"{stem}.{up}.weight": torch.ones(B)}


GOOD = {**pair("lora_unet_plain"), "lora_unet_plain.alpha": torch.tensor(1.0)}
CONV = pair("lora_unet_image", A=(2, 3, 3, 3), B=(4, 2, 1, 1))
BROKEN: dict[str, tuple[dict[str, Tensor], str]] = {
    "loha": ({**GOOD, "lora_unet_plain.hada_w1_a": torch.ones(2)}, "LoHa is not supported"),
    "lokr": ({**GOOD, "lora_unet_plain.lokr_w1": torch.ones(2)}, "LoKr is not supported"),
    "oft": ({**GOOD, "lora_unet_plain.oft_blocks": torch.ones(2)}, "OFT is not supported"),
    "locon in three": (
        {**GOOD, "lora_unet_plain.lora_mid.weight": torch.ones(2)},
        "a convolution in three factors is not supported",
    ),
    "dora": ({**GOOD, "lora_unet_plain.dora_scale": torch.ones(4)}, "DoRA is not supported"),
    "difference": ({**GOOD, "lora_unet_plain.diff": torch.ones(4)}, "a whole difference"),
    "bias difference": ({**GOOD, "lora_unet_plain.diff_b": torch.ones(4)}, "a whole difference"),
    "left over": ({**GOOD, "something": torch.ones(4)}, "left over"),
    "left over weight": ({**GOOD, "lora_unet_plain.weight": torch.ones(4)}, "left over"),
    "alpha alone": ({**GOOD, "lora_unet_image.alpha": torch.ones(())}, "down factor of 'image'"),
    "no up": ({"lora_unet_plain.lora_down.weight": torch.ones(2, 3)}, "up factor of 'plain'"),
    "alphas": ({**GOOD, "lora_unet_plain.alpha": torch.ones(2)}, "expected one number"),
    "NaN alpha": ({**GOOD, "lora_unet_plain.alpha": torch.tensor(torch.nan)}, "holds NaN"),
    "NaN": ({**GOOD, "lora_unet_plain.lora_up.weight": torch.full((4, 2), torch.nan)}, "NaN"),
    "integers": ({"lora_unet_plain.lora_down.weight": torch.ones(2, 3).int()}, "'I32' is not one"),
    "two matches": (pair("lora_unet_a_b_c"), "could be a.b_c or a_b.c of the model"),
    "no match": (pair("lora_unet_plane"), "the model has no layer for 'plane'"),
    "empty name": (pair("lora_unet_"), "names no layer"),
    "long name": (pair("lora_unet_" + "x" * 600), "names no layer of 1 to 512 characters"),
    "ranks": (pair("lora_unet_plain", B=(4, 3)), "rank 3, but lora_A has 2"),
    "sizes": (pair("lora_unet_plain", A=(2, 5)), "takes 5 features to 4, the model's layer"),
    "kernel": (pair("lora_unet_image", A=(2, 3, 5, 5), B=(4, 2, 1, 1)), "with a kernel of 5x5"),
    "linear for a convolution": (pair("lora_unet_image"), "with a kernel of 3x3"),
    "convolution for a linear": (
        pair("lora_unet_plain", A=(2, 3, 3, 3), B=(4, 2, 1, 1)), "with a kernel of 3x3"
    ),
    "up kernel": (pair("lora_unet_image", A=(2, 3, 3, 3), B=(4, 2, 3, 3)), "does not fit lora_A's"),
    "groups": (pair("unet.grouped", A=(2, 4, 3, 3), B=(4, 2, 1, 1)), "not a linear layer or conv"),
    "embedding": (pair("unet.words", "lora_A", "lora_B"), "(Embedding) is not a linear layer"),
    "no layer": (pair("unet.plane", "lora_A", "lora_B"), "the model has no layer 'plane'"),
    "twice": (
        {**GOOD, **pair("unet.text_model.plain", "lora_A", "lora_B")}, "adapts layer 'plain' twice"
    ),
    "same": (
        {**pair("x", "lora_A", "lora_B"), **pair("x", "lora.down", "lora.up")}, "says the same"
    ),
    "peft": (pair("base_model.model.plain", "lora_A", "lora_B"), "load the folder of both"),
    "nothing": ({}, "holds no adapter"),
    "two parts": ({**GOOD, **pair("lora_te_plain")}, "is for text_encoder, unet: give the pipe"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files(tmp_path: Path, kind: str) -> None:
    tensors, part = BROKEN[kind]
    refused_file(write_file(tmp_path / "x.safetensors", tensors), part, model=Net())


def test_good_files(tmp_path: Path) -> None:
    """What the broken ones are made from; a missing alpha is the rank; integers as alpha."""
    path = write_file(tmp_path / "x.safetensors", {**GOOD, **CONV})
    loaded = load_adapter(path, Net())
    assert {n: p.scaling for n, p in loaded.layers.items()} == {"image": 1.0, "plain": 0.5}
    assert loaded.layers["image"].lora_A.shape == (2, 27)
    assert dict(loaded.kernels) == {"image": (3, 3)}
    assert list(loaded.sha256) == ["x.safetensors"]
    write_file(path, {**GOOD, "lora_unet_plain.alpha": torch.tensor([4])})
    assert load_adapter(path, Net()).layers["plain"].scaling == 2.0
    write_file(path, pair("lora_unet_plain", A=(2, 3, 1, 1), B=(4, 2, 1, 1)))
    assert load_adapter(path, Net()).kernels == {}
    bare = write_file(path, pair("plain", "lora_A", "lora_B"))
    assert list(load_adapter(bare, Net()).layers) == ["plain"]
    both = write_file(path, {**GOOD, **pair("lora_te_plain")})
    assert list(load_adapter(both, Net(), part="unet").layers) == ["plain"]


def test_kohya_needs_the_model(tmp_path: Path) -> None:
    refused_file(write_file(tmp_path / "x.safetensors", GOOD), "through the model only")


def test_part(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x.safetensors", pair("unet.plain", "lora_A", "lora_B"))
    assert list(load_adapter(path).layers) == ["unet.plain"]
    assert list(load_adapter(path, part="unet").layers) == ["plain"]
    refused_file(path, "has no part 'transformer', but unet", part="transformer")
    with pytest.raises(ValueError, match="part must be None or one of unet, transformer"):
        load_adapter(path, part="vae")


def test_pipelines_without_the_part(tmp_path: Path) -> None:
    pipe = pipeline()
    path = write_file(tmp_path / "x.safetensors", pair("transformer.x", "lora_A", "lora_B"))
    refused_file(path, "names no part of the pipeline, which has text_encoder,", model=pipe)
    with pytest.raises(ValueError, match="part must be None or one of unet, text_encoder"):
        load_adapter(path, pipe, part="transformer")


def test_a_peft_folder_for_a_part(tmp_path: Path) -> None:
    subject = SUBJECTS["unet"]
    adapted(subject, "plain").save_pretrained(tmp_path)
    pipe = pipeline()
    loaded = load_adapter(tmp_path / "plain", pipe, part="unet")
    assert all(name.startswith("unet.") for name in loaded.layers)
    with inject(pipe, [loaded], method="direct"):
        ours = subject.run(pipe.unet)
    torch.testing.assert_close(ours, subject.run(adapted(subject, "plain")), rtol=1e-9, atol=1e-9)
