"""export of pipelines: what is written, diffusers loads with the very effect of the merge."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import save_image_pipeline
from torch import Tensor, nn

import lora_ortho
from lora_ortho import mask_stream
from lora_ortho.adapters import LoadedAdapter, assign_streams

diffusers: Any = pytest.importorskip("diffusers", reason="diffusers is not installed")
peft: Any = pytest.importorskip("peft", reason="PEFT is not installed")

FILE = "pytorch_lora_weights.safetensors"
ENDS: dict[str, dict[str, tuple[str, ...]]] = {
    "one": {"unet": ("to_q", "conv1"), "text_encoder": ("q_proj", "fc1")},
    "two": {"unet": ("to_q", "to_v"), "text_encoder": ()},
}
RANKS = {"one": 3, "two": 4}
ALPHAS = {"one": 3.0, "two": -6.0}
WEIGHTS = {"one": 1.0, "two": 0.75}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, an adapter of two parts in diffusers' layout, one of a part in kohya's."""
    folder = tmp_path_factory.mktemp("pipeline")
    save_image_pipeline(folder / "base")
    pipe = pipeline(folder)
    generator = torch.Generator().manual_seed(7)
    for name, parts in ENDS.items():
        tensors: dict[str, Tensor] = {}
        for part, ends in parts.items():
            for layer, module in getattr(pipe, part).named_modules():
                if not layer.endswith(ends or "none of them"):
                    continue
                weight = module.weight
                shape = (RANKS[name], *weight.shape[1:])
                A = torch.randn(shape, generator=generator) / 4
                ones = (1,) * (weight.dim() - 2)
                B = torch.randn(weight.shape[0], RANKS[name], *ones, generator=generator) / 4
                if name == "one":
                    tensors |= {f"{part}.{layer}.lora_A.weight": A}
                    tensors |= {f"{part}.{layer}.lora_B.weight": B}
                else:
                    stem = f"lora_unet_{layer.replace('.', '_')}"
                    tensors |= {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B}
                    tensors |= {f"{stem}.alpha": torch.tensor(ALPHAS[name])}
        save_file(tensors, folder / f"{name}.safetensors")
    tables = "".join(
        f'[[loras]]\nfile_path = "."\nfile_name = "{name}.safetensors"\nadapter_weight = {w}\n'
        for name, w in WEIGHTS.items()
    )
    text = f'pipe_id = "base"\nprompt = "a cat"\ndevice = "cpu"\n{tables}'
    (folder / "merge.toml").write_text(text, encoding="utf-8")
    return folder


def pipeline(folder: Path) -> Any:
    return diffusers.StableDiffusionPipeline.from_pretrained(folder / "base")


def deltas(folder: Path) -> dict[str, dict[str, Tensor]]:
    """By layer and adapter: w s B A, from the bytes of the files."""
    pipe = pipeline(folder)
    found: dict[str, dict[str, Tensor]] = {}
    for name in ENDS:
        tensors = load_file(folder / f"{name}.safetensors")
        gain = WEIGHTS[name] * ALPHAS[name] / RANKS[name]
        for part in ("unet", "text_encoder"):
            for layer, _ in getattr(pipe, part).named_modules():
                flat = f"lora_unet_{layer.replace('.', '_')}"
                keys = [f"{part}.{layer}.lora_{x}.weight" for x in "AB"]
                if name == "two":
                    keys = [f"{flat}.lora_{x}.weight" for x in ("down", "up")]
                if (part == "text_encoder" and name == "two") or keys[0] not in tensors:
                    continue
                A, B = (tensors[key].double().flatten(1) for key in keys)
                found.setdefault(f"{part}.{layer}", {})[name] = gain * B @ A
    return found


def summed(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {layer: torch.stack(list(own.values())).sum(dim=0) for layer, own in parts.items()}


def read_back(folder: Path, merged: Path) -> dict[str, Tensor]:
    """What diffusers adds to each layer, once it has loaded the folder."""
    pipe = pipeline(folder)
    pipe.load_lora_weights(str(merged), adapter_name="merged")
    found = {}
    for part in ("unet", "text_encoder"):
        for layer, module in getattr(pipe, part).named_modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                delta = module.get_delta_weight("merged").double()
                found[f"{part}.{layer}"] = delta.flatten(1)
    return found


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for layer, delta in wanted.items():
        torch.testing.assert_close(found[layer], delta, rtol=1e-5, atol=1e-6)


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lora_ortho", "merge", "merge.toml", "--quiet", *arguments],
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("mixed", [False, True])
def test_the_command_writes_what_diffusers_loads(
    workplace: Path, tmp_path: Path, mixed: bool
) -> None:
    """Both parts, convolutions, unequal ranks, kohya's alphas, one of them negative."""
    merged = tmp_path / "merged"
    options = ["--mixed-ranks"] if mixed else []
    done = command(workplace, "--export", str(merged), "--json", *options)
    assert done.returncode == 0, done.stderr
    folder = ["adapter_config.json", "adapter_model.safetensors"]
    parts = [f"{part}/{file}" for part in ("text_encoder", "unet") for file in folder]
    written = [path.relative_to(merged).as_posix() for path in merged.rglob("*.*")]
    assert sorted(written) == sorted([FILE, *parts])
    ranks = json.loads(done.stdout)["ranks"]
    assert set(ranks.values()) == ({3, 4, 7} if mixed else {7})
    wanted = summed(deltas(workplace))
    assert any(layer.endswith("conv1") for layer in wanted)
    same(read_back(workplace, merged), wanted)
    same(read_by_peft(workplace, merged), wanted)


def read_by_peft(workplace: Path, merged: Path) -> dict[str, Tensor]:
    """By layer what PEFT adds to it, part by part."""
    found: dict[str, Tensor] = {}
    for part in ("unet", "text_encoder"):
        folder = merged / part if (merged / part).is_dir() else merged
        model = peft.PeftModel.from_pretrained(getattr(pipeline(workplace), part), folder)
        for layer, module in model.base_model.model.named_modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                delta = module.get_delta_weight("default").double().flatten(1)
                found[f"{part}.{layer}"] = delta
    return found


def test_one_part_needs_no_subfolder(workplace: Path, tmp_path: Path) -> None:
    """PEFT's files lie beside diffusers', and diffusers' are read where both are."""
    table = f'[[loras]]\nfile_path = "{workplace}"\nfile_name = "two.safetensors"\n'
    text = f'pipe_id = "{workplace / "base"}"\nprompt = "a cat"\ndevice = "cpu"\n{table}'
    (tmp_path / "merge.toml").write_text(text, encoding="utf-8")
    assert command(tmp_path, "--export", "merged").returncode == 0
    names = sorted(path.name for path in (tmp_path / "merged").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", FILE]
    wanted = {k: parts["two"] for k, parts in deltas(workplace).items() if "two" in parts}
    wanted = {layer: delta / WEIGHTS["two"] for layer, delta in wanted.items()}
    same(read_back(workplace, tmp_path / "merged"), wanted)
    pipe = pipeline(workplace)
    model = peft.PeftModel.from_pretrained(pipe.unet, tmp_path / "merged")
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert {f"unet.{name}" for name in layers} == set(wanted)
    for name, module in layers.items():
        delta = module.get_delta_weight("default").double().flatten(1)
        torch.testing.assert_close(delta, wanted[f"unet.{name}"], rtol=1e-5, atol=1e-6)
    loaded = lora_ortho.load_adapter(tmp_path / "merged", pipeline(workplace))
    assert set(loaded.layers) == set(wanted)


@pytest.mark.parametrize("options", [[], ["--mixed-ranks"]])
def test_it_loads_back_here(workplace: Path, tmp_path: Path, options: list[str]) -> None:
    """Through the pipeline, without a model, and a part alone, which then becomes PEFT's folder."""
    assert command(workplace, "--export", str(tmp_path / "merged"), *options).returncode == 0
    wanted = summed(deltas(workplace))
    pipe = pipeline(workplace)
    for model in (pipe, None):
        loaded = lora_ortho.load_adapter(tmp_path / "merged", model)
        found = {n: (x.scaling * x.lora_B @ x.lora_A).double() for n, x in loaded.layers.items()}
        same(found, wanted)
        assert loaded.parts == {"unet", "text_encoder"}
    alone = lora_ortho.load_adapter(tmp_path / "merged", pipe.unet, part="unet")
    lora_ortho.export([alone], tmp_path / "unet", model=pipe.unet)
    model = peft.PeftModel.from_pretrained(pipe.unet, tmp_path / "unet")
    for layer, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            delta = module.get_delta_weight("default").double().flatten(1)
            wanted_one = wanted.pop(f"unet.{layer}")
            torch.testing.assert_close(delta, wanted_one, rtol=1e-5, atol=1e-6)
    assert {layer.partition(".")[0] for layer in wanted} == {"text_encoder"}


def test_an_export_is_an_adapter_of_the_next_merge(workplace: Path, tmp_path: Path) -> None:
    """Its folder in a configuration, as it is."""
    assert command(workplace, "--export", str(tmp_path / "v1.5")).returncode == 0
    table = f'[[loras]]\nfile_path = "{tmp_path / "v1.5"}"\nadapter_weight = 0.5\n'
    text = f'pipe_id = "{workplace / "base"}"\nprompt = "a cat"\ndevice = "cpu"\n{table}'
    (tmp_path / "merge.toml").write_text(text, encoding="utf-8")
    done = command(tmp_path, "--export", "again")
    assert done.returncode == 0, done.stderr
    wanted = {layer: delta / 2 for layer, delta in summed(deltas(workplace)).items()}
    same(read_back(workplace, tmp_path / "again"), wanted)
    with safe_open(tmp_path / "again" / FILE, "pt") as file:
        (one,) = json.loads(file.metadata()["lora_ortho"])["adapters"]
    assert (one["name"], one["weight"]) == ("v1.5", 0.5)
    few = f'steps = 2\nmethods = ["direct"]\n{text}'
    (tmp_path / "merge.toml").write_text(few, encoding="utf-8")
    done = command(tmp_path, "--out", "pictures", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["difference"]["v1.5 alone"]["bare model"] > 0


def test_ortho_rows_by_their_owners(workplace: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    done = command(workplace, "--export", str(merged), "--method", "ortho_rows")
    assert done.returncode == 0, done.stderr
    pipe = pipeline(workplace)
    wanted: dict[str, dict[str, Tensor]] = {}
    streams = {
        part: assign_streams(n for n, _ in getattr(pipe, part).named_modules())
        for part in ("unet", "text_encoder")
    }
    for layer, parts in deltas(workplace).items():
        part, _, name = layer.partition(".")
        count, rows = len(parts), range(next(iter(parts.values())).shape[0])
        rates = [1 - 1 / count] * count
        owner = mask_stream.winners(0, range(1), rows, rates, stream=streams[part][name])[0]
        for j, (adapter, delta) in enumerate(parts.items()):
            own = torch.where((owner == j)[:, None], count * delta, 0.0)
            wanted.setdefault(layer, {})[adapter] = own
    same(read_back(workplace, merged), summed(wanted))
    with safe_open(merged / FILE, "pt") as file:
        made = json.loads(file.metadata()["lora_ortho"])
    assert (made["method"], made["mask_stream"], made["seed"]) == ("ortho_rows", 1, 0)


def loaded_pipeline(folder: Path) -> Any:
    """The pipeline with both adapters in PEFT's layers."""
    pipe = pipeline(folder)
    for name in ENDS:
        pipe.load_lora_weights(str(folder), weight_name=f"{name}.safetensors", adapter_name=name)
    return pipe


def test_export_of_a_pipeline_with_adapters(workplace: Path, tmp_path: Path) -> None:
    """Attached or not; weights as diffusers' set_adapters left them."""
    pipe = loaded_pipeline(workplace)
    pipe.set_adapters(["one", "two"], [1.0, 0.75])
    wanted = summed(deltas(workplace))
    lora_ortho.export(pipe, tmp_path / "bare")
    same(read_back(workplace, tmp_path / "bare"), wanted)
    with lora_ortho.attach(pipe, weights=[1.0, 2.0]) as handle:
        lora_ortho.export(handle, tmp_path / "attached")
    doubled = deltas(workplace)
    for parts in doubled.values():
        if "two" in parts:
            parts["two"] = 2 * parts["two"]
    same(read_back(workplace, tmp_path / "attached"), summed(doubled))


def refused(folder: Path, source: Any, *parts: str, **arguments: Any) -> None:
    """export refuses with every part in its message, and leaves nothing."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        lora_ortho.export(source, folder / "refused", **arguments)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert list(folder.iterdir()) == []


def test_what_diffusers_would_not_load_is_refused(workplace: Path, tmp_path: Path) -> None:
    one = lora_ortho.load_adapter(workplace / "one.safetensors")
    layers = {n.replace("text_encoder.", "controlnet."): part for n, part in one.layers.items()}
    other = replace(one, layers=dict(sorted(layers.items())))
    refused(tmp_path, [other], "layer controlnet.", "export that part alone", "part='controlnet'")
    unet = pipeline(workplace).unet
    alone = lora_ortho.load_adapter(workplace / "one.safetensors", unet, part="unet")
    refused(tmp_path, [one, alone], "adapter 'one' is for parts of a pipeline, 'one' for one")


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"padding_mode": "circular"}, "with 'circular'"), ({"dilation": 2}, "has (2, 2)")],
)
def test_convolutions_that_peft_does_not_have(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    """PEFT's lora_A is a convolution with the base's stride and padding alone."""
    model = nn.ModuleDict({"plain": nn.Conv2d(3, 4, 3), "odd": nn.Conv2d(3, 4, 3, **change)})
    part = lora_ortho.Adapter(torch.ones(2, 27), torch.ones(4, 2))
    kernels = {"plain": (3, 3), "odd": (3, 3)}
    one = LoadedAdapter("one", {"plain": part, "odd": part}, Path("one"), kernels=kernels)
    refused(tmp_path, [one], "layer odd, adapter 'one': PEFT's convolutions", reason, model=model)
    fine = replace(one, layers={"plain": part}, kernels={"plain": (3, 3)})
    lora_ortho.export([fine], tmp_path / "x", model=model)
