"""A small model with every kind of layer that PEFT adapts, and adapters on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="PEFT is not installed: nothing to attach to")


class Small(nn.Module):
    """A linear layer, one without a bias, an embedding, a convolution, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6, bias=False)
        self.image = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.relu(self.up(x)))
        pixels = self.image(x.reshape(-1, 3, 2, 1)).mean(dim=(2, 3))
        return self.head(x) + pixels.mean()  # type: ignore[no-any-return]


X = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(1))
TARGETS = ["up", "down", "image"]


def make(*names: str, base: nn.Module | None = None, **fields: Any) -> Any:
    """A PeftModel of Small with adapters of ranks 2, 3, ..., all active and trainable."""
    torch.manual_seed(0)
    model: Any = None
    for j, name in enumerate(names or ("one", "two")):
        config = peft.LoraConfig(
            **{"r": 2 + j, "lora_alpha": 3, "target_modules": TARGETS, **fields}
        )
        if model is None:
            model = peft.get_peft_model(base or Small(), config, name)
        else:
            model.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    model.base_model.set_adapter(list(names or ("one", "two")))
    return model.eval()


def layer(model: Any, name: str) -> Any:
    return model.base_model.model.get_submodule(name)
