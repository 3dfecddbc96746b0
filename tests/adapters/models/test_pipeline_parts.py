"""Parts of pipelines: those that the pipeline itself holds, whatever their name; older names."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_files import refused_file, write_file
from models import SUBJECTS, adapted, library, pipeline
from torch import Tensor, nn

import lora_ortho
from lora_ortho import attach, inject, load_adapter
from lora_ortho.adapters.components import components, named


def pair(stem: str, rank: int = 2, d_in: int = 8, d_out: int = 8) -> dict[str, Tensor]:
    """Factors of one layer under diffusers' names."""
    generator = torch.Generator().manual_seed(len(stem))
    return {
        f"{stem}.lora_A.weight": torch.randn(rank, d_in, generator=generator),
        f"{stem}.lora_B.weight": torch.randn(d_out, rank, generator=generator),
    }


def net() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(8, 8)})


def new_pipeline(**parts: Any) -> Any:
    """As newer pipelines are: parts that no list of ours has."""
    return SimpleNamespace(_lora_loadable_modules=list(parts), **parts)


@pytest.mark.parametrize("other", ["connectors", "prior", "text_conditioner", "of_next_year"])
def test_parts_that_the_pipeline_names(tmp_path: Path, other: str) -> None:
    pipe = new_pipeline(transformer=net(), **{other: net()})
    path = write_file(tmp_path / "x.safetensors", {**pair("transformer.a"), **pair(f"{other}.a")})
    x = torch.randn(3, 8)
    for part in (None, other, "transformer"):
        loaded = load_adapter(path, pipe, part=part)
        wanted = [f"{p}.a" for p in (other, "transformer") if part in (None, p)]
        assert sorted(loaded.layers) == sorted(wanted)
        for name in wanted:
            where = name.removesuffix(".a")
            layer: Any = getattr(pipe, where)["a"]
            factors = pair(name)
            A, B = factors[f"{name}.lora_A.weight"], factors[f"{name}.lora_B.weight"]
            expected = layer(x) + x @ A.T @ B.T
            with inject(pipe, [loaded], seed=0):
                torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_metadata_of_such_a_part(tmp_path: Path) -> None:
    """PEFT's configuration, which diffusers writes by part: alpha 3 of rank 2."""
    pipe = new_pipeline(transformer=net(), connectors=net())
    config = {"connectors.r": 2, "connectors.lora_alpha": 3, "connectors.peft_type": "LORA"}
    header = json.dumps({**config, "connectors.target_modules": ["a"]})
    path = write_file(
        tmp_path / "x.safetensors", pair("connectors.a"), lora_adapter_metadata=header
    )
    assert load_adapter(path, pipe).layers["connectors.a"].scaling == 1.5


def test_a_part_that_is_missing(tmp_path: Path) -> None:
    """The file has what the pipeline holds as None: the error says what works, and that works."""
    pipe = pipeline()
    name = "encoder.layers.0.self_attn.q_proj"
    tensors = {
        **pair(f"text_encoder.{name}", d_in=12, d_out=12),
        **pair(f"text_encoder_2.{name}", d_in=12, d_out=12),
    }
    path = write_file(tmp_path / "x.safetensors", tensors)
    assert len(load_adapter(path, pipe).layers) == 2
    pipe.text_encoder_2 = None
    pipe.register_to_config(text_encoder_2=(None, None))
    refused_file(path, "'text_encoder_2' as None; load one part with part=", "attach", model=pipe)
    loaded = load_adapter(path, pipe, part="text_encoder")
    assert [layer.split(".")[0] for layer in loaded.layers] == ["text_encoder"]
    inject(pipe, [loaded]).detach()


def test_a_part_whose_prefix_is_another_s(tmp_path: Path) -> None:
    """Adapters for transformer_2 are in files of their own, as "transformer"."""
    pipe = new_pipeline(transformer=net(), transformer_2=net())
    path = write_file(tmp_path / "x.safetensors", pair("transformer.a"))
    way = "load_adapter(path, pipe.transformer_2, part='transformer')"
    refused_file(path, "has no part 'transformer_2'", way, model=pipe, part="transformer_2")
    loaded = load_adapter(path, pipe.transformer_2, part="transformer")
    inject(pipe.transformer_2, [loaded]).detach()


def controlled() -> Any:
    """A ControlNet's pipeline: diffusers reads no adapters for the ControlNet."""
    diffusers = library("diffusers")
    unet: Any = SUBJECTS["unet"].make()
    net = diffusers.ControlNetModel.from_unet(unet).double().eval()
    return diffusers.StableDiffusionXLControlNetPipeline(
        vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
        unet=unet, controlnet=net, scheduler=None,
    )  # fmt: skip


@pytest.mark.parametrize("how", ["attach", "inject"])
def test_every_module_of_a_pipeline(how: str) -> None:
    """Parts that are not in diffusers' own list are merged too, and take no stream from others."""
    peft = library("peft")
    pipe = controlled()
    assert "controlnet" not in pipe._lora_loadable_modules
    streams = {e.name: e.stream for e in named(components(pipe)) if e.name.startswith("unet")}
    alone = {f"unet.{e.name}": e.stream for e in named(components(pipe.unet)) if e.name}
    assert {name: streams[name] for name in alone} == alone
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    for part in (pipe.unet, pipe.controlnet):
        for name in ("one", "two"):
            peft.inject_adapter_in_model(config, part, name)
        for module in part.modules():
            if hasattr(module, "lora_A"):
                module.set_adapter(["one", "two"])
    count = sum(hasattr(m, "lora_A") for p in (pipe.unet, pipe.controlnet) for m in p.modules())
    if how == "inject":
        loaded = lora_ortho.adapters.adapters_of(pipe)
        pipe = controlled()
        handle: Any = inject(pipe, loaded, seed=0)
    else:
        handle = attach(pipe, seed=0)
    with handle:
        assert len(handle.layers) == len(handle.report) == count
        found = [name for name in handle.layers if name.startswith("controlnet.")]
        assert found
        numbers = [entry.stream for entry in handle.report]
        assert len(set(numbers)) == len(numbers)
        shared = next(name for name in found if "down_blocks" in name)
        plain = zlib.crc32(shared.partition(".")[2].encode())
        by_name = {entry.name: entry.stream for entry in handle.report}
        assert by_name["unet." + shared.partition(".")[2]] == plain != by_name[shared]
    assert lora_ortho.detach(pipe) == 0


def test_detach_knows_every_part() -> None:
    pipe = new_pipeline(transformer=net())
    pipe.components = {"transformer": pipe.transformer, "upscaler": net(), "scheduler": object()}
    parts = components(pipe)
    assert list(parts) == ["transformer", "upscaler"]
    part = lora_ortho.Adapter(torch.randn(2, 8), torch.randn(8, 2))
    loaded = lora_ortho.adapters.LoadedAdapter("x", {"upscaler.a": part}, Path("x"))
    inject(pipe, [loaded])
    assert lora_ortho.detach(pipe) == 1


def test_a_pass_of_one_part_says_nothing_of_another() -> None:
    pipe = new_pipeline(transformer=net(), connectors=net())
    part = lora_ortho.Adapter(torch.randn(2, 8), torch.randn(8, 2))
    layers = {"transformer.a": part, "connectors.a": part}
    loaded = lora_ortho.adapters.LoadedAdapter("x", layers, Path("x"))

    def run(where: nn.Module, reach: bool) -> None:
        where.forward = (lambda x: where["a"](x)) if reach else (lambda x: x)  # type: ignore
        where(torch.randn(3, 8))

    with inject(pipe, [loaded]) as handle:
        run(pipe.transformer, False)
        assert [e.name for e in handle.report if e.how == "not reached"] == ["transformer.a"]
        run(pipe.connectors, True)
        assert [e.name for e in handle.report if e.how == "not reached"] == ["transformer.a"]


def llava() -> Any:
    """A model whose parts have other names since transformers 5."""
    transformers = library("transformers")
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4, projection_dim=16,
    )  # fmt: skip
    text = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=60)
    return transformers.LlavaForConditionalGeneration(config).eval()


def of_transformers_5() -> None:
    if int(library("transformers").__version__.partition(".")[0]) < 5:
        pytest.skip("this transformers has the older names")


def test_names_of_transformers_4(tmp_path: Path) -> None:
    """A folder from before, as PEFT reads it into the model of today."""
    of_transformers_5()
    peft, safetensors = library("peft"), library("safetensors.torch")
    model = llava()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(llava(), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    start = "base_model.model."
    older = {
        key.replace(f"{start}model.language_model.", f"{start}language_model.model.").replace(
            f"{start}model.vision_tower.", f"{start}vision_tower.vision_model."
        ): tensor
        for key, tensor in safetensors.load_file(file).items()
    }
    assert not any(key.startswith(f"{start}model.") for key in older)
    safetensors.save_file(older, file, {"format": "pt"})
    ids = torch.arange(14).view(2, 7)
    loaded = load_adapter(tmp_path, model)
    names = [name for name, module in model.named_modules() if name.endswith("q_proj")]
    assert sorted(loaded.layers) == sorted(names)
    with torch.no_grad():
        with inject(model, [loaded], method="direct"):
            ours = model(input_ids=ids).logits
        bare = model(input_ids=ids).logits
        right = peft.PeftModel.from_pretrained(model, tmp_path)(input_ids=ids).logits
    torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, bare)


def test_layers_that_transformers_5_fused(tmp_path: Path) -> None:
    """Experts of a mixture are one parameter now: no layer to adapt, and the error says so."""
    of_transformers_5()
    transformers = library("transformers")
    config = transformers.MixtralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    name = "model.layers.0.block_sparse_moe.experts.0.w1"
    path = write_file(tmp_path / "x.safetensors", pair(name, d_in=32, d_out=48))
    refused_file(path, f"holds {name!r} fused with others, as 'model.layers.0.mlp", model=model)


def test_names_that_fit_are_left_alone(tmp_path: Path) -> None:
    """A renaming is tried for names only that the model does not have."""
    subject = SUBJECTS["llama"]
    adapted(subject, "plain").save_pretrained(tmp_path)
    found = load_adapter(tmp_path / "plain", subject.make())
    assert set(found.layers) == {
        name for name, _ in subject.make().named_modules() if name.endswith(tuple(subject.targets))
    }
