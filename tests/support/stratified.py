"""Blocks of stratified samples whose mean is the direct merge, and a check that is exact."""

from __future__ import annotations

from typing import Any

import torch
from servers import Server
from torch import Tensor

from lora_ortho import fused_ortho_lora

SEED = 5
# Blocks whose strata times every keep probability are whole: method, adapters, rate, strata.
WHOLE = [
    ("orthogonal", 4, 0.75, 4),
    ("orthogonal", 2, 0.5, 2),
    ("orthogonal", 3, 0.75, 8),
    ("dropout", 3, 0.5, 2),
    ("dropout", 2, 0.75, 4),
]


def check_mean_of_integers(
    server: Server, dtype: torch.dtype, method: str, adapters: int, rate: float, strata: int
) -> None:
    """All products and sums are integers that the dtype holds."""
    numbers = torch.Generator().manual_seed(7)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=numbers).to(dtype)

    x, base = integers(9, 3), integers(9, 300)
    lora_A = [integers(2, 3) for _ in range(adapters)]
    lora_B = [integers(300, 2) for _ in range(adapters)]
    leaves = [tensor.requires_grad_() for tensor in (x, *lora_A, *lora_B)]
    grad = integers(9, 300)

    def call(method: str, **given: Any) -> list[Tensor]:
        y = fused_ortho_lora(
            x, lora_A, lora_B, p=[rate] * adapters, method=method, base=base, seed=SEED,
            backend=server.backend, **given,
        )  # fmt: skip
        grads = torch.autograd.grad(y, leaves[1 + adapters :], grad)  # smaller than 256
        return [y.detach().double(), *(g.double() for g in grads)]

    found = [call(method, sample=strata + part, strata=strata) for part in range(strata)]
    for parts, direct in zip(zip(*found, strict=True), call("direct"), strict=True):
        assert torch.equal(torch.stack(parts).mean(0), direct)
