"""A model of four linear layers, and adapters for it made in memory."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_ortho import Adapter
from lora_ortho.adapters import LoadedAdapter

X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    """Two blocks of two linear layers, 6 to 10 to 6 features."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(6, 10), "down": nn.Linear(10, 6)}) for _ in range(2)
        )

    def block(self, number: int) -> nn.ModuleDict:
        return cast(nn.ModuleDict, self.blocks[number])

    def forward(self, x: Tensor) -> Tensor:
        for block in map(self.block, range(2)):
            x = x + block["down"](torch.relu(block["up"](x)))
        return x


def adapter(name: str, *layers: str, rank: int = 2, **fields: Any) -> LoadedAdapter:
    """An adapter of those layers of Model, or of all four."""
    layers = layers or tuple(f"blocks.{i}.{part}" for i in (0, 1) for part in ("down", "up"))
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    parts = {}
    for layer in layers:
        d_in, d_out = (6, 10) if layer.endswith("up") else (10, 6)
        a = torch.randn(rank, d_in, generator=generator)
        b = torch.randn(d_out, rank, generator=generator)
        parts[layer] = Adapter(a, b, scaling=0.5, name=name, **fields)
    return LoadedAdapter(name, parts, Path(name))
