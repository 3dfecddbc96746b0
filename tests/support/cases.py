"""The case table: what the tests check and the benchmarks time, and the tensors of a case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

METHODS = ("orthogonal", "dropout", "direct")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "strided", "transposed", "broadcast", "misaligned")


@dataclass(frozen=True)
class Case:
    """Sizes of one call, and how its tensors lie in memory.

    Attributes:
        tokens, d_in, d_out: sizes.
        ranks: one for each adapter.
        p: dropout rates; None is 1 - 1/K.
        x, grad: a name in ``LAYOUTS``.
        base: likewise, or None for no base.
        factors: layout of lora_A and lora_B.
    """

    tokens: int
    d_in: int
    d_out: int
    ranks: tuple[int, ...]
    p: tuple[float, ...] | None = None
    x: str = "contiguous"
    base: str | None = "contiguous"
    grad: str = "contiguous"
    factors: str = "contiguous"

    def __str__(self) -> str:
        ranks = "+".join(map(str, self.ranks))
        if len(set(self.ranks)) == 1:
            ranks = f"{len(self.ranks)}x{self.ranks[0]}"
        parts = [f"{self.tokens}x{self.d_in}x{self.d_out}", ranks]
        if self.p is not None:
            parts.append(f"sum{sum(1 - p for p in self.p):.2f}")
        for name in ("x", "base", "grad", "factors"):
            layout = getattr(self, name)
            if layout != "contiguous":
                parts.append(f"{name}-{layout}")
        return "-".join(parts)


class Tensors(NamedTuple):
    """The tensors of a case. x (tokens, d_in), base and grad (tokens, d_out), weights (K,)."""

    x: Tensor
    lora_A: list[Tensor]
    lora_B: list[Tensor]
    weights: Tensor
    base: Tensor | None
    grad: Tensor


def same_rank(tokens: int, d_in: int, d_out: int, adapters: int, rank: int) -> Case:
    """A case of so many adapters of one rank."""
    return Case(tokens, d_in, d_out, (rank,) * adapters)


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values (for "broadcast": the first row everywhere) in another memory layout."""
    rows, cols = tensor.shape
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "broadcast":  # row stride 0
        first = tensor[:1] if rows else tensor.new_zeros(1, cols)
        return first.clone().expand(rows, cols)
    if layout == "transposed":
        return tensor.t().contiguous().t()
    if layout == "misaligned":  # aligned to an element, to no vector
        buffer = tensor.new_zeros(tensor.numel() + 1)
        buffer[1:] = tensor.reshape(-1)
        return buffer[1:].view(rows, cols)
    if layout == "strided":  # gaps between rows and between columns
        buffer = tensor.new_full((2 * rows + 1, 3 * cols), float("nan"))
        view = buffer[1::2, ::3][:rows]
        return view.copy_(tensor)
    raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")


def make(
    case: Case, dtype: torch.dtype, seed: int = 0, factor_dtype: torch.dtype | None = None
) -> Tensors:
    """Random tensors of a case: values of order one, drawn in float64 and rounded once."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def factor(values: Tensor) -> Tensor:
        return lay_out(values.to(factor_dtype or dtype), case.factors)

    count = len(case.ranks)
    x = lay_out(normal(case.tokens, case.d_in).to(dtype), case.x)
    lora_A = [factor(normal(r, case.d_in) / case.d_in**0.5) for r in case.ranks]
    lora_B = [factor(normal(case.d_out, r) / r**0.5) for r in case.ranks]
    weights = (1.0 + 0.25 * normal(count)).to(dtype)
    base = normal(case.tokens, case.d_out).to(dtype)
    grad = lay_out(normal(case.tokens, case.d_out).to(dtype), case.grad)
    return Tensors(
        x, lora_A, lora_B, weights, None if case.base is None else lay_out(base, case.base), grad
    )


# What the tests check: sizes that fit no vector and no tile, and every layout.
CHECKED = (
    same_rank(0, 16, 24, 3, 4),
    same_rank(1, 1, 1, 1, 1),
    same_rank(1, 64, 128, 3, 16),
    same_rank(1, 129, 1000, 2, 5),
    same_rank(2, 3, 7, 2, 1),
    same_rank(3, 40, 129, 3, 1),
    Case(5, 33, 8, (4, 1, 9)),
    Case(17, 20, 135, (3, 8, 2, 16, 1)),
    same_rank(7, 48, 127, 8, 4),
    same_rank(9, 31, 144, 16, 3),
    same_rank(6, 24, 96, 32, 2),
    same_rank(70, 64, 272, 2, 32),
    same_rank(33, 96, 300, 8, 17),
    same_rank(64, 64, 256, 3, 16),
    same_rank(130, 50, 131, 3, 8),
    same_rank(37, 72, 260, 16, 32),
    Case(19, 35, 150, (40, 3), base=None),
    # keep probabilities below 1 together, at 1, and rounding to just above it
    Case(12, 16, 140, (4, 4, 4), p=(0.9, 0.75, 0.875)),
    Case(12, 16, 140, (4, 2), p=(0.0001, 0.9999)),
    Case(12, 16, 140, (3,) * 7, p=(6 / 7,) * 7),
    Case(12, 16, 140, (5,), p=(0.0,)),
    Case(21, 40, 136, (8, 8, 8), x="strided", base="strided", grad="strided"),
    Case(21, 40, 136, (8, 8, 8), x="transposed", base="transposed", grad="transposed"),
    Case(21, 40, 136, (8, 8, 8), x="broadcast", base="broadcast", grad="broadcast"),
    Case(21, 40, 136, (8, 8, 8), x="misaligned", base="misaligned", grad="misaligned"),
    Case(21, 40, 136, (8, 3, 8), factors="strided"),
    Case(21, 40, 136, (8, 3, 8), factors="transposed", base=None),
    Case(150, 24, 264, (16,) * 16, x="broadcast", grad="broadcast"),
)
