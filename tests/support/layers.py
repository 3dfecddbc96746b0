"""A FusedOrthoLoRALinear on a small linear layer, and the op that it is to be equal to."""

from __future__ import annotations

from typing import Any

import torch
from cases import make, same_rank
from torch import Tensor, nn

from lora_ortho import Adapter, FusedOrthoLoRALinear, fused_ortho_lora

CASE = same_rank(6, 16, 40, 3, 4)


def build(
    dtype: torch.dtype = torch.float32, bias: bool = False, **arguments: Any
) -> tuple[FusedOrthoLoRALinear, Tensor, list[Adapter]]:
    """A module over an nn.Linear, an input, and its adapters."""
    tensors = make(CASE, dtype)
    adapters = [
        Adapter(
            A.clone(), B.clone(), scaling=0.5 + j, weight=1.5 - j, name=f"style {j}",
            bias=torch.randn(40).to(dtype) if bias and j != 1 else None,
        )
        for j, (A, B) in enumerate(zip(tensors.lora_A, tensors.lora_B, strict=True))
    ]  # fmt: skip
    base = nn.Linear(16, 40).to(dtype)
    return FusedOrthoLoRALinear(base, adapters, **{"seed": 7, **arguments}), tensors.x, adapters


def by_op(module: FusedOrthoLoRALinear, x: Tensor, adapters: list[Adapter], **more: Any) -> Tensor:
    """The same by the public op."""
    settings = {"seed": module.seed, "stream": module.stream, "method": module.method, **more}
    return fused_ortho_lora(
        x,
        [a.lora_A for a in adapters],
        [a.lora_B for a in adapters],
        scaling=[a.scaling for a in adapters],
        weights=[a.weight for a in adapters],
        base=module.base(x),
        backend=module.backend,
        **settings,
    )


def both_ways(module: FusedOrthoLoRALinear, x: Tensor) -> Tensor:
    """The output without gradients, after a check that it has the bits of the one with them."""
    with torch.no_grad():
        short = module(x)
    assert torch.equal(short, module(x.requires_grad_(x.dtype.is_floating_point)).detach())
    return short


def changed_in_place(module: FusedOrthoLoRALinear) -> None:
    """Another lora_B, by a write that counts."""
    with torch.no_grad():
        module.adapters[1].lora_B.mul_(2)
