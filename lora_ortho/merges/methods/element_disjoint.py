"""Disjoint elements: every element of the weight belongs to one adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_ortho import mask_stream
from lora_ortho.merges.factors import gains_of, rates_of, rule_of, wide_dtype
from lora_ortho.merges.registry import Gives, register
from lora_ortho.module import Adapter
from lora_ortho.problem import Place

MASKS = "orthogonal"


@register(
    gives=Gives.WEIGHT,
    masks=MASKS,
    when="as ortho_rows, and the result may be a full weight: owners change with every element",
    source="ours, with the masks of https://arxiv.org/abs/2510.03262",
)
def element_disjoint(
    adapters: Sequence[Adapter], *, seed: int, stream: int = 0, sample: int = 0, strata: int = 1
) -> tuple[Tensor, Tensor | None]:
    """Σ_j gain_j M_j ⊙ [B_j A_j, bias_j]: every element of the weight belongs to one adapter.

    Row o of the draw is output feature o, column i input feature i; the bias is column d_in. Not of
    low rank.

    Returns:
        The difference of the weight (d_out, d_in), and that of the bias (d_out,) where an adapter
        has one, in float32 (float64 where a factor has it).
    Raises:
        TypeError, ValueError: as for `ortho_rows`.
    """
    rule = rule_of(adapters, MASKS)
    d_out, d_in = adapters[0].lora_B.shape[0], adapters[0].lora_A.shape[1]
    Place(stream, sample, strata).checked(d_out, d_in + 1)
    dtype, device = wide_dtype(adapters), adapters[0].lora_B.device
    joined = torch.zeros(d_out, d_in + 1, dtype=dtype, device=device)
    place = {"stream": stream, "sample": sample, "strata": strata}
    rows, cols, p = range(d_out), range(d_in + 1), rates_of(adapters)
    owner = mask_stream.winners(seed, rows, cols, p, **place).to(device)
    for j, (gain, adapter) in enumerate(zip(gains_of(adapters, rule), adapters, strict=True)):
        delta = joined.new_zeros(d_out, d_in + 1)
        delta[:, :-1] = adapter.lora_B.to(dtype) @ adapter.lora_A.to(dtype)
        if adapter.bias is not None:
            delta[:, -1] = adapter.bias
        joined += torch.where(owner == j, gain * delta, 0)
    has_bias = any(adapter.bias is not None for adapter in adapters)
    return joined[:, :-1].contiguous(), joined[:, -1].contiguous() if has_bias else None
