"""attach: what PEFT promises of a model stays true while adapters are merged."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from peft_models import X, layer, make, peft
from torch import nn

import lora_ortho
from lora_ortho import attach


def test_state_dict_and_copies() -> None:
    model = make()
    keys = list(model.state_dict())
    with attach(model, seed=1):
        expected = model(X)
        assert list(model.state_dict()) == keys
        twin = copy.deepcopy(model)
        assert torch.equal(twin(X), expected)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        assert torch.equal(loaded(X), expected)
    bare = model(X)
    assert torch.equal(twin(X), expected)  # a copy stays attached by itself
    for other in (twin, loaded):
        assert lora_ortho.detach(other) == 3
        assert torch.equal(other(X), bare)
    assert lora_ortho.detach(model) == 0


def test_a_copy_is_of_its_own() -> None:
    model = make()
    with attach(model, seed=1) as handle:
        twin, expected = copy.deepcopy(model), model(X)
        handle.set(seed=2)
        assert not torch.equal(model(X), expected)
        assert torch.equal(twin(X), expected)


def test_save_pretrained(tmp_path: Path) -> None:
    model = make()
    with attach(model):
        model.save_pretrained(tmp_path / "attached")
    model.save_pretrained(tmp_path / "plain")
    for name in ("one", "two"):
        files = [tmp_path / d / name / "adapter_model.safetensors" for d in ("attached", "plain")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_layers_are_still_those_of_peft() -> None:
    from peft.tuners.lora import Conv2d, Linear

    model = make()
    text = repr(model)
    with attach(model):
        assert isinstance(layer(model, "up"), Linear)
        assert isinstance(layer(model, "image"), Conv2d)
        assert repr(model) == text


def test_disable_adapter() -> None:
    model = make()
    with attach(model, seed=1):
        expected = model(X)
        with model.disable_adapter():
            bare = model(X)
        assert torch.equal(model(X), expected)
    with model.disable_adapter():
        assert torch.equal(bare, model(X))


def test_merge_and_unmerge() -> None:
    """A merged layer is what PEFT made of it: the direct merge, in the base weights."""
    model = make()
    direct = model(X)
    with attach(model, seed=1):
        expected = model(X)
        model.merge_adapter()
        torch.testing.assert_close(model(X), direct, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5)


def test_set_adapter() -> None:
    """Only active adapters are merged: at the rate of as many as are active."""
    model = make("one", "two", "three")
    model.base_model.set_adapter(["two"])
    alone = model(X)
    model.base_model.set_adapter(["one", "two"])
    with attach(model, seed=1) as handle:
        pair = model(X)
        model.set_adapter("two")
        torch.testing.assert_close(model(X), alone, rtol=1e-5, atol=1e-5)  # p = 0: all of it
        model.base_model.set_adapter(["two", "one"])
        assert torch.equal(model(X), pair)  # merge order is that of attach
        model.base_model.set_adapter(["one", "two", "three"])
        three = model(X)
        model.base_model.set_adapter(["one", "two"])
        handle.set(p=[0.5, 0.5])
        model.base_model.set_adapter(["one", "two", "three"])
        with pytest.raises(ValueError, match=r"p holds no rate for adapter 'three'.* one, two"):
            model(X)
    with attach(model, ["one", "two", "three"], seed=1):
        assert torch.equal(model(X), three)


def test_scaling_is_read_at_every_call() -> None:
    model = make()
    with attach(model, method="direct"):
        layer(model, "up").scale_layer(3.0)
        layer(model, "image").set_scale("one", 0.25)
        ours = model(X)
    torch.testing.assert_close(ours, model(X), rtol=1e-5, atol=1e-5)


def test_delete_and_add_adapter() -> None:
    model = make("one", "two", "three")
    model.base_model.set_adapter(["one", "two"])
    with attach(model, method="direct"):
        model.delete_adapter("three")
        model.add_adapter("four", peft.LoraConfig(r=2, target_modules=["up"]))
        nn.init.ones_(layer(model, "up").lora_B["four"].weight)
        model.base_model.set_adapter(["four", "one"])
        ours = model(X)
    torch.testing.assert_close(ours, model(X), rtol=1e-5, atol=1e-5)


def test_names_become_active_until_detach() -> None:
    model = make("one", "two", "three")
    model.base_model.set_adapter(["three"])
    trainable = [p.requires_grad for p in model.parameters()]
    expected = model(X)
    with attach(model, ["two", "one"], method="direct"):
        ours = model(X)
        assert layer(model, "up").active_adapters == ["two", "one"]
        assert [p.requires_grad for p in model.parameters()] == trainable
    assert torch.equal(model(X), expected)
    model.base_model.set_adapter(["one", "two"])
    torch.testing.assert_close(ours, model(X), rtol=1e-5, atol=1e-5)
    with attach(model, ["three"]):
        model.base_model.set_adapter(["one"])  # the user's own choice stays
    assert layer(model, "up").active_adapters == ["one"]
