"""Adapters merged into the weights of a model: by definition, in place, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import small_model
from plugin_models import (
    SQUARES,
    TRANSPOSED,
    gpt2,
    gpt2_adapter,
    loaded,
    save_examples,
)
from tiny_models import language_model
from torch import Tensor, nn

import lora_ortho
from lora_ortho import Adapter, mask_stream
from lora_ortho.adapters import LoadedAdapter, assign_streams, load_adapter
from lora_ortho.merges import METHODS
from lora_ortho.plugins.weights import fold_into, members, merged


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_examples(tmp_path_factory.mktemp("plugins"))


SEED, STREAM, SAMPLE, STRATA = -5, 77, 3, 2


def adapters_of_layer(dtype: torch.dtype = torch.float64, bias: bool = False) -> list[Adapter]:
    return [
        Adapter(
            torch.randn(rank, 6, dtype=dtype),
            torch.randn(9, rank, dtype=dtype),
            scaling=0.5 * rank,
            weight=1.25 - rank,
            p=p,
            bias=torch.randn(9, dtype=dtype) if bias else None,
            name=f"r{rank}",
        )
        for rank, p in ((1, 0.5), (3, 0.75), (2, 0.8))
    ]


def owners(method: str, p: list[float]) -> Tensor:
    """(9, 7): who owns an element of the weight, and in the last column of the bias."""
    place: Any = {"stream": STREAM, "sample": SAMPLE, "strata": STRATA}
    if method == "ortho_rows":
        return mask_stream.winners(SEED, range(1), range(9), p, **place).T.expand(9, 7)
    return mask_stream.winners(SEED, range(9), range(7), p, **place)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_weights_by_the_definition(method: str, bias: bool) -> None:
    adapters = adapters_of_layer(bias=bias)
    weight, base_bias = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    wanted = torch.cat([weight, base_bias[:, None]], dim=1)
    p = [float(a.p or 0.0) for a in adapters]
    _, keep = mask_stream.thresholds(p, "orthogonal")
    for j, a in enumerate(adapters):
        delta = torch.cat([a.lora_B @ a.lora_A, torch.zeros(9, 1, dtype=torch.float64)], dim=1)
        if a.bias is not None:
            delta[:, -1] = a.bias
        gain = a.weight * a.scaling
        if method != "direct":
            delta = torch.where(owners(method, p) == j, delta / keep[j], 0.0)
        wanted += gain * delta
    settings: Any = {"seed": SEED, "stream": STREAM, "sample": SAMPLE, "strata": STRATA}
    found, found_bias = merged(weight, base_bias, adapters, method, **settings)
    assert found_bias is not None
    both = torch.cat([found, found_bias[:, None]], dim=1)
    assert torch.allclose(both, wanted, rtol=1e-13, atol=1e-13)
    if not bias:
        assert torch.equal(found_bias, base_bias)


@pytest.mark.parametrize("method", METHODS)
def test_a_narrow_base_is_rounded_once(method: str) -> None:
    adapters = adapters_of_layer(torch.float32)
    weight = torch.randn(9, 6).bfloat16()
    found, _ = merged(weight, None, adapters, method, seed=1, stream=2)
    exact, _ = merged(weight.double(), None, adapters, method, seed=1, stream=2)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())


def test_one_token_sees_the_run_time_merge(folder: Path) -> None:
    """A single token is row 0, whose masks `ortho_rows` has."""
    model, ids = language_model(), torch.tensor([[4]])
    settings: Any = {"p": [0.5, 0.5], "weights": [1.0, -0.5], "seed": 9}
    with torch.no_grad(), lora_ortho.inject(model, loaded(folder, model), **settings) as handle:
        handle.set(sample=2, strata=3)
        wanted = model(input_ids=ids).logits
    bare = model(input_ids=ids).logits
    place: Any = {"seed": 9, "sample": 2, "strata": 3}
    fold_into(model, loaded(folder), "ortho_rows", [0.5, 0.5], [1.0, -0.5], **place)
    found = model(input_ids=ids).logits
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(found, bare, atol=1e-2)


def test_element_disjoint_averages_to_direct() -> None:
    adapters = [replace(a, p=2 / 3) for a in adapters_of_layer()]
    weight = torch.zeros(9, 6, dtype=torch.float64)
    direct, _ = merged(weight, None, adapters, "direct", seed=0, stream=0)
    drawn = torch.stack(
        [
            merged(weight, None, adapters, "element_disjoint", seed=0, stream=0, sample=i)[0]
            for i in range(2000)
        ]
    )
    z = (drawn.mean(dim=0) - direct) / (drawn.std(dim=0) / len(drawn) ** 0.5)
    assert float(z.abs().max()) < 6


def tied_model() -> Any:
    model: Any = small_model()
    model.twin = nn.Linear(3, 4)
    model.twin.weight = model.a.weight
    return model


def of(part: Adapter, layer: str = "a", name: str = "one") -> LoadedAdapter:
    return LoadedAdapter(name, {layer: part}, Path(name))


PART = Adapter(torch.ones(1, 3), torch.ones(4, 1))


@pytest.mark.parametrize(
    ("model", "adapters", "settings", "message"),
    [
        (small_model, [of(PART)], {"method": "orthogonal"}, "method must be one of direct, el"),
        (small_model, [of(PART, "z")], {}, "adapter 'one' adapts z, which the base model does not"),
        (small_model, [of(PART, "b.c")], {}, "layer b.c: adapter 'one' is for a weight of"),
        (small_model, [of(PART, "b")], {}, "layer b is a Module; it must be an nn.Linear"),
        (tied_model, [of(PART)], {}, "layer a shares its weight: a.weight, a.bias, twin.weight"),
        (small_model, [of(PART)], {"p": [0.5, 0.5]}, "p must hold 1 values"),
        (small_model, [of(PART)] * 2, {"p": [0.4, 0.5]}, "layer a: p: the orthogonal method needs"),
    ],
)  # fmt: skip
def test_refusals_leave_the_model_as_it_was(
    model: Any, adapters: list[LoadedAdapter], settings: dict[str, Any], message: str
) -> None:
    made = model()
    before = copy.deepcopy(made.state_dict())
    good = of(Adapter(torch.ones(1, 4), torch.ones(5, 1)), "b.c", "good")
    if settings.get("p") is None:
        adapters = [good, *adapters]
    with pytest.raises(ValueError, match=message):
        fold_into(made, adapters, **{"method": "ortho_rows", **settings})
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, before[name])


class Int8Linear(nn.Linear):
    """W is codes times a scale, as weight-only quantisers have it."""

    def __init__(self) -> None:
        super().__init__(3, 4, bias=False)
        self.scale = torch.full((4, 1), 0.125)
        self.weight = nn.Parameter(torch.ones(4, 3, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.float() * self.scale).T


class Scaled(nn.Linear):
    """A scale among the buffers of a layer whose forward is elsewhere."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.register_buffer("weight_scale", torch.ones(()))


class Subclass(Tensor):
    """A tensor that may mean anything, as those of torchao and DTensor do."""


def with_weight(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(3, 4, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


ONES = torch.ones(4, 3)


NO_W: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "own forward": (Int8Linear, "is a Int8Linear with a forward of its own"),
    "int8": (
        lambda: with_weight(ONES.to(torch.int8)),
        "its weight is torch.int8: codes of a quantiser",
    ),
    "4 bit": (lambda: with_weight(ONES.to(torch.uint8)), "its weight is torch.uint8: codes"),
    "fp8": (lambda: with_weight(ONES.to(torch.float8_e4m3fn)), "torch.float8_e4m3fn: codes"),
    "scale": (Scaled, "has weight_scale besides its weight"),
    "meta": (lambda: nn.Linear(3, 4, device="meta"), "on the meta device"),
    "sparse": (lambda: with_weight(ONES.to_sparse()), "its weight has the layout torch.sparse_coo"),
    "subclass": (
        lambda: with_weight(ONES.as_subclass(Subclass)),
        "its weight is a Subclass, not a plain tensor",
    ),
    "parametrized": (
        lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        "that makes its weight from others",
    ),
}


@pytest.mark.parametrize("kind", NO_W)
def test_weights_that_are_not_w(kind: str) -> None:
    """Refused by layer before the layers that could be changed are."""
    make, message = NO_W[kind]
    model: Any = small_model()
    model.z = make()
    before = {name: tensor.clone() for name, tensor in model.a.state_dict().items()}
    with pytest.raises(ValueError, match="layer z") as caught:
        fold_into(model, [of(PART, "a"), of(PART, "z")], "direct")
    assert message in str(caught.value)
    for name, tensor in model.a.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    "wrong", [{"p": [0.5, 1.5]}, {"weights": [1.0, float("nan")]}, {"p": [0.5, "x"]}]
)
def test_wrong_numbers_of_a_later_layer_change_no_layer(wrong: dict[str, Any]) -> None:
    model: Any = small_model()
    before = copy.deepcopy(model.state_dict())
    late = of(Adapter(torch.ones(1, 4), torch.ones(5, 1)), "b.c", "late")
    with pytest.raises((TypeError, ValueError)):
        fold_into(model, [of(PART), late], "direct", **wrong)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_weight_0_is_off(method: str) -> None:
    """As if the adapter were not there, whether or not rates are given."""
    one, two = of(PART), of(replace(PART, lora_B=2 * PART.lora_B), name="two")
    for p, q in ((None, None), ([0.25, 0.5], [0.25])):
        changed = small_model()
        wanted = copy.deepcopy(changed)
        fold_into(changed, [one, two], method, p, [0.5, 0.0], seed=3)
        fold_into(wanted, [one], method, q, [0.5], seed=3)
        for name, tensor in wanted.state_dict().items():
            assert torch.equal(changed.state_dict()[name], tensor)
        fold_into(changed, [one], method, weights=[0.0])
        assert torch.equal(changed.state_dict()["a.weight"], wanted.state_dict()["a.weight"])


@pytest.mark.parametrize("targets", SQUARES)
@pytest.mark.parametrize("exported", [False, True])
def test_square_weights_that_lie_transposed(
    tmp_path: Path, targets: list[str], exported: bool
) -> None:
    """Merged, read from PEFT or from an export that saw no model, as PEFT merges them."""
    wanted = gpt2_adapter(tmp_path / "one", targets)
    path = tmp_path / "one"
    if exported:
        lora_ortho.export([load_adapter(path)], path := tmp_path / "exported")
    model = fold_into(gpt2(), [load_adapter(path)], "direct")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name])


@pytest.mark.parametrize("method", ["element_disjoint", "ortho_rows"])
def test_masks_of_weights_that_lie_transposed(tmp_path: Path, method: str) -> None:
    """Owners go by output features, wherever the weight keeps them."""
    gpt2_adapter(tmp_path / "one", SQUARES[0])
    gpt2_adapter(tmp_path / "two", SQUARES[0])
    loaded = [load_adapter(tmp_path / name) for name in ("one", "two")]
    model = fold_into(gpt2(), loaded, method, seed=5)
    name = TRANSPOSED.removesuffix(".weight")
    stream = assign_streams(n for n, _ in gpt2().named_modules())[name]
    rows = range(32) if method == "element_disjoint" else range(1)
    owner = mask_stream.winners(5, rows, range(32), [0.5, 0.5], stream=stream)
    owner = owner if method == "element_disjoint" else owner.T
    base = gpt2().state_dict()[TRANSPOSED]
    delta = torch.zeros(32, 32)
    for j, adapter in enumerate(loaded):
        part = adapter.layers[name]
        own = 2 * part.scaling * part.lora_B @ part.lora_A
        delta += torch.where(owner == j, own, 0.0)
    torch.testing.assert_close(model.state_dict()[TRANSPOSED], base + delta.T)


def test_a_bias_needs_a_bias() -> None:
    model: Any = small_model()
    model.a = nn.Linear(3, 4, bias=False)
    with pytest.raises(ValueError, match=r"layer a: adapter 'one' has a bias \(lora_bias\)"):
        fold_into(model, [of(replace(PART, bias=torch.ones(4)))], "direct")


def test_members_are_those_of_the_layer() -> None:
    adapters = [of(PART, "a", "one"), of(PART, "b", "two"), of(PART, "a", "three")]
    parts = members("a", adapters, None, [1.0, 2.0, 3.0])
    assert [(part.name, part.weight, part.p) for part in parts] == [
        ("one", 1.0, None),
        ("three", 3.0, None),
    ]
