"""Keys and configurations that PEFT writes: read as PEFT reads them, or refused by reason."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import PREFIX, config, refused, refused_file, small_model, tensors, write
from models import SUBJECTS
from safetensors.torch import load_file, save_file
from tiny_models import language_model
from torch import Tensor

import lora_ortho
from lora_ortho import load_adapter
from lora_ortho.adapters import LoadedAdapter

peft: Any = pytest.importorskip("peft", reason="PEFT is not installed: nothing to compare with")
transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")
IDS = torch.arange(8).view(2, 4)


def llama(tied: bool) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    settings = transformers.LlamaConfig(
        vocab_size=13, num_attention_heads=4, tie_word_embeddings=tied, **sizes
    )
    return transformers.LlamaForCausalLM(settings).eval()


def saved(folder: Path, model: Any, *targets: str, **fields: Any) -> Any:
    """PEFT's model with an adapter that it saved in a folder."""
    whole = fields.pop("save_embedding_layers", "auto")
    settings = {"r": 4, "target_modules": list(targets), "init_lora_weights": False, **fields}
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings)).eval()
    adapted.save_pretrained(folder, save_embedding_layers=whole)
    return adapted


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_whole_weights_that_are_the_models(tmp_path: Path, tied: bool) -> None:
    """PEFT saves lm_head's weight beside its adapter; the model tells that nothing changed."""
    model = llama(tied)
    wanted = saved(tmp_path, model, "q_proj", "lm_head")(IDS).logits
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert any(key.endswith("lm_head.base_layer.weight") for key in keys)
    adapter = load_adapter(tmp_path, model)
    assert list(adapter.layers) == [
        "lm_head",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    with lora_ortho.inject(model, [adapter], method="direct"):
        torch.testing.assert_close(model(IDS).logits, wanted)
    refused(tmp_path, "a whole weight of the base model", "give the model")
    half = load_adapter(tmp_path, copy.deepcopy(model).bfloat16())  # compared in its own precision
    assert list(half.layers) == list(adapter.layers)


def test_whole_weights_that_are_not_the_models(tmp_path: Path) -> None:
    """Changed, resized, or with nothing to compare: each by its reason."""
    model = llama(False)
    saved(tmp_path, model, "q_proj", save_embedding_layers=True)
    key = f"{PREFIX}lm_head.weight"
    assert len(load_adapter(tmp_path, model).layers) == 2
    changed = copy.deepcopy(model)
    changed.lm_head.weight.data[0, 0] += 1
    refused(tmp_path, "a whole weight that differs from the model's", key=key, model=changed)
    resized = copy.deepcopy(model)
    resized.resize_token_embeddings(16, mean_resizing=False)
    refused(tmp_path, "shape [13, 32], the model's is [16, 32]", "resized", model=resized)
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(model.config)
    refused(tmp_path, "the model has no values", model=empty)


PATTERNS = [
    r".*layers\.1\..*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    r".*layers\.\d+\..*q_proj",
    r"layers\.(0|1|2|3|4|5)\..*q_proj",
    r"^model.layers.0.self_attn.q_proj",
    r"model.layers.1.self_attn.[qkv]_proj",
    r"(?:.*)\.q_proj",
    r"(?!.*mlp).*\.\w+_proj",
    r"(layers\.[01]\.)+self_attn\.q_proj",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_that_peft_takes(tmp_path: Path, pattern: str) -> None:
    """The differences of weights are PEFT's."""
    fields = {"rank_pattern": {pattern: 2}, "alpha_pattern": {pattern: 7}}
    adapted = saved(tmp_path, llama(False), "q_proj", "k_proj", "down_proj", **fields)
    layers = load_adapter(tmp_path).layers
    assert {part.lora_A.shape[0] for part in layers.values()} <= {2, 4}
    for name, part in layers.items():
        wanted = adapted.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(part.scaling * part.lora_B @ part.lora_A, wanted)
    assert any(part.lora_A.shape[0] == 2 for part in layers.values())


def test_a_pattern_for_every_layer_takes_linear_time(tmp_path: Path) -> None:
    """As exports of mixed ranks have it; `re` compiles each anew above 512."""
    layers = {f"model.layers.{i}.q_proj": 1 + i % 4 for i in range(2000)}
    factors: dict[str, Tensor] = {}
    for name, rank in layers.items():
        factors[f"{PREFIX}{name}.lora_A.weight"] = torch.ones(rank, 2)
        factors[f"{PREFIX}{name}.lora_B.weight"] = torch.ones(2, rank)
    for form in ("^{}", "{}"):
        patterns = {form.format(name): rank for name, rank in layers.items()}
        fields = config(rank_pattern=patterns, alpha_pattern=patterns)
        start = time.process_time()
        found = load_adapter(write(tmp_path / "x", fields, factors)).layers
        assert time.process_time() - start < 3.0
        assert {part.scaling for part in found.values()} == {1.0}


def with_adapter_level(factors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {
        key.replace(".lora_A.", f".lora_A.{name}.").replace(".lora_B.", f".lora_B.{name}."): value
        for key, value in factors.items()
    }


def test_the_adapters_name_in_the_keys(tmp_path: Path) -> None:
    """As PEFT has them in memory, and scripts save them; of one adapter only."""
    plain = load_adapter(write(tmp_path / "plain")).layers
    named = load_adapter(write(tmp_path / "named", None, with_adapter_level(tensors(), "default")))
    assert list(named.layers) == list(plain)
    for name, part in plain.items():
        assert torch.equal(named.layers[name].lora_A, part.lora_A)
        assert torch.equal(named.layers[name].lora_B, part.lora_B)
    both = with_adapter_level(tensors(), "one") | with_adapter_level(tensors(), "two")
    refused(write(tmp_path / "both", None, both), "keys of several adapters ('one', 'two')")
    mixed = tensors() | with_adapter_level(tensors(), "one")
    refused(write(tmp_path / "mixed", None, mixed), "keys of several adapters ('one', none)")


def test_the_adapters_name_in_the_keys_of_a_single_file(tmp_path: Path) -> None:
    A, B = torch.randn(2, 3), torch.randn(4, 2)
    stem = "transformer.a"
    keys = {f"{stem}.lora_A.default.weight": A, f"{stem}.lora_B.default.weight": B}
    file = tmp_path / "x.safetensors"
    save_file({**keys, f"{stem}.alpha": torch.tensor(6.0)}, file)
    part = load_adapter(file, small_model(), part="transformer").layers["a"]
    assert torch.equal(part.lora_A, A)
    assert part.scaling == 3.0
    save_file({**keys, f"{stem}.lora_A.weight": A + 1}, file)
    refused_file(file, "says the same as")
    other = {"transformer.b.lora_A.weight": A + 1, "transformer.b.lora_B.weight": B + 1}
    save_file({**keys, **other}, file)
    refused_file(file, "keys of several adapters ('default', none)")


def test_what_reads_an_adapter_is_kept(tmp_path: Path) -> None:
    """AutoPeftModelForCausalLM opens the export: task type and base are those of the inputs."""
    model = language_model()
    model.save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for name in ("one", "two"):
        saved(tmp_path / name, base, "q_proj", task_type="CAUSAL_LM", revision="main")
    loaded = [load_adapter(tmp_path / name) for name in ("one", "two")]
    lora_ortho.export(loaded, tmp_path / "merged")
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "merged")
    module = opened.base_model.model.model.layers[0].self_attn.q_proj
    wanted = sum(
        part.scaling * part.lora_B @ part.lora_A
        for part in (one.layers["model.layers.0.self_attn.q_proj"] for one in loaded)
    )
    torch.testing.assert_close(module.get_delta_weight("default"), wanted)
    fields = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert (fields["task_type"], fields["revision"]) == ("CAUSAL_LM", "main")
    assert fields["target_modules"] == ["q_proj"]
    saved(tmp_path / "three", base, "q_proj", task_type="FEATURE_EXTRACTION")
    loaded.append(load_adapter(tmp_path / "three"))
    lora_ortho.export(loaded, tmp_path / "mixed")
    assert "task_type" not in json.loads((tmp_path / "mixed" / "adapter_config.json").read_text())
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "one")
    lora_ortho.export(adapted, tmp_path / "again")
    fields = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (fields["task_type"], fields["base_model_name_or_path"]) == (
        "CAUSAL_LM",
        str(tmp_path / "base"),
    )


def test_masks_of_another_stream_are_said(tmp_path: Path) -> None:
    factors = {f"{PREFIX}a.lora_{x}.weight": torch.eye(4) for x in "AB"}
    one = LoadedAdapter("x", {"a": lora_ortho.Adapter(torch.eye(4), torch.eye(4))}, Path("x"))
    lora_ortho.export([one, one], tmp_path / "x", "ortho_rows")
    load_adapter(tmp_path / "x")  # warnings are errors here where a test asks for it
    made = json.dumps({"method": "ortho_rows", "mask_stream": 2})
    save_file(factors, tmp_path / "x" / "adapter_model.safetensors", {"lora_ortho": made})
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(config(r=4)))
    with pytest.warns(UserWarning, match="mask stream version 2; this package draws version 1"):
        load_adapter(tmp_path / "x")


WAN = "lora_unet_blocks_0_self_attn_q"
COMFY = "diffusion_model.blocks.0.self_attn.q"


@pytest.mark.parametrize("stem", [WAN, COMFY])
def test_names_of_other_programs_say_the_way(tmp_path: Path, stem: str) -> None:
    """Of a model that has other names: diffusers' own loader reads what it can."""
    ends = ("lora_down", "lora_up") if stem == WAN else ("lora_A", "lora_B")
    shapes = ((2, 16), (16, 2))
    file = tmp_path / "x.safetensors"
    save_file(
        {f"{stem}.{end}.weight": torch.ones(s) for end, s in zip(ends, shapes, strict=True)}, file
    )
    model = SUBJECTS["flux"].make()
    refused_file(file, "the model has no layer", "pipeline.load_lora_weights", "lora_ortho.attach",
                 model=model)  # fmt: skip
