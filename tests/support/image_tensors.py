"""The adapters of a PEFT model as the tensors of single files, in the layouts of image models."""

from __future__ import annotations

from typing import Any

import torch
from models import layers_of
from torch import Tensor


def factors(model: Any, name: str) -> dict[str, tuple[Tensor, Tensor, float]]:
    """lora_A, lora_B and scaling of a PEFT model's adapter, by layer."""
    return {
        layer: (m.lora_A[name].weight.data, m.lora_B[name].weight.data, m.scaling[name])
        for layer, m in layers_of(model).items()
        if name in m.lora_A
    }


def kohya(model: Any, name: str, prefix: str = "lora_unet_") -> dict[str, Tensor]:
    """The same in kohya's layout."""
    found = {}
    for layer, (A, B, scaling) in factors(model, name).items():
        stem = prefix + layer.replace(".", "_")
        found[f"{stem}.lora_down.weight"], found[f"{stem}.lora_up.weight"] = A, B
        found[f"{stem}.alpha"] = torch.tensor(scaling * A.shape[0], dtype=torch.float64)
    return found


def diffused(model: Any, name: str, part: str) -> dict[str, Tensor]:
    """The same in diffusers' layout, which has no alpha: the scaling goes into lora_B."""
    found = {}
    for layer, (A, B, scaling) in factors(model, name).items():
        found[f"{part}.{layer}.lora_A.weight"] = A
        found[f"{part}.{layer}.lora_B.weight"] = B * scaling
    return found
