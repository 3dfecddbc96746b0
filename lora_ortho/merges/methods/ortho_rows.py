"""Orthogonal rows: every output feature belongs to one adapter, for all tokens."""

from __future__ import annotations

from collections.abc import Sequence

from lora_ortho import mask_stream
from lora_ortho.merges.factors import concatenate, gains_of, rates_of, rule_of
from lora_ortho.merges.registry import Gives, register
from lora_ortho.module import Adapter

MASKS = "orthogonal"


@register(
    gives=Gives.FACTORS,
    masks=MASKS,
    when="the adapters disturb each other: one draw of the orthogonal merge, as an adapter",
    source="ours, with the masks of https://arxiv.org/abs/2510.03262",
)
def ortho_rows(
    adapters: Sequence[Adapter], *, seed: int, stream: int = 0, sample: int = 0, strata: int = 1
) -> Adapter:
    """Σ_j gain_j diag(m_j) (B_j A_j x + bias_j), the masks of row 0 for every token.

    What the orthogonal method adds to the token in row 0, as a weight. Each row of lora_B has
    values in the columns of at most one adapter.

    Args:
        adapters: of one layer; p None is 1 - 1/K.
        seed, stream, sample, strata: coordinates of the draw, see `mask_stream.draws`.
    Returns:
        As for `direct`, with gain and mask in lora_B.
    Raises:
        TypeError, ValueError: adapters that do not fit one another, Σ(1 - p) > 1.
    """
    rule = rule_of(adapters, MASKS)
    cols = range(adapters[0].lora_B.shape[0])
    place = {"stream": stream, "sample": sample, "strata": strata}
    owner = mask_stream.winners(seed, range(1), cols, rates_of(adapters), **place)[0]
    device = adapters[0].lora_B.device
    gains = gains_of(adapters, rule)
    rows = [gain * (owner == j).to(device).double() for j, gain in enumerate(gains)]
    return concatenate(adapters, rows)
