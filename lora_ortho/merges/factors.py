"""What the merges of one layer share: rates and gains of its adapters, and their concatenation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_ortho.mask_stream import default_rates
from lora_ortho.module import Adapter
from lora_ortho.problem import Rule, check_factors, finite_numbers


def rule_of(adapters: Sequence[Adapter], masks: str) -> Rule:
    """Intervals and gains of one layer's adapters; a rate of None is 1 - 1/K.

    Args:
        masks: how they are drawn, as `mask_stream.thresholds` names it.
    Raises:
        TypeError, ValueError: adapters that do not fit one another, weights that are not finite,
            rates that cannot be drawn so.
    """
    for j, adapter in enumerate(adapters):
        if not isinstance(adapter, Adapter):
            raise TypeError(f"adapters[{j}] must be an Adapter, got {type(adapter).__name__}")
    if not adapters:
        raise ValueError("adapters must hold at least one Adapter, got none")
    count = len(adapters)
    check_factors([a.lora_A for a in adapters], [a.lora_B for a in adapters])
    rule = Rule.make(count, rates_of(adapters), [a.scaling for a in adapters], masks)
    finite_numbers("weights", [a.weight for a in adapters], count)
    return rule


def rates_of(adapters: Sequence[Adapter]) -> list[float]:
    """The dropout rates of a layer's K adapters; None among them is 1 - 1/K."""
    pairs = zip(adapters, default_rates(len(adapters)), strict=True)
    return [default if a.p is None else float(a.p) for a, default in pairs]


def gains_of(adapters: Sequence[Adapter], rule: Rule) -> list[float]:
    """Merge weight times scaling over keep probability, of each adapter."""
    return [float(a.weight) * gain for a, gain in zip(adapters, rule.gains, strict=True)]


def wide_dtype(adapters: Sequence[Adapter]) -> torch.dtype:
    """What holds gain times factor without a loss that matters."""
    factors = [t for a in adapters for t in (a.lora_A, a.lora_B)]
    return torch.float64 if any(t.dtype == torch.float64 for t in factors) else torch.float32


def concatenate(adapters: Sequence[Adapter], rows: Sequence[Tensor]) -> Adapter:
    """One adapter of all: float64 rows[j] (d_out,) times the rows of lora_B_j and the bias."""
    dtype = wide_dtype(adapters)
    lora_A = torch.cat([a.lora_A.detach().to(dtype) for a in adapters])
    pairs = list(zip(rows, adapters, strict=True))
    lora_B = torch.cat([(row[:, None] * a.lora_B.detach()).to(dtype) for row, a in pairs], dim=1)
    biases = [row * a.bias.detach() for row, a in pairs if a.bias is not None]
    bias = torch.stack(biases).sum(dim=0).to(dtype) if biases else None
    names = [a.name for a in adapters if a.name is not None]
    return Adapter(lora_A, lora_B, bias=bias, name="+".join(names) or None)
