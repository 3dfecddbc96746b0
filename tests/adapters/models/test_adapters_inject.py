"""Adapters injected into plain models: all layers or none, and out again without a trace."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from block_model import Model, X, adapter
from torch import nn

from lora_ortho import Adapter, FusedOrthoLoRALinear, fused_ortho_lora
from lora_ortho.adapters import Injection, LoadedAdapter, assign_streams, inject


@pytest.fixture
def model() -> Model:
    return Model().eval()


TRAINED = torch.ones(2, requires_grad=True)


def state(model: nn.Module) -> list[tuple[str, int]]:
    """Every module by name and identity: what a failed call must not change."""
    return [(name, id(module)) for name, module in model.named_modules()]


def test_detach_restores_everything(model: Model) -> None:
    before, expected, keys = state(model), model(X), list(model.state_dict())
    handle = inject(model, [adapter("one"), adapter("two")], seed=3)
    assert not torch.equal(model(X), expected)
    handle.detach()
    handle.detach()
    assert state(model) == before
    assert list(model.state_dict()) == keys
    assert torch.equal(model(X), expected)


def test_context_detaches_after_an_error(model: Model) -> None:
    before = state(model)

    def use() -> None:
        with inject(model, [adapter("one")]) as handle:
            assert isinstance(handle, Injection)
            assert state(model) != before
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert state(model) == before


def test_values_are_those_of_the_op(model: Model) -> None:
    """A layer computes what fused_ortho_lora does for its adapters, stream and rates."""
    one, two = adapter("one", "blocks.0.up", rank=3), adapter("two")
    with inject(model, [one, two], seed=11, weights=[1.5, -0.5]) as handle:
        handle.set(sample=4)
        for name in ("blocks.0.up", "blocks.1.down"):
            layer = handle.layers[name]
            parts = [a.layers[name] for a in (one, two) if name in a.layers]
            x = torch.randn(7, layer.in_features)
            expected = fused_ortho_lora(
                x,
                [part.lora_A for part in parts],
                [part.lora_B for part in parts],
                scaling=[0.5] * len(parts),
                weights=[1.5, -0.5][-len(parts) :],
                base=layer.base(x),
                seed=11,
                stream=zlib.crc32(name.encode()),
                sample=4,
            )
            torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)


def test_masks_do_not_depend_on_other_layers(model: Model) -> None:
    one, only = adapter("one"), adapter("one")
    only = LoadedAdapter("one", {"blocks.1.up": one.layers["blocks.1.up"]}, Path("one"))
    x = torch.randn(9, 6)
    with inject(model, [one], seed=2, p=[0.5]) as handle:
        all_layers = handle.layers["blocks.1.up"](x)
    with inject(model, [only], seed=2, p=[0.5]) as handle:
        assert torch.equal(handle.layers["blocks.1.up"](x), all_layers)


def test_report(model: Model) -> None:
    with inject(model, [adapter("one"), adapter("two", "blocks.0.up", rank=4)]) as handle:
        assert [r.name for r in handle.report] == sorted(handle.layers)
        first = next(r for r in handle.report if r.name == "blocks.0.up")
        assert (first.adapters, first.ranks, first.p) == (("one", "two"), (2, 4), (0.5, 0.5))
        assert str(first) == "blocks.0.up: one r=2 p=0.5, two r=4 p=0.5"
        other = next(r for r in handle.report if r.name == "blocks.1.up")
        assert (other.adapters, other.p) == (("one",), (0.0,))
        assert first.stream == zlib.crc32(b"blocks.0.up") == handle.layers[first.name].stream


def test_given_rates_and_weights_follow_their_adapters(model: Model) -> None:
    adapters = [adapter("two", "blocks.0.up"), adapter("one")]
    with inject(model, adapters, p=[0.75, 0.25], weights=[2.0, 3.0]) as handle:
        found = {report.name: report.p for report in handle.report}
        assert found == {**dict.fromkeys(handle.layers, (0.25,)), "blocks.0.up": (0.75, 0.25)}
        assert handle.layers["blocks.0.up"].weights == [2.0, 3.0]
        assert handle.layers["blocks.0.down"].weights == [3.0]
        handle.set(weights=[5.0, 7.0])
        assert handle.layers["blocks.0.up"].weights == [5.0, 7.0]
        assert handle.layers["blocks.0.down"].weights == [7.0]
        handle.set(weights=None)
        assert handle.layers["blocks.0.up"].weights == [1.0, 1.0]


def test_set_changes_only_what_is_given(model: Model) -> None:
    with inject(model, [adapter("one"), adapter("two")], seed=5) as handle:
        orthogonal = model(X)
        assert handle.set(method="direct") is handle
        direct = model(X)
        assert not torch.equal(orthogonal, direct)
        assert torch.equal(handle.set(seed=6, sample=1).model(X), direct)
        assert torch.equal(handle.set(method="orthogonal", seed=5, sample=0).model(X), orthogonal)
        assert not torch.equal(handle.set(sample=1).model(X), orthogonal)
        handle.set(seed=None)
        assert not torch.equal(model(X), model(X))


@pytest.mark.parametrize(
    ("settings", "error", "part"),
    [
        ({"method": "sum"}, ValueError, "method"),
        ({"method": ["direct"]}, ValueError, "method must be one of"),
        ({"weights": TRAINED}, TypeError, "weights must be numbers here"),
        ({"weights": list(TRAINED)}, TypeError, "weights must be numbers here"),
        ({"seed": 1.5}, TypeError, "seed"),
        ({"seed": 1 << 64}, ValueError, "seed"),
        ({"sample": -1}, ValueError, "sample"),
        ({"sample": 1 << 24}, ValueError, "sample"),
        ({"weights": [1.0]}, ValueError, "weights"),
        ({"weights": [1.0, float("nan")]}, ValueError, "weights"),
        ({"method": "orthogonal"}, ValueError, "smallest admissible"),
    ],
)
def test_set_refuses_without_a_change(
    model: Model, settings: dict[str, Any], error: type[Exception], part: str
) -> None:
    adapters = [adapter("one"), adapter("two", "blocks.1.up")]
    with inject(model, adapters, p=[0.1, 0.1], seed=5, method="dropout") as handle:
        expected = model(X)
        with pytest.raises(error, match=part):
            handle.set(**{"sample": 3, **settings})
        assert torch.equal(model(X), expected)


def without(model: Model) -> None:
    del model.block(1)["up"]


def convolution(model: Model) -> None:
    model.block(1)["up"] = nn.Conv1d(6, 10, 2)


def embedding(model: Model) -> None:
    model.block(1)["up"] = nn.Embedding(6, 10)


def wider(model: Model) -> None:
    model.block(1)["up"] = nn.Linear(7, 10)


def shared(model: Model) -> None:
    model.block(1)["up"] = model.block(0)["up"]


def adapted(model: Model) -> None:
    inject(model, [adapter("before", "blocks.0.up")])


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (without, "'one' adapts blocks.1.up, which the model does not have"),
        (convolution, "6 features to 10 on blocks.1.up, .* 6 features to 10 with a kernel of 2"),
        (embedding, "'one' adapts blocks.1.up, a Embedding; it must be a linear layer"),
        (wider, "takes 6 features to 10 on blocks.1.up, the layer takes 7 features to 10"),
        (shared, "blocks.0.up is shared: it is also blocks.1.up"),
        (adapted, "blocks.0.up is adapted already"),
    ],
)
def test_layers_that_do_not_fit(model: Model, change: Callable[[Model], None], part: str) -> None:
    change(model)
    before = state(model)
    with pytest.raises(ValueError, match=part):
        inject(model, [adapter("one")])
    assert state(model) == before


@pytest.mark.parametrize(
    ("arguments", "error", "part"),
    [
        ({"adapters": []}, ValueError, "at least one"),
        ({"adapters": adapter("one")}, TypeError, "must be a list"),
        ({"adapters": ["folder"]}, TypeError, r"adapters\[0\] must come from load_adapter"),
        ({"p": [0.5]}, ValueError, "p must hold 2 values"),
        ({"p": 0.5}, TypeError, "p must be a sequence"),
        ({"p": [0.5, 1.0]}, ValueError, "p"),
        ({"p": [0.5, 0.4]}, ValueError, "layer blocks.0.down: .*smallest admissible"),
        ({"weights": [1.0, float("inf")]}, ValueError, "weights"),
        ({"method": "sum"}, ValueError, "method"),
        ({"method": ["direct"]}, ValueError, "method must be one of"),
        ({"weights": TRAINED}, TypeError, "weights must be numbers here"),
        ({"weights": list(TRAINED)}, TypeError, "weights must be numbers here"),
        ({"seed": "x"}, TypeError, "seed"),
        ({"backend": "fpga"}, ValueError, "backend"),
        ({"model": "model"}, TypeError, "model must be a torch module"),
    ],
)
def test_wrong_arguments_leave_the_model(
    model: Model, arguments: dict[str, Any], error: type[Exception], part: str
) -> None:
    before = state(model)
    with pytest.raises(error, match=part):
        inject(**{"model": model, "adapters": [adapter("one"), adapter("two")], **arguments})
    assert state(model) == before


@pytest.mark.parametrize(
    ("outer", "name"),
    [
        (nn.MultiheadAttention(6, 2), "m.out_proj"),
        (nn.TransformerEncoderLayer(6, 2, 10), "m.linear1"),
    ],
)
def test_layers_that_are_never_called(outer: nn.Module, name: str) -> None:
    """Some modules of torch read the weights of their layers: an adapter would do nothing."""
    layer = outer.get_submodule(name[2:])
    assert isinstance(layer, nn.Linear)
    part = Adapter(torch.ones(1, layer.in_features), torch.ones(layer.out_features, 1))
    with pytest.raises(ValueError, match=f"layer {name} is part of a {type(outer).__name__}"):
        inject(nn.ModuleDict({"m": outer}), [LoadedAdapter("x", {name: part}, Path("x"))])


def test_detach_leaves_what_was_replaced(model: Model) -> None:
    """A layer that the model has no more is no hindrance: the others are given back."""
    handle = inject(model, [adapter("one")])
    model.block(0)["up"] = fresh = nn.Linear(6, 10)
    handle.detach()
    assert model.block(0)["up"] is fresh
    assert {type(m) for m in model.modules() if hasattr(m, "weight")} == {nn.Linear}


@pytest.mark.parametrize("training", [False, True])
def test_dtype_and_mode_follow_the_layer(model: Model, training: bool) -> None:
    model.to(torch.bfloat16).train(training)
    with inject(model, [adapter("one"), adapter("two")], seed=1) as handle:
        layer = handle.layers["blocks.0.up"]
        assert isinstance(layer, FusedOrthoLoRALinear)
        assert layer.training is training
        assert layer.adapters[0].lora_A.dtype == torch.float32
        assert model(X.to(torch.bfloat16)).dtype == torch.bfloat16


def test_injected_model_can_be_copied_and_saved(model: Model) -> None:
    plain = model(X)
    with inject(model, [adapter("one"), adapter("two")], seed=1):
        expected = model(X)
        assert torch.equal(copy.deepcopy(model)(X), expected)
        other = Model().eval()
        with inject(other, [adapter("one"), adapter("two")], seed=1):
            other.load_state_dict(model.state_dict())
            assert torch.equal(other(X), expected)
        assert torch.equal(other(X), plain)


def test_streams() -> None:
    assert zlib.crc32(b"plumless") == zlib.crc32(b"buckeroo")
    number = zlib.crc32(b"plumless")
    streams = assign_streams(["plumless", "a.b", "buckeroo"])
    assert streams == {"a.b": zlib.crc32(b"a.b"), "buckeroo": number, "plumless": number + 1}


def test_clashing_names_draw_different_masks() -> None:
    model = nn.ModuleDict({"plumless": nn.Linear(4, 6), "buckeroo": nn.Linear(4, 6)})
    part = Adapter(torch.ones(1, 4), torch.ones(6, 1))
    loaded = LoadedAdapter("x", {"plumless": part}, Path("x"))
    with inject(model, [loaded]) as handle:
        assert handle.layers["plumless"].stream == zlib.crc32(b"plumless") + 1
