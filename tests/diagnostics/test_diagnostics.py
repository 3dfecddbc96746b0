"""Diagnostics against full matrices, and against cases whose answer is known by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import small_model
from torch import Tensor, nn

from lora_ortho import Adapter
from lora_ortho.adapters import LoadedAdapter
from lora_ortho.diagnostics import Overlap, collect_inputs, factorise, inspect

D_IN, D_OUT = 13, 17


def made(name: str, layers: dict[str, Adapter], base: str | None = "base") -> LoadedAdapter:
    return LoadedAdapter(name, layers, Path(name), base)


def random_adapter(rank: int, seed: int, scaling: float = 0.7, d_out: int = D_OUT) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        torch.randn(rank, D_IN, generator=generator),
        torch.randn(d_out, rank, generator=generator),
        scaling=scaling,
    )


def full(adapter: Adapter) -> Tensor:
    product: Tensor = adapter.lora_B.double() @ adapter.lora_A.double()
    return product * adapter.scaling


def column_basis(matrix: Tensor) -> Tensor:
    u, values, _ = torch.linalg.svd(matrix)
    basis: Tensor = u[:, : int((values > 1e-10 * values.max()).sum())]
    return basis


def pair_of(one: Adapter, two: Adapter) -> Any:
    report = inspect([made("one", {"a": one}), made("two", {"a": two})])
    assert report.problems == ()
    (pair,) = report.pairs
    return pair


@pytest.mark.parametrize(("r1", "r2"), [(1, 1), (2, 5), (4, 4), (9, 3)])
def test_pair_equals_full_matrices(r1: int, r2: int) -> None:
    one, two = random_adapter(r1, 1), random_adapter(r2, 2, scaling=-1.5)
    pair = pair_of(one, two)
    wanted = torch.linalg.svdvals(column_basis(full(one)).T @ column_basis(full(two)))
    assert pair.outputs.cosines == pytest.approx(wanted.tolist(), abs=1e-12)
    rows = torch.linalg.svdvals(column_basis(full(one).T).T @ column_basis(full(two).T))
    assert pair.inputs.cosines == pytest.approx(rows.tolist(), abs=1e-12)
    inner = (full(one) * full(two)).sum() / (full(one).norm() * full(two).norm())
    assert pair.alignment == pytest.approx(float(inner), abs=1e-12)
    assert factorise(one).norm == pytest.approx(float(full(one).norm()), rel=1e-12)
    assert pair.outputs.share == pytest.approx(float((wanted**2).mean()), rel=1e-12)


def test_factorisation_gives_the_update_back() -> None:
    adapter = random_adapter(4, 3)
    part = factorise(adapter)
    assert torch.allclose(part.Q @ part.C @ part.P.T, full(adapter), atol=1e-12)
    for basis in (part.Q, part.P, part.outputs, part.inputs):
        assert torch.allclose(basis.T @ basis, torch.eye(4, dtype=torch.float64), atol=1e-12)


def test_same_and_orthogonal_spaces() -> None:
    eye = torch.eye(D_OUT)
    one = Adapter(torch.randn(3, D_IN), eye[:, :3])
    pair = pair_of(one, Adapter(torch.randn(2, D_IN), eye[:, 3:5]))
    assert pair.outputs.cosines == (0.0, 0.0)
    assert pair.alignment == 0.0
    pair = pair_of(one, Adapter(-one.lora_A, eye[:, :3]))
    assert pair.outputs.cosines == pytest.approx((1.0, 1.0, 1.0), abs=1e-12)
    assert pair.outputs.share == pytest.approx(1.0)
    assert pair.alignment == pytest.approx(-1.0)


def test_update_can_span_less_than_its_factor() -> None:
    """lora_A of rank 1 leaves one direction of the two that lora_B has."""
    eye = torch.eye(D_OUT)
    row = torch.randn(1, D_IN)
    one = Adapter(torch.cat([row, row]), eye[:, :2])  # output direction e0 + e1
    two = Adapter(torch.randn(1, D_IN), (eye[:, :1] - eye[:, 1:2]))
    pair = pair_of(one, two)
    assert pair.columns.cosines == pytest.approx((1.0,))
    assert pair.outputs.cosines == pytest.approx((0.0,), abs=1e-12)


def test_zero_update_overlaps_with_nothing() -> None:
    one = random_adapter(2, 1)
    report = inspect(
        [made("one", {"a": one}), made("no", {"a": replace(one, lora_B=0 * one.lora_B)})]
    )
    (pair,) = report.pairs
    assert pair.outputs == Overlap((), 0.0, 0.0)
    assert pair.alignment == 0.0
    assert report.adapters[1].norm == 0.0
    assert "no changes nothing: its updates are all zero" in report.remarks


def test_chance_is_the_mean_over_random_subspaces() -> None:
    shares = []
    for seed in range(400):
        pair = pair_of(random_adapter(3, 2 * seed), random_adapter(5, 2 * seed + 1))
        shares.append(pair.outputs.share)
    values = torch.tensor(shares)
    z = (values.mean() - pair.outputs.chance) / (values.std() / math.sqrt(len(shares)))
    assert pair.outputs.chance == 5 / D_OUT
    assert abs(float(z)) < 5


def test_interference_equals_full_matrices() -> None:
    adapters = {name: random_adapter(2, seed) for seed, name in enumerate(["one", "two", "three"])}
    loaded = [made(name, {"a": adapter}) for name, adapter in adapters.items()]
    x = torch.randn(11, D_IN)
    found = {
        (i.adapter, i.task): i.ratio for i in inspect(loaded, inputs={"two": {"a": x}}).interference
    }
    own = (x.double() @ full(adapters["two"]).T).norm()
    for name in ("one", "three"):
        wanted = float((x.double() @ full(adapters[name]).T).norm() / own)
        assert found.pop((name, "two")) == pytest.approx(wanted, rel=1e-12)
    assert not found


def test_summary_and_layers() -> None:
    one = {"a": random_adapter(2, 1), "b": random_adapter(4, 2, scaling=2.0)}
    two = {"a": replace(random_adapter(3, 3), bias=torch.ones(D_OUT))}
    report = inspect([made("one", one), made("two", two, base="other")])
    first, second = report.adapters
    assert (first.layers, first.ranks, first.scalings) == (2, (2, 4), (0.7, 2.0))
    assert first.parameters == (2 + 4) * (D_IN + D_OUT)
    assert second.parameters == 3 * (D_IN + D_OUT) + D_OUT
    assert second.biased == 1
    assert first.norm == pytest.approx(math.hypot(*(float(full(a).norm()) for a in one.values())))
    assert [(layer.name, layer.adapters, layer.smallest_p) for layer in report.layers] == [
        ("a", ("one", "two"), 0.5),
        ("b", ("one",), 0.0),
    ]
    assert report.smallest_p == 0.5
    assert "two leaves 1 of 2 layers alone" in report.remarks
    assert "they name different base models (one: base, two: other)" in report.remarks


def test_sizes_that_differ_are_a_problem() -> None:
    wide = made("wide", {"a": random_adapter(2, 2, d_out=D_OUT + 1)})
    report = inspect([made("one", {"a": random_adapter(2, 1)}), wide])
    assert report.problems == ("a: sizes differ: one 13 to 17, wide 13 to 18",)
    assert report.pairs == ()


def test_same_factors_and_no_common_layer_are_remarked() -> None:
    one = made("one", {"a": random_adapter(2, 1)})
    remarks = inspect([one, replace(one, name="copy")]).remarks
    assert remarks == ("one and copy hold the same factors",)
    remarks = inspect([one, made("other", {"b": random_adapter(2, 1)})]).remarks
    assert "one and other share no layer: nothing to interfere" in remarks


def test_rates_are_checked_where_adapters_meet() -> None:
    adapters = [
        made(name, {name: random_adapter(1, 1), "all": random_adapter(1, 2)}) for name in "abc"
    ]
    assert inspect(adapters, p=[2 / 3] * 3).problems == ()
    (problem,) = inspect(adapters, p=[0.5, 0.5, 0.75]).problems
    assert problem == (
        "p: 1 - p sums to 1.25 in all, the orthogonal merge needs at most 1; "
        "a rate of 0.666667 for each of its 3 adapters works"
    )
    apart = [made(name, {name: random_adapter(1, 1)}) for name in "ab"]
    assert inspect(apart, p=[0.1, 0.2]).problems == ()  # they never meet
    (problem,) = inspect(adapters, p=[0.5, 0.5, 1 - 1e-9]).problems
    assert problem.startswith("p[2]: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": [0.5]}, "p must have a rate for each of 2 adapters, got 1"),
        ({"p": [0.5, 1.0]}, r"p\[1\] must be a dropout rate in \[0, 1\), got 1.0"),
        ({"inputs": {"three": {}}}, "inputs: 'three' is not among the adapters one, two"),
        ({"inputs": {"one": {"b": torch.ones(1, 1)}}}, "adapter 'one' has no layer 'b'"),
        (
            {"inputs": {"one": {"a": torch.ones(2, 3)}}},
            r"\(samples, 13\), got torch.float32 \(2, 3\)",
        ),
        ({"inputs": {"one": {"a": torch.full((1, D_IN), math.nan)}}}, "holds NaN"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    adapters = [made("one", {"a": random_adapter(2, 1)}), made("two", {"a": random_adapter(2, 2)})]
    with pytest.raises(ValueError, match=message):
        inspect(adapters, **arguments)


def test_no_adapter_and_names_twice() -> None:
    with pytest.raises(ValueError, match="at least one adapter"):
        inspect([])
    one = made("one", {"a": random_adapter(2, 1)})
    with pytest.raises(ValueError, match="'one' twice"):
        inspect([one, one])


def test_collect_inputs() -> None:
    model: Any = small_model()
    model.forward = lambda x: model.b.c(model.a(x))
    x = torch.randn(2, 5, 3)

    def run() -> None:
        for part in x:
            model(part)

    found = collect_inputs(model, ["a", "b.c"], run, limit=7)
    assert torch.equal(found["a"], x.flatten(0, 1)[:7])
    assert torch.equal(found["b.c"], model.a(x).flatten(0, 1)[:7])
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="no layer 'd'"):
        collect_inputs(model, ["d"], run)
    model.extra = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"run\(\) did not reach 'extra'"):
        collect_inputs(model, ["a", "extra"], run)


def test_which_adapter_dominates() -> None:
    """By the norms of full matrices over the layers that are shared; the third shares none."""
    layers = {name: [random_adapter(3, seed) for seed in seeds] for name, seeds in (
        ("a", (1, 2)), ("b", (3, 4)), ("alone", (5,)),
    )}  # fmt: skip
    one = made("one", {"a": layers["a"][0], "b": layers["b"][0], "alone": layers["alone"][0]})

    def report(scale: float) -> Any:
        two = {n: replace(layers[n][1], scaling=scale * layers[n][1].scaling) for n in ("a", "b")}
        return two, inspect([one, made("two", two), made("three", {"c": random_adapter(2, 9)})])

    for scale in (0.0, 0.1, 1.0, 10.0):
        two, found = report(scale)
        for index, parts in enumerate((one.layers, two)):
            norms = [float(full(parts[name]).norm()) for name in ("a", "b")]
            summary = found.adapters[index]
            assert summary.shared_layers == 2
            assert summary.shared_norm == pytest.approx(math.hypot(*norms))
        assert found.dominant == {0.0: "one", 0.1: "one", 1.0: None, 10.0: "two"}[scale]
        stronger = [
            float(full(one.layers[name]).norm() > full(two[name]).norm()) for name in ("a", "b")
        ]
        assert found.adapters[0].strongest_in == sum(stronger)
        assert found.adapters[1].strongest_in == 2 - sum(stronger)
        assert found.adapters[2].shared_layers == 0
        assert found.adapters[2].shared_norm == 0.0
    assert inspect([one]).dominant is None
