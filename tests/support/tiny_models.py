"""A language model of a few thousand weights, its tokenizer and adapters, as folders on disk."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = sorted({"the", "model", "adds", "masks", "to", "each", "token", "draws", "seed", "once"})
SIZES = {
    "vocab_size": len(WORDS) + 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def language_model(seed: int = 0) -> Any:
    """A random Llama in evaluation mode."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False, pad_token_id=0)
    return transformers.LlamaForCausalLM(config).eval()


def tokenizer() -> Any:
    """One token a word."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    vocabulary = {word: j for j, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def save_language_model(folder: Path, seed: int = 0) -> Path:
    """Model and tokenizer in a folder, as `from_pretrained` reads them."""
    language_model(seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_adapter(
    folder: Path,
    model: Any,
    seed: int,
    targets: Sequence[str] = ("q_proj", "v_proj", "down_proj"),
    **settings: Any,
) -> Path:
    """An adapter with random factors for the model, made and saved by PEFT."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    settings = {"r": 4, "lora_alpha": 8, **settings}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=list(targets), **settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = noise * 0.5 / parameter.shape[-1] ** 0.5
    adapted.save_pretrained(folder)
    adapted.unload()
    return folder


def save_image_pipeline(folder: Path, seed: int = 0) -> Path:
    """A Stable Diffusion pipeline of pictures of 16 × 16, as `from_pretrained` reads it."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(seed)
    folder.mkdir()
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters]
    (folder / "vocab.json").write_text(json.dumps({word: j for j, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = [str(folder / name) for name in ("vocab.json", "merges.txt")]
    text = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=16,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=transformers.CLIPTextModel(text),
        tokenizer=transformers.CLIPTokenizer(*files, model_max_length=16), unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_image_adapter(file: Path, pipeline: Path, seed: int, kohya: bool = False) -> Path:
    """An adapter of a pipeline's UNet in one file, with diffusers' names or with kohya's."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    from safetensors.torch import save_file

    unet = diffusers.UNet2DConditionModel.from_pretrained(pipeline / "unet")
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, layer in unet.named_modules():
        if name.rpartition(".")[2] not in ("to_q", "to_v"):
            continue
        down = torch.randn(4, layer.in_features, generator=generator) / 4
        up = torch.randn(layer.out_features, 4, generator=generator) / 4
        if kohya:
            flat = f"lora_unet_{name.replace('.', '_')}"
            factors[f"{flat}.lora_down.weight"] = down
            factors[f"{flat}.lora_up.weight"] = up
            factors[f"{flat}.alpha"] = torch.tensor(8.0)
        else:
            factors[f"unet.{name}.lora_A.weight"] = down
            factors[f"unet.{name}.lora_B.weight"] = up
    save_file(factors, file)
    return file
