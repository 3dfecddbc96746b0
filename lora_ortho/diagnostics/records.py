"""What `inspect` reports: plain records."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .factors import Overlap


@dataclass(frozen=True)
class Pair:
    """Two adapters in one layer.

    Attributes:
        layer, first, second: names.
        outputs: overlap of the column spaces of the two updates c·B·A.
        columns: overlap of the column spaces of the two lora_B, where an lora_A has not lost any.
        inputs: overlap of the row spaces of the two updates: do they read the same features?
        alignment: ⟨ΔW_1, ΔW_2⟩ / (‖ΔW_1‖ ‖ΔW_2‖): 1 same direction, -1 opposite, 0 neither.
    """

    layer: str
    first: str
    second: str
    outputs: Overlap
    columns: Overlap
    inputs: Overlap
    alignment: float


@dataclass(frozen=True)
class Interference:
    """What one adapter does to inputs of another's task in one layer.

    Attributes:
        layer: name.
        adapter: the one that acts.
        task: the adapter whose inputs these are.
        ratio: ‖c B A X‖ of `adapter` over that of `task`, X the inputs of `task`; infinite
            where the task's own output is zero.
    """

    layer: str
    adapter: str
    task: str
    ratio: float


@dataclass(frozen=True)
class Layer:
    """One adapted layer.

    Attributes:
        name: qualified name in the model.
        sizes: (d_in, d_out) of its first adapter.
        adapters: names of those that adapt it, in merge order.
        ranks: ranks of their factors.
        norms: Frobenius norms of their updates c·B·A.
        smallest_p: the smallest rate that all of them may have in the orthogonal merge.
    """

    name: str
    sizes: tuple[int, int]
    adapters: tuple[str, ...]
    ranks: tuple[int, ...]
    norms: tuple[float, ...]
    smallest_p: float


@dataclass(frozen=True)
class Summary:
    """One adapter over all its layers.

    Attributes:
        name, source, base_model: as `load_adapter` found them.
        layers: how many it adapts.
        parameters: how many numbers it holds.
        ranks, scalings: smallest and largest.
        dtypes: of its factors.
        biased: layers with a bias of their own.
        norm: root of the sum of its squared updates.
        shared_layers: how many of its layers another adapter adapts too.
        shared_norm: its norm over those.
        strongest_in: in how many of those its update is the largest.
    """

    name: str
    source: str
    base_model: str | None
    layers: int
    parameters: int
    ranks: tuple[int, int]
    scalings: tuple[float, float]
    dtypes: tuple[str, ...]
    biased: int
    norm: float
    shared_layers: int
    shared_norm: float
    strongest_in: int


@dataclass(frozen=True)
class Report:
    """All that `inspect` found.

    Attributes:
        adapters: in the order given.
        layers: in name order.
        pairs: every pair of adapters in every layer they share.
        interference: where inputs were given.
        smallest_p: the smallest rate that works for all adapters in every layer.
        dominant: the adapter whose shared_norm is at least twice every other's, at weights of 1;
            None if there is no such adapter.
        problems: why they cannot be merged; empty if they can.
        remarks: worth knowing, but no obstacle to a merge.
    """

    adapters: tuple[Summary, ...]
    layers: tuple[Layer, ...]
    pairs: tuple[Pair, ...]
    interference: tuple[Interference, ...]
    smallest_p: float
    dominant: str | None
    problems: tuple[str, ...]
    remarks: tuple[str, ...]


def by_pair(pairs: Iterable[Pair]) -> dict[tuple[str, str], list[Pair]]:
    """Pairs by the names of their two adapters, in merge order."""
    found: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        found.setdefault((pair.first, pair.second), []).append(pair)
    return found
