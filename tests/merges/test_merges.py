"""Merges that are weights: against the op at row 0, and against dense arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lora_ortho import Adapter, fused_ortho_lora, mask_stream
from lora_ortho.merges import method_named
from lora_ortho.merges.low_rank import low_rank, reduce_rank
from lora_ortho.merges.methods.direct import direct
from lora_ortho.merges.methods.element_disjoint import element_disjoint
from lora_ortho.merges.methods.ortho_rows import ortho_rows

D_IN, D_OUT = 24, 40


def adapters(*ranks: int, dtype: torch.dtype = torch.float64, bias: bool = False) -> list[Adapter]:
    """Random adapters of one layer with scaling, weight and rate of their own."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    made = []
    for j, rank in enumerate(ranks):
        A, B = normal(rank, D_IN), normal(D_OUT, rank)
        b = normal(D_OUT) if bias and j != 1 else None
        made.append(Adapter(A, B, 0.5 + j, 1.5 - j, 0.5 + 0.1 * j, b, f"a{j}"))
    return made


def delta(adapter: Adapter) -> Tensor:
    """(d_out, d_in + 1): the weight of an adapter, its bias in the last column."""
    product = adapter.lora_B.double() @ adapter.lora_A.double()
    bias = torch.zeros(len(product)) if adapter.bias is None else adapter.bias
    gain = adapter.scaling * adapter.weight
    return gain * torch.cat([product, bias.double()[:, None]], dim=1)


@pytest.mark.parametrize("bias", [False, True])
def test_direct_is_the_sum(bias: bool) -> None:
    made = adapters(3, 5, bias=bias)
    merged = direct(made)
    assert merged.lora_A.shape == (8, D_IN)
    assert (merged.scaling, merged.weight, merged.name) == (1.0, 1.0, "a0+a1")
    assert (merged.bias is not None) == bias
    torch.testing.assert_close(delta(merged), sum(map(delta, made)), rtol=1e-12, atol=1e-12)


def test_direct_of_one_adapter_keeps_its_factors() -> None:
    """Nothing is rounded where nothing has to be: A as it was, B times an exact gain."""
    (wide,) = adapters(4)
    one = Adapter(wide.lora_A.bfloat16(), wide.lora_B.bfloat16(), scaling=2.0)
    merged = direct([one])
    assert merged.lora_A.dtype == torch.float32
    assert torch.equal(merged.lora_A, one.lora_A.float())
    assert torch.equal(merged.lora_B, 2 * one.lora_B.float())


@pytest.mark.parametrize("bias", [False, True])
def test_ortho_rows_is_the_run_time_merge_of_row_0(bias: bool) -> None:
    made = adapters(3, 5, 2, bias=bias)
    made = [Adapter(a.lora_A, a.lora_B, a.scaling, a.weight, 0.7, a.bias, a.name) for a in made]
    merged = ortho_rows(made, seed=11, stream=7, sample=2, strata=5)
    x = torch.randn(5, D_IN, dtype=torch.float64)
    one = torch.ones(5, 1, dtype=torch.float64)
    ours = torch.cat([x, one], 1) @ delta(merged).T
    A = [torch.block_diag(a.lora_A, one[:1]) for a in made]  # type: ignore[no-untyped-call]
    zeros = torch.zeros(D_OUT, dtype=torch.float64)
    B = [torch.cat([a.lora_B, (zeros if a.bias is None else a.bias)[:, None]], 1) for a in made]
    for row in range(5):  # every call has a row 0 only
        expected = fused_ortho_lora(
            torch.cat([x, one], 1)[row],
            A,
            B,
            p=[0.7] * 3,
            scaling=[a.scaling for a in made],
            weights=[a.weight for a in made],
            seed=11,
            stream=7,
            sample=2,
            strata=5,
            backend="reference",
        )
        torch.testing.assert_close(ours[row], expected, rtol=1e-12, atol=1e-12)


def test_ortho_rows_are_disjoint_and_all_used() -> None:
    merged = ortho_rows([*adapters(3), *adapters(5)], seed=0)
    first, second = merged.lora_B[:, :3].any(dim=1), merged.lora_B[:, 3:].any(dim=1)
    assert bool((first ^ second).all())  # p = 1/2 each: nobody's rows do not exist
    assert 0 < int(first.sum()) < D_OUT


def test_the_mean_of_a_block_of_strata_is_the_direct_merge() -> None:
    made = [replace(adapter, p=0.5) for adapter in adapters(3, 5)]
    rows = [delta(ortho_rows(made, seed=4, sample=sample, strata=2)) for sample in (6, 7)]
    elements = [element_disjoint(made, seed=4, sample=sample, strata=2)[0] for sample in (6, 7)]
    for drawn in (rows, elements):
        assert not torch.equal(drawn[0], drawn[1])
    exact = delta(direct(made))
    torch.testing.assert_close(torch.stack(rows).mean(0), exact, rtol=1e-12, atol=1e-12)
    exact = exact[:, : elements[0].shape[1]]
    torch.testing.assert_close(torch.stack(elements).mean(0), exact, rtol=1e-12, atol=1e-12)


def test_ortho_rows_average_to_the_direct_merge() -> None:
    made = adapters(3, 2)
    draws = [delta(ortho_rows(made, seed=s)) for s in range(3000)]
    mean, exact = torch.stack(draws).mean(0), delta(direct(made))
    spread = torch.stack(draws).std(0) / 3000**0.5
    assert float(((mean - exact).abs() / (spread + 1e-12)).max()) < 5.0


def test_element_disjoint_elements_have_one_owner() -> None:
    made = adapters(3, 5, bias=True)
    weight, bias = element_disjoint(made, seed=5, stream=9)
    assert bias is not None
    owner = mask_stream.winners(5, range(D_OUT), range(D_IN + 1), [0.5, 0.6], stream=9)
    _, keep = mask_stream.thresholds([0.5, 0.6], "orthogonal")
    expected = sum(torch.where(owner == j, delta(a) / keep[j], 0.0) for j, a in enumerate(made))
    joined = torch.cat([weight, bias[:, None]], dim=1)
    torch.testing.assert_close(joined, expected, rtol=1e-12, atol=1e-12)
    assert bool((joined[owner == -1] == 0).all())


def test_reduce_rank_is_the_best_of_its_rank() -> None:
    """The error is that of the truncated SVD of the dense product, and is what it says."""
    full = direct(adapters(6, 5))
    reduced, error = reduce_rank(full, 4)
    exact = full.lora_B @ full.lora_A
    sizes = torch.linalg.svdvals(exact)
    assert reduced.lora_A.shape == (4, D_IN)
    measured = float((exact - reduced.lora_B @ reduced.lora_A).norm() / exact.norm())
    best = float(sizes[4:].norm() / sizes.norm())
    assert measured == pytest.approx(best, rel=1e-10)
    assert error == pytest.approx(best, rel=1e-10)
    assert reduce_rank(full, 11) == (full, 0.0)


def test_reduce_rank_of_nothing() -> None:
    zero = Adapter(torch.zeros(3, D_IN), torch.zeros(D_OUT, 3))
    reduced, error = reduce_rank(zero, 2)
    assert error == 0.0
    assert not reduced.lora_B.any()


def test_low_rank_of_a_dense_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(90, 70, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(80, 70, generator=generator, dtype=torch.float64))[0]
    sizes = 0.8 ** torch.arange(70, dtype=torch.float64)
    dense = u * sizes @ v.T
    A, B, error = low_rank(dense, 8, seed=1)
    best = float(sizes[8:].norm() / sizes.norm())
    assert best * (1 - 1e-9) <= error <= best * 1.001
    assert error == pytest.approx(float((dense - B @ A).norm() / dense.norm()), rel=1e-9)
    assert torch.equal(low_rank(dense, 8, seed=1)[0], A)
    assert low_rank(dense, 500)[2] < 1e-12


@pytest.mark.parametrize("method", ["orthogonal", "dropout"])
def test_stochastic_merges_are_no_weights(method: str) -> None:
    with pytest.raises(ValueError, match=f'{method}.*no weight.*"ortho_rows".*"direct"'):
        method_named(method)


def test_by_name() -> None:
    made = adapters(2, 2)
    place = {"seed": 4, "stream": 3, "sample": 1, "strata": 6}
    assert torch.equal(method_named("direct").factors(made, **place).lora_B, direct(made).lora_B)
    rows = method_named("ortho_rows").factors(made, **place)
    assert torch.equal(rows.lora_B, ortho_rows(made, **place).lora_B)
    weight, _ = method_named("element_disjoint").difference(made, **place)
    assert torch.equal(weight, element_disjoint(made, **place)[0])
    weight, _ = method_named("ortho_rows").difference(made, **place)
    assert torch.equal(weight, rows.lora_B @ rows.lora_A)
    with pytest.raises(ValueError, match="gives a dense weight, which no adapter holds"):
        method_named("element_disjoint").factors(made, **place)
    with pytest.raises(ValueError, match="method must be one of direct, element_disjoint, ortho"):
        method_named("ties")
    with pytest.raises(TypeError, match="'direct' has no parameter 'density'; it has none"):
        method_named("direct").factors(made, **place, density=0.5)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="at least one"):
        direct([])
    with pytest.raises(TypeError, match=r"adapters\[0\] must be an Adapter, got int"):
        direct([3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="rank must be at least 1"):
        reduce_rank(adapters(2)[0], 0)
    with pytest.raises(ValueError, match="smallest admissible rate"):
        ortho_rows([Adapter(torch.ones(1, 2), torch.ones(2, 1), p=0.1)] * 2, seed=0)
    with pytest.raises(TypeError, match="delta must be"):
        low_rank(torch.ones(3, dtype=torch.int64), 1)
