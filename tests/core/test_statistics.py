"""Masks as random numbers: frequencies, independence, and the mean of many merges.

All seeds are fixed, so these tests always give one answer. Levels are those at which chance alone
would fail one run in a million.
"""

from __future__ import annotations

import math

import pytest
import torch
from servers import Server
from torch import Tensor

from lora_ortho import fused_ortho_lora, mask_stream
from lora_ortho.reference import stick_breaking

LEVEL = 1e-6
UNEQUAL = [0.9, 0.5, 0.75, 0.97]


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """The chance that counts deviate at least so far from what is expected of them."""
    statistic = ((counts.double() - expected) ** 2 / expected).sum()
    freedom = torch.tensor((counts.numel() - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def largest_z(level: float, trials: int) -> float:
    """The normal deviate that one of so many trials exceeds by chance at this level."""
    tail = torch.tensor(1 - level / (2 * trials), dtype=torch.float64)
    return float(torch.special.ndtri(tail))


def test_draws_are_uniform() -> None:
    u = mask_stream.draws(2, range(1000), range(4096))
    counts = torch.bincount(u.flatten(), minlength=65536)
    assert counts.numel() == 65536
    assert chi_square(counts, torch.tensor(u.numel() / 65536).double()) > LEVEL
    positions = torch.stack([torch.bincount(u[:, k::8].flatten() >> 8) for k in range(8)])
    assert chi_square(positions, torch.tensor(u.numel() / 8 / 256).double()) > LEVEL


@pytest.mark.parametrize("p", [[1 / 2] * 2, [2 / 3] * 3, [6 / 7] * 7, UNEQUAL], ids=len)
def test_frequencies_of_owners(p: list[float]) -> None:
    """Chi-square for each adapter alone and for all with nobody."""
    owner = mask_stream.winners(99, range(3000), range(1024), p)
    _, keep = mask_stream.thresholds(p, "orthogonal")
    total = owner.numel()
    for j, q in enumerate(keep):
        kept = int((owner == j).sum())
        pair = torch.tensor([kept, total - kept])
        assert chi_square(pair, torch.tensor([q * total, (1 - q) * total]).double()) > LEVEL
    nobody = 1 - math.fsum(keep)
    counts = torch.bincount(owner.flatten() + 1, minlength=len(p) + 1)
    expected = torch.tensor([nobody * total, *(q * total for q in keep)]).double()
    if nobody == 0:
        assert int(counts[0]) == 0
        counts, expected = counts[1:], expected[1:]
    assert chi_square(counts, expected) > LEVEL


def test_frequencies_of_independent_masks() -> None:
    """Each adapter's and each pair's: the masks of two lane sets are independent."""
    thresholds, keep = mask_stream.thresholds(UNEQUAL, "dropout")
    masks = mask_stream.masks(7, range(2000), range(1024), thresholds, "dropout")
    total = masks[0].numel()
    for i, first in enumerate(masks):
        for j, second in enumerate(masks):
            q = keep[i] if i == j else keep[i] * keep[j]
            both = int((first & second).sum())
            pair = torch.tensor([both, total - both])
            assert chi_square(pair, torch.tensor([q * total, (1 - q) * total]).double()) > LEVEL


@pytest.mark.parametrize("axis", ["row", "col", "stream", "sample", "seed"])
def test_neighbours_are_independent(axis: str) -> None:
    """The owners of an element and of its neighbour along each coordinate."""
    p, rows, cols = [2 / 3] * 3, range(1000), range(1000)
    first = mask_stream.winners(1, rows, cols, p)
    second = {
        "row": lambda: mask_stream.winners(1, range(1, 1001), cols, p),
        "col": lambda: mask_stream.winners(1, rows, range(1, 1001), p),
        "stream": lambda: mask_stream.winners(1, rows, cols, p, stream=1),
        "sample": lambda: mask_stream.winners(1, rows, cols, p, sample=1),
        "seed": lambda: mask_stream.winners(2, rows, cols, p),
    }[axis]()
    _, keep = mask_stream.thresholds(p, "orthogonal")
    counts = torch.bincount((3 * first + second).flatten(), minlength=9)
    q = torch.tensor(keep).double()
    assert chi_square(counts, (q[:, None] * q).flatten() * first.numel()) > LEVEL


@pytest.mark.parametrize("p", [[2 / 3] * 3, UNEQUAL], ids=len)
def test_the_papers_construction_has_the_same_distribution(p: list[float]) -> None:
    """Two samples, one by stick-breaking and one from the mask stream: one table of counts."""
    shape = (2000, 1024)
    generator = torch.Generator().manual_seed(5)
    broken = stick_breaking(p, shape, generator)
    assert int(torch.stack(broken).sum(0).max()) == 1
    owner = mask_stream.winners(31, range(shape[0]), range(shape[1]), p)
    ours = torch.stack([(owner == j).sum() for j in range(len(p))])
    theirs = torch.stack([mask.sum() for mask in broken])
    total = owner.numel()
    table = torch.stack([ours, theirs])
    table = torch.cat([table, total - table.sum(1, keepdim=True)], dim=1)
    table = table[:, table.sum(0) > 0]
    expected = table.sum(0, keepdim=True).double().expand(2, -1) / 2
    statistic = float(((table - expected) ** 2 / expected).sum())
    freedom = torch.tensor((table.shape[1] - 1) / 2).double()
    assert float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2).double())) > LEVEL


@pytest.mark.parametrize("method", ["orthogonal", "dropout"])
def test_the_mean_over_draws_is_the_direct_merge(server: Server, method: str) -> None:
    """16384 rows with the same x are as many draws; no element strays beyond chance."""
    torch.set_num_threads(2)
    draws, d_in, d_out, p = 16384, 8, 192, UNEQUAL[:3]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, d_in, generator=generator)
    lora_A = [torch.randn(4, d_in, generator=generator) for _ in p]
    lora_B = [torch.randn(d_out, 4, generator=generator) for _ in p]
    arguments = {"p": p, "weights": [1.0, -0.5, 2.0], "scaling": [2.0, 1.0, 0.5], "seed": 77}
    direct = fused_ortho_lora(x, lora_A, lora_B, method="direct", **arguments, backend="reference")
    y = fused_ortho_lora(
        x.expand(draws, d_in), lora_A, lora_B, method=method, **arguments, backend=server.backend
    ).double()
    error = y.mean(0) - direct[0].double()
    z = error / (y.std(0) / draws**0.5)
    assert float(z.abs().max()) < largest_z(LEVEL, d_out)
    assert float(z.abs().max()) > 1.5  # an error of nothing at all would be no draw
