"""Small PEFT adapter folders for the tests, right and wrong ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_ortho.adapters import AdapterFileError, load_adapter

PREFIX = "base_model.model."


def tensors(rank: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Factors of two layers, "a" (3 to 4) and "b.c" (4 to 5), values distinct."""
    made = {}
    for layer, d_in, d_out in (("a", 3, 4), ("b.c", 4, 5)):
        made[f"{PREFIX}{layer}.lora_A.weight"] = torch.arange(rank * d_in).view(rank, d_in) / 8 + 1
        made[f"{PREFIX}{layer}.lora_B.weight"] = torch.arange(d_out * rank).view(-1, rank) / 4 - 1
    return {key: value.to(dtype) for key, value in made.items()}


def config(**fields: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 6, **fields}


def write(
    folder: Path, fields: Any = None, factors: dict[str, Tensor] | bytes | None = None
) -> Path:
    """An adapter folder; the default is a valid one."""
    folder.mkdir(exist_ok=True)
    text = fields if isinstance(fields, bytes) else json.dumps(fields or config()).encode()
    (folder / "adapter_config.json").write_bytes(text)
    file = folder / "adapter_model.safetensors"
    factors = tensors() if factors is None else factors
    file.write_bytes(factors) if isinstance(factors, bytes) else save_file(factors, file)
    return folder


def refused(
    folder: Path, *parts: str, key: str | None = None, model: nn.Module | None = None
) -> None:
    """load_adapter must refuse, with every part in its message, the key, and the file's path."""
    with pytest.raises(AdapterFileError) as caught:
        load_adapter(folder, model)
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert str(folder) in message
    assert message.startswith(caught.value.file)
    for part in parts:
        assert part in message, message
    if key is not None:
        assert caught.value.key == key, message
        assert repr(key) in message


def small_model() -> nn.Module:
    model = nn.Module()
    model.a, model.b = nn.Linear(3, 4), nn.Module()
    model.b.c = nn.Linear(4, 5)
    return model


def write_file(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    """A safetensors file, with metadata where some is given."""
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata or None)
    return path


def refused_file(
    path: Path, *parts: str, key: str | None = None, model: Any = None, **arguments: Any
) -> None:
    """load_adapter must refuse a single file, with every part in its message."""
    with pytest.raises(AdapterFileError) as caught:
        load_adapter(path, model, **arguments)
    message = str(caught.value)
    assert message.startswith(str(path))
    for part in parts:
        assert part in message, message
    if key is not None:
        assert caught.value.key == key, message
