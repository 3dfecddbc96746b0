"""The timed cases: their sizes, the least that each costs, and its tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .device import Device

SEED = 2510_03262
B_SCALE = 0.02  # standard deviation of lora_B


@dataclass(frozen=True)
class Work:
    """The least that a call costs: bytes that must move, operations that must be done.

    Each input is read once, each output written once; a multiply-add is two operations. Of the
    expand step only the owner's r products per element count, since no other adapter's product
    enters the result. Where a case fits in a cache, fewer bytes than these reach memory.
    """

    bytes: int
    operations: int

    def seconds(self, copy_bytes_per_second: float, operations_per_second: float) -> float:
        """The longer of the two at these rates."""
        return max(self.bytes / copy_bytes_per_second, self.operations / operations_per_second)


class Case(NamedTuple):
    """K adapters of rank r on one layer."""

    tokens: int
    d_in: int
    d_out: int
    adapters: int
    rank: int

    def __str__(self) -> str:
        return f"{self.tokens}x{self.d_in}x{self.d_out}-{self.adapters}x{self.rank}"

    @staticmethod
    def parse(text: str) -> Case:
        """The case of a name such as "512x2048x2048-3x16".

        Raises:
            ValueError: not such a name.
        """
        found = re.fullmatch(r"(\d+)x(\d+)x(\d+)-(\d+)x(\d+)", text)
        if found is None or "0" in found.groups():
            raise ValueError(
                f"case must read TOKENSxD_INxD_OUT-KxRANK, such as {CPU_CASES[2]}; got {text!r}"
            )
        return Case(*map(int, found.groups()))

    def forward(self, dtype: str) -> Work:
        """x, A, B, base read; y written."""
        t, d_in, d_out, count, rank = self
        numbers = t * d_in + count * rank * (d_in + d_out) + 2 * t * d_out
        operations = 2 * t * rank * (count * d_in + d_out)
        return Work(numbers * DTYPES[dtype].itemsize, operations)

    def backward(self, dtype: str) -> Work:
        """Forward and backward: of the latter x, A, B, grad read, grad_x, grad_A, grad_B written.

        The gradient of base is grad. grad_s and grad_B take the owner's r products of an element
        each; grad_A and grad_x all of s.
        """
        t, d_in, d_out, count, rank = self
        numbers = 2 * t * d_in + 2 * count * rank * (d_in + d_out) + t * d_out
        operations = 4 * t * rank * (count * d_in + d_out)
        there = self.forward(dtype)
        moved = numbers * DTYPES[dtype].itemsize
        return Work(there.bytes + moved, there.operations + operations)

    def expand(self, dtype: str) -> Work:
        """Draw, expand, add: s, B, base read; y written."""
        t, _, d_out, count, rank = self
        numbers = t * count * rank + count * rank * d_out + 2 * t * d_out
        return Work(numbers * DTYPES[dtype].itemsize, 2 * t * rank * d_out)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

CPU_CASES = (
    Case(1, 4096, 4096, 3, 16),
    Case(16, 4096, 4096, 3, 16),
    Case(512, 2048, 2048, 3, 16),
    Case(2048, 4096, 4096, 3, 16),
    Case(4096, 640, 640, 2, 32),
    Case(1024, 1280, 10240, 2, 32),
    Case(512, 768, 3072, 2, 8),
    Case(512, 2048, 2048, 8, 16),
    Case(512, 2048, 2048, 8, 64),
    Case(512, 2048, 2048, 16, 32),
)
GPU_CASES = (
    Case(1, 4096, 4096, 3, 16),
    Case(16, 4096, 4096, 3, 16),
    Case(512, 4096, 4096, 3, 16),
    Case(8192, 4096, 4096, 3, 16),
    Case(8192, 4096, 14336, 3, 16),
    Case(4096, 640, 640, 2, 32),
    Case(1024, 1280, 10240, 2, 32),
    Case(8192, 4096, 4096, 8, 16),
    Case(8192, 4096, 4096, 8, 64),
    Case(8192, 4096, 4096, 16, 32),
)
# Where a GPU run, which has minutes, takes the time for peers that are slow or must be compiled.
GPU_PEER_CASES = (GPU_CASES[1], GPU_CASES[3], GPU_CASES[5], GPU_CASES[7])
# Sizes at which Triton's interpreter answers in a second: what a rehearsal runs in the GPU's place.
TINY_CASES = (Case(1, 32, 64, 3, 4), Case(16, 32, 64, 3, 4), Case(24, 32, 128, 2, 8))
MANY_ADAPTERS = CPU_CASES[9]
LARGE = CPU_CASES[3]
ONE_TOKEN = CPU_CASES[0]
EXPANDED = (GPU_CASES[3], GPU_CASES[4])  # where draw + expand + add has a target
WHOLE_LAYER = GPU_CASES[3]
CASES = {"cpu": CPU_CASES, "gpu": GPU_CASES, "rehearsal": TINY_CASES}

# How time grows with one size while the others stay: tokens, d_out, K, rank; and with threads, of
# which the machine decides how many there are.
_SCALED = Case(256, 1024, 1024, 3, 16)
AXES = {
    "tokens": tuple(_SCALED._replace(tokens=n) for n in (64, 256, 1024, 4096)),
    "d_out": tuple(_SCALED._replace(d_out=n) for n in (512, 1024, 2048, 4096, 8192)),
    "K": tuple(_SCALED._replace(adapters=n) for n in (2, 4, 8, 16, 32, 64)),
    "rank": tuple(_SCALED._replace(rank=n) for n in (4, 8, 16, 32, 64, 128)),
    "threads": (),
}
THREADS_CASE = _SCALED._replace(tokens=1024)
# Memory against tokens.
MEMORY_TOKENS = tuple(_SCALED._replace(tokens=n) for n in (256, 1024, 4096, 16384))


def size_on(axis: str, case: Case) -> int:
    """A case's place on an axis of sizes."""
    return int(getattr(case, "adapters" if axis == "K" else axis))


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case, all of one dtype.

    Attributes:
        x: (tokens, d_in), standard normal.
        lora_A, lora_B: K tensors each, (r, d_in) and (d_out, r): the latter not at their zeros of
            initialisation.
        base, grad: (tokens, d_out), standard normal.
        seed: of the masks, as the device's users hold it.
    """

    case: Case
    x: Tensor
    lora_A: list[Tensor]
    lora_B: list[Tensor]
    base: Tensor
    grad: Tensor
    seed: int | Tensor = SEED

    @property
    def dtype(self) -> torch.dtype:
        """Of every tensor."""
        return self.x.dtype

    @property
    def nbytes(self) -> int:
        """Of all tensors together."""
        return sum(t.nbytes for t in (self.x, self.base, self.grad, *self.lora_A, *self.lora_B))

    def copy(self) -> Inputs:
        """The same values in buffers of their own."""
        A, B = ([t.clone() for t in factors] for factors in (self.lora_A, self.lora_B))
        x, base, grad = (t.clone() for t in (self.x, self.base, self.grad))
        return replace(self, x=x, lora_A=A, lora_B=B, base=base, grad=grad)

    def first_rows(self, count: int) -> Inputs:
        """The same with fewer tokens; shares its memory."""
        x, base, grad = self.x[:count], self.base[:count], self.grad[:count]
        return replace(self, case=self.case._replace(tokens=x.shape[0]), x=x, base=base, grad=grad)


def make(case: Case, dtype: torch.dtype, device: Device | None = None) -> Inputs:
    """The tensors of a case, the same values at every call and on every device."""
    generator = torch.Generator().manual_seed(SEED)
    place = torch.device("cpu") if device is None else device.torch_device

    def normal(rows: int, cols: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(rows, cols, generator=generator) * scale).to(dtype).to(place)

    adapters = range(case.adapters)
    return Inputs(
        case,
        normal(case.tokens, case.d_in),
        [normal(case.rank, case.d_in, case.d_in**-0.5) for _ in adapters],
        [normal(case.d_out, case.rank, B_SCALE) for _ in adapters],
        normal(case.tokens, case.d_out),
        normal(case.tokens, case.d_out),
        SEED if device is None else device.seed(SEED),
    )
