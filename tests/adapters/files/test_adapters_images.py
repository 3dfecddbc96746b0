"""Adapters of image models in single files: diffusers' names, kohya's names, renumbered blocks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import refused_file, write_file
from image_tensors import diffused, factors, kohya
from models import SUBJECTS, Subject, adapted, layers_of, library, pipeline
from torch import Tensor, nn

import lora_ortho
from lora_ortho import inject, load_adapter

IMAGES = ["unet", "flux"]


@pytest.fixture(params=IMAGES)
def subject(request: pytest.FixtureRequest) -> Subject:
    return SUBJECTS[request.param]


@torch.no_grad()
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_two_files_are_what_peft_makes_of_them(
    tmp_path: Path, subject: Subject, layout: str
) -> None:
    model = adapted(subject, "plain", "patterns")
    expected = subject.run(model)
    paths = []
    for name in ("plain", "patterns"):
        tensors = kohya(model, name) if layout == "kohya" else diffused(model, name, subject.part)
        paths.append(write_file(tmp_path / f"{name}.safetensors", tensors))
    bare = subject.make()
    before = subject.run(bare)
    loaded = [load_adapter(path, bare) for path in paths]
    assert [adapter.name for adapter in loaded] == ["plain", "patterns"]
    assert set(loaded[0].layers) == set(layers_of(model))
    with inject(bare, loaded, method="direct"):
        ours = subject.run(bare)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(subject.run(bare), before)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["unet", "flux", "gpt2"])
def test_inject_and_attach_draw_the_same_masks(tmp_path: Path, kind: str) -> None:
    """Linear layers, Conv1D and convolutions; with and without PEFT; bits in all but rounding."""
    subject = SUBJECTS[kind]
    model = adapted(subject, "plain", "offset")
    for name in ("plain", "offset"):  # PEFT 0.17 writes all biases into every folder
        adapted(subject, name).save_pretrained(tmp_path)
    bare = subject.make()
    loaded = [load_adapter(tmp_path / name, bare) for name in ("plain", "offset")]
    with lora_ortho.attach(model, seed=5) as attached, inject(bare, loaded, seed=5) as injected:
        torch.testing.assert_close(subject.run(bare), subject.run(model), rtol=1e-9, atol=1e-9)
        for a, b in zip(attached.report, injected.report, strict=True):
            assert (a.name, a.stream, a.ranks, a.p, a.how) == (
                b.name,
                b.stream,
                b.ranks,
                b.p,
                b.how,
            )


def save_pipeline(pipe: Any, folder: Path, **metadata: Any) -> Path:
    """Adapters on the UNet and both text encoders, saved by diffusers."""
    peft = library("peft")
    text = ["q_proj", "out_proj"]
    targets = {"unet": ["to_q", "conv1"], "text_encoder": text, "text_encoder_2": text}
    layers = {}
    for part, modules in targets.items():
        model = peft.get_peft_model(
            getattr(pipe, part), peft.LoraConfig(r=2, lora_alpha=2, target_modules=modules), "x"
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        state = peft.get_peft_model_state_dict(model, adapter_name="x")
        layers[f"{part}_lora_layers"] = {
            key.removeprefix("base_model.model."): value for key, value in state.items()
        }
        model.unload()
    type(pipe).save_lora_weights(folder, **layers, **metadata)
    return folder


@torch.no_grad()
def test_what_a_pipeline_saved(tmp_path: Path) -> None:
    """All parts of a Stable Diffusion XL pipeline; against diffusers' own loader."""
    pipe, subject = pipeline(), SUBJECTS["unet"]
    folder = save_pipeline(pipe, tmp_path / "saved")
    whole = load_adapter(folder, pipe)
    assert {name.split(".")[0] for name in whole.layers} == {
        "unet", "text_encoder", "text_encoder_2"
    }  # fmt: skip
    nameless = load_adapter(folder)
    assert len(nameless.layers) == len(whole.layers)
    tokens = torch.arange(10).view(2, 5)
    with inject(pipe, [whole], method="direct") as handle:
        ours = subject.run(pipe.unet), pipe.text_encoder(tokens)[0]
        assert len(handle.layers) == len(whole.layers)
    alone = load_adapter(folder, pipe.unet, part="unet")
    with inject(pipe.unet, [alone], method="direct"):
        assert torch.equal(subject.run(pipe.unet), ours[0])
    pipe.load_lora_weights(folder)
    theirs = subject.run(pipe.unet), pipe.text_encoder(tokens)[0]
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_configuration_in_the_header(tmp_path: Path) -> None:
    """diffusers keeps PEFT's configuration there; then its alpha counts."""
    subject = SUBJECTS["flux"]
    model = adapted(subject, "rslora")
    bare, expected = subject.make(), subject.run(model)
    parts = factors(model, "rslora").items()
    tensors = {f"transformer.{n}.lora_A.weight": A for n, (A, _, _) in parts}
    tensors |= {f"transformer.{n}.lora_B.weight": B for n, (_, B, _) in parts}
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 3, "use_rslora": True}
    text = json.dumps({f"transformer.{name}": value for name, value in fields.items()})
    path = write_file(tmp_path / "a.safetensors", tensors, lora_adapter_metadata=text)
    with inject(bare, [load_adapter(path, bare)], method="direct"):
        torch.testing.assert_close(subject.run(bare), expected, rtol=1e-9, atol=1e-9)
    for change, part in (
        ({"transformer.use_dora": True}, "DoRA"),
        ({"transformer.r": 3}, "rank 4, but the configuration says 3"),
        ({"transformer.lora_bias": True}, "lora_bias and the keys do not agree"),
        ({"transformer.peft_type": "LOHA"}, "only 'LORA'"),
    ):
        changed = json.dumps({**json.loads(text), **change})
        path = write_file(tmp_path / "b.safetensors", tensors, lora_adapter_metadata=changed)
        refused_file(path, part, model=bare)
    key = "transformer.proj_out.alpha"
    tensors[key] = torch.tensor(1.0)
    write_file(path, tensors, lora_adapter_metadata=text)
    refused_file(path, "an alpha besides", model=bare, key=key)
    refused_file(write_file(path, tensors, lora_adapter_metadata="{"), "not valid JSON", model=bare)


def renumbered(stem: str) -> str:
    """A name of the UNet's blocks as the sgm code, and so kohya's scripts for SDXL, has it."""
    parts = stem.split(".")
    kind = {"resnets": 0, "attentions": 1}.get(parts[1] if parts[0] == "mid_block" else parts[2])
    if parts[0] == "mid_block":
        number = 1 if kind == 1 else 2 * int(parts[2])
        start, rest = f"middle_block_{number}", parts[3:]
    else:
        block, layer = int(parts[1]), int(parts[3])
        number = 3 * block + layer + (1 if parts[0] == "down_blocks" else 0)
        side = "input_blocks" if parts[0] == "down_blocks" else "output_blocks"
        start, rest = f"{side}_{number}_{kind}", parts[4:]
    inner = "_".join(rest)
    inner = {"conv1": "in_layers_2", "conv_shortcut": "skip_connection"}.get(inner, inner)
    return f"lora_unet_{start}_{inner}"


@torch.no_grad()
def test_sgm_blocks_of_kohya(tmp_path: Path) -> None:
    subject = SUBJECTS["unet"]
    model = adapted(subject, "patterns")
    expected, bare = subject.run(model), subject.make()
    tensors: dict[str, Tensor] = {}
    for layer, (A, B, scaling) in factors(model, "patterns").items():
        stem = renumbered(layer)
        tensors |= {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B}
        tensors[f"{stem}.alpha"] = torch.tensor(scaling * len(A), dtype=torch.float64)
    path = write_file(tmp_path / "sgm.safetensors", tensors)
    loaded = load_adapter(path, bare)
    assert set(loaded.layers) == set(layers_of(model))
    with inject(bare, [loaded], method="direct"):
        torch.testing.assert_close(subject.run(bare), expected, rtol=1e-9, atol=1e-9)
    tensors["lora_unet_input_blocks_4_7_x.lora_down.weight"] = torch.ones(2, 3)
    tensors["lora_unet_input_blocks_4_7_x.lora_up.weight"] = torch.ones(3, 2)
    refused_file(write_file(path, tensors), "diffusers cannot convert it", model=bare)


FLUX_NAMES = {
    "double_blocks_0_img_attn_proj": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks_0_img_attn_qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
    "double_blocks_0_txt_attn_qkv": [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"],
    "single_blocks_1_linear2": ["single_transformer_blocks.1.proj_out"],
    "single_blocks_1_modulation_lin": ["single_transformer_blocks.1.norm.linear"],
}


def flux_file(path: Path, bare: Any, alpha: float = 3.0) -> Path:
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for name, layers in FLUX_NAMES.items():
        d_in = bare.get_submodule(layers[0]).weight.shape[1]
        d_out = sum(bare.get_submodule(layer).weight.shape[0] for layer in layers)
        for key, shape in ((f"{name}.lora_down", (4, d_in)), (f"{name}.lora_up", (d_out, 4))):
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            tensors[f"lora_unet_{key}.weight"] = 0.2 * values
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(alpha, dtype=torch.float64)
    return write_file(path, tensors)


@torch.no_grad()
def test_flux_blocks_of_kohya(tmp_path: Path) -> None:
    """Joined projections come apart; against diffusers' own loader."""
    subject = SUBJECTS["flux"]
    bare: Any = subject.make()
    path = flux_file(tmp_path / "flux.safetensors", bare)
    loaded = load_adapter(path, bare)
    assert sorted(loaded.layers) == sorted(n for layers in FLUX_NAMES.values() for n in layers)
    with inject(bare, [loaded], method="direct"):
        ours = subject.run(bare)
    loaders: Any = library("diffusers").loaders
    from safetensors.torch import load_file

    state = loaders.FluxLoraLoaderMixin.lora_state_dict(load_file(path))
    bare.load_lora_adapter(state, prefix="transformer")
    torch.testing.assert_close(ours, subject.run(bare), rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("alpha", [-3.0, 0.0, -1e-3])
def test_alphas_that_diffusers_would_not_end_with(tmp_path: Path, alpha: float) -> None:
    """A negative alpha is an inverted adapter, one of 0 none: as the layers of alpha 3 times that.

    In a process of its own with a limit: diffusers' converter halves and doubles for ever.
    """
    subject = SUBJECTS["flux"]
    bare: Any = subject.make()
    right = load_adapter(flux_file(tmp_path / "right.safetensors", bare), bare)
    path = flux_file(tmp_path / "flux.safetensors", bare, alpha)
    program = (
        "import sys, torch; sys.path.insert(0, sys.argv[3])\n"
        "from models import SUBJECTS; from lora_ortho import load_adapter\n"
        "layers = load_adapter(sys.argv[1], SUBJECTS['flux'].make()).layers\n"
        "torch.save({n: p.scaling * p.lora_B @ p.lora_A for n, p in layers.items()}, sys.argv[2])"
    )
    words = [
        str(path),
        str(tmp_path / "found.pt"),
        str(Path(__file__).resolve().parents[2] / "support"),
    ]
    subprocess.run([sys.executable, "-c", program, *words], check=True, timeout=120)
    found = torch.load(tmp_path / "found.pt")
    assert set(found) == set(right.layers)
    for name, part in right.layers.items():
        wanted = alpha / 3.0 * part.scaling * part.lora_B @ part.lora_A
        torch.testing.assert_close(found[name], wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", [1e12, -1e-12])
def test_alphas_of_no_usual_size(tmp_path: Path, alpha: float) -> None:
    bare: Any = SUBJECTS["flux"].make()
    path = flux_file(tmp_path / "flux.safetensors", bare, alpha)
    refused_file(path, f"an alpha of {alpha:g} for rank 4", model=bare)


def test_a_negative_alpha_without_a_converter(tmp_path: Path) -> None:
    bare = SUBJECTS["unet"].make()
    layer: Any = bare.get_submodule(SUBJECTS["unet"].layer)
    stem = f"lora_unet_{SUBJECTS['unet'].layer.replace('.', '_')}"
    factors = {
        f"{stem}.lora_down.weight": torch.ones(2, layer.in_features),
        f"{stem}.lora_up.weight": torch.ones(layer.out_features, 2),
        f"{stem}.alpha": torch.tensor(-4.0),
    }
    loaded = load_adapter(write_file(tmp_path / "x.safetensors", factors), bare)
    assert [part.scaling for part in loaded.layers.values()] == [-2.0]


def test_without_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare: Any = SUBJECTS["flux"].make()
    path = flux_file(tmp_path / "flux.safetensors", bare)
    monkeypatch.setitem(sys.modules, "diffusers.loaders", None)
    refused_file(path, "blocks are numbered otherwise; diffusers could rename them", model=bare)


def test_layers_that_a_converter_drops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare: Any = SUBJECTS["flux"].make()
    path = flux_file(tmp_path / "flux.safetensors", bare)
    mixin: Any = library("diffusers").loaders.FluxLoraLoaderMixin
    convert = mixin.lora_state_dict

    def dropping(state: dict[str, Tensor], **settings: Any) -> tuple[dict[str, Tensor], None]:
        fresh = convert(state, **settings)[0]
        return {k: v for k, v in fresh.items() if "to_out" not in k}, None

    monkeypatch.setattr(mixin, "lora_state_dict", dropping)
    refused_file(path, "diffusers made 8 layers of what holds 9", model=bare)


def test_clip_with_and_without_its_outer_level(tmp_path: Path) -> None:
    """transformers 5 has no text_model in CLIP's names; files have it."""
    pipe = pipeline()
    name = next(n for n, _ in pipe.text_encoder.named_modules() if n.endswith("q_proj"))
    inner = name.removeprefix("text_model.")
    for spelling in (inner, f"text_model.{inner}"):
        flat = spelling.replace(".", "_")
        for stem in (f"text_encoder.{spelling}.lora.", f"lora_te1_{flat}.lora_"):
            tensors = {
                f"{stem}down.weight": torch.ones(2, 12),
                f"{stem}up.weight": torch.ones(12, 2),
            }
            loaded = load_adapter(write_file(tmp_path / "te.safetensors", tensors), pipe)
            assert list(loaded.layers) == [f"text_encoder.{name}"]
