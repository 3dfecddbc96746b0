"""The launches that ship: one for each way in which a launch configuration shapes a kernel."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from . import backward, forward
from .launch import Factors, Launch
from .launch_config import Gpu, width_of

# An architecture and the multiprocessors of its largest GPU.
GPUS = (Gpu("sm_80", 108), Gpu("sm_90", 132), Gpu("sm_100", 148), Gpu("gfx942", 304))
KERNELS = ("forward", "grad_s", "grad_B")

_RANKS = {
    (torch.bfloat16, "orthogonal"): (
        (1, 16), (2, 16), (3, 16), (4, 16), (1, 32), (2, 32), (4, 32), (4, 64), (4, 128), (4, 256),
    ),
    (torch.float16, "orthogonal"): ((3, 16),),
    (torch.float32, "orthogonal"): (
        (1, 16), (2, 16), (3, 16), (4, 16), (1, 32), (4, 32), (4, 64), (4, 256),
    ),
    (torch.bfloat16, "dropout"): ((3, 16), (4, 64)),
    (torch.bfloat16, "direct"): ((3, 16), (4, 64)),
}  # fmt: skip


@dataclass(frozen=True)
class Shipped:
    """One kernel for one problem on one GPU, at (8192, 4096) outputs; rank 0 is unequal ranks."""

    kernel: str
    gpu: Gpu
    dtype: torch.dtype
    method: str
    adapters: int
    rank: int
    tokens: int = 8192
    d_out: int = 4096

    def launch(self) -> Launch:
        """The launch, on tensors of the right shape that hold nothing."""
        ranks = [self.rank or 8 + 5 * (j % 2) for j in range(self.adapters)]
        tokens, d_out, width = self.tokens, self.d_out, width_of(max(ranks))
        wide = _empty(self.dtype, tokens, d_out)
        factors = Factors(
            self.method,
            _empty(self.dtype, sum(ranks), d_out),
            _empty(self.dtype, self.adapters, d_out, width),
            _empty(torch.int32, self.adapters, 4),
            self.rank,
            sum(ranks),
        )
        s = _empty(self.dtype, tokens, sum(ranks))
        seed, gains = _empty(torch.int64), _empty(torch.float32, self.adapters)
        call = (s, gains, seed, (0, 0, 0, 0))
        if self.kernel == "forward":
            return forward.forward(factors, self.gpu, wide, wide, *call)
        if self.kernel == "grad_s":
            return backward.grad_s(factors, self.gpu, wide, *call)[0]
        return backward.grad_B(factors, self.gpu, wide, *call, self.dtype)[0]


def _empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def shipped() -> Iterator[Shipped]:
    """All of them, the architectures of each side by side."""
    for (dtype, method), ranks in _RANKS.items():
        for kernel, (adapters, rank) in itertools.product(KERNELS, ranks):
            for gpu in GPUS:
                yield Shipped(kernel, gpu, dtype, method, adapters, rank)
    for kernel, gpu in itertools.product(KERNELS, GPUS):
        yield Shipped(kernel, gpu, torch.bfloat16, "orthogonal", 3, 0)
