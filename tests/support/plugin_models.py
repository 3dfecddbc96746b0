"""A base model and two adapters for the merges that are weights, and what they should give."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import language_model, save_adapter, save_language_model
from torch import Tensor

from lora_ortho.adapters import LoadedAdapter, load_adapter
from lora_ortho.plugins.weights import fold_into

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "plugins"


def needs(package: str, module: str) -> pytest.MarkDecorator:
    found = importlib.util.find_spec(module) is not None
    return pytest.mark.skipif(not found, reason=f"{package} is not installed")


def save_examples(where: Path) -> Path:
    """The examples of the plug-ins with what they name: a base model and two adapters."""
    shutil.copytree(EXAMPLES, where, dirs_exist_ok=True)
    save_language_model(where / "base")
    save_adapter(where / "one", language_model(), 1)
    save_adapter(where / "two", language_model(), 2, targets=["q_proj", "o_proj"], use_rslora=True)
    return where


def loaded(folder: Path, model: Any = None) -> list[LoadedAdapter]:
    return [load_adapter(folder / name, model) for name in ("one", "two")]


def expected(folder: Path, method: str, **place: Any) -> dict[str, Tensor]:
    """The merged weights, from the model and adapters in memory."""
    model = language_model()
    fold_into(model, loaded(folder), method, [0.5, 0.5], **place)
    state: dict[str, Tensor] = model.state_dict()
    return state


def assert_weights(model_folder: Path, wanted: dict[str, Tensor]) -> None:
    from safetensors.torch import load_file

    found = load_file(model_folder / "model.safetensors")
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def run_program(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=cwd, capture_output=True, text=True, timeout=300
    )


def gpt2(**settings: Any) -> Any:
    """A GPT-2 with a square Conv1D in its attention, and a lm_head of its own."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 32, "bos_token_id": 0}
    config = transformers.GPT2Config(**sizes, eos_token_id=0, tie_word_embeddings=False, **settings)
    return transformers.GPT2LMHeadModel(config).eval()


def gpt2_adapter(folder: Path, targets: list[str]) -> dict[str, Tensor]:
    """An adapter, and the weights as PEFT merges it."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(gpt2(), config)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    state: dict[str, Tensor] = adapted.merge_and_unload().state_dict()
    return state


TRANSPOSED = "transformer.h.0.attn.c_proj.weight"


SQUARES = [["attn.c_proj"], ["attn.c_proj", "lm_head"]]  # PEFT's flag is off for the second
