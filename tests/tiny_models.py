"""A language model of a few thousand weights, its tokenizer and adapters, as folders on disk."""

from __future__ import annotations

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
