"""The direct merge: the factors side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_ortho.merges.factors import concatenate, gains_of, rule_of
from lora_ortho.merges.registry import Gives, register
from lora_ortho.module import Adapter


@register(
    gives=Gives.FACTORS,
    when="the adapters hardly overlap: their exact sum, task arithmetic",
    source="https://arxiv.org/abs/2212.04089",
)
def direct(adapters: Sequence[Adapter]) -> Adapter:
    """Σ_j w_j c_j (B_j A_j x + bias_j) as one adapter of rank Σ r_j: the factors side by side.

    Args:
        adapters: of one layer; their scaling and weight count, p does not.
    Returns:
        lora_A (Σ r, d_in) and lora_B (d_out, Σ r) in float32 (float64 where a factor has it), with
        scaling and weight in lora_B; a bias where an adapter has one.
    Raises:
        TypeError, ValueError: adapters that do not fit one another.
    """
    gains = gains_of(adapters, rule_of(adapters, "direct"))
    B = adapters[0].lora_B
    rows = [B.new_full(B.shape[:1], gain, dtype=torch.float64) for gain in gains]
    return concatenate(adapters, rows)
