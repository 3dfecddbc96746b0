"""The Triton launches that ship: one for each way in which a configuration shapes a kernel."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from lora_ortho.triton_kernels.expand import expand
from lora_ortho.triton_kernels.grad_B import grad_B
from lora_ortho.triton_kernels.grad_s import grad_s
from lora_ortho.triton_kernels.launch import Factors, Launch
from lora_ortho.triton_kernels.launch_config import Gpu, width_of

from lora_ortho.problem import Place

# An architecture and the multiprocessors of its largest GPU.
GPUS = (Gpu("sm_80", 108), Gpu("sm_90", 132), Gpu("sm_100", 148), Gpu("gfx942", 304))
KERNELS = ("expand", "grad_s", "grad_B")

# Adapters and their rank, by dtype and kind of draw.
_RANKS = {
    (torch.bfloat16, "shared"): (
        (1, 16), (2, 16), (3, 16), (4, 16), (1, 32), (2, 32), (4, 32), (4, 64), (4, 128), (4, 256),
    ),
    (torch.float16, "shared"): ((3, 16),),
    (torch.float32, "shared"): (
        (1, 16), (2, 16), (3, 16), (4, 16), (1, 32), (4, 32), (4, 64), (4, 256),
    ),
    (torch.bfloat16, "own"): ((3, 16), (4, 64)),
    (torch.bfloat16, "none"): ((3, 16), (4, 64)),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One kernel for one problem on one GPU, at (8192, 4096) outputs; rank 0 is unequal ranks."""

    kernel: str
    gpu: Gpu
    dtype: torch.dtype
    draw: str
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
            self.draw,
            _empty(self.dtype, sum(ranks), d_out),
            _empty(self.dtype, self.adapters, d_out, width),
            _empty(torch.int32, self.adapters, 4),
            self.rank,
            sum(ranks),
        )
        s = _empty(self.dtype, tokens, sum(ranks))
        seed, gains = _empty(torch.int64), _empty(torch.float32, self.adapters)
        call = (s, gains, seed, Place())
        if self.kernel == "expand":
            return expand(factors, self.gpu, wide, wide, *call)
        if self.kernel == "grad_s":
            return grad_s(factors, self.gpu, wide, *call)[0]
        return grad_B(factors, self.gpu, wide, *call, self.dtype)[0]


def _empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def variants() -> Iterator[Variant]:
    """All of them, the architectures of each side by side."""
    for (dtype, draw), ranks in _RANKS.items():
        for kernel, (adapters, rank) in itertools.product(KERNELS, ranks):
            for gpu in GPUS:
                yield Variant(kernel, gpu, dtype, draw, adapters, rank)
    for kernel, gpu in itertools.product(KERNELS, GPUS):
        yield Variant(kernel, gpu, torch.bfloat16, "shared", 3, 0)
