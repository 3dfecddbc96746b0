"""attach: what cannot be merged is refused or skipped by name, and nothing has changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft_models import TARGETS, Small, X, layer, make, peft
from torch import nn

import lora_ortho
from lora_ortho import attach

TRAINED = torch.ones(2, requires_grad=True)


def state(model: nn.Module) -> list[Any]:
    """What a failed attach must not change."""
    attributes = [
        (name, type(m), getattr(m, "_active_adapter", None), sorted(m.__dict__))
        for name, m in model.named_modules()
    ]
    return [attributes, [(n, p.requires_grad, p._version) for n, p in model.named_parameters()]]


def refused(model: Any, *parts: str, error: type[Exception] = ValueError, **arguments: Any) -> None:
    before = state(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error) as caught:
        attach(model, **arguments)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    if before is not None:
        assert state(model) == before


def merged(model: Any) -> None:
    layer(model, "up").merge(adapter_names=["one"])


def with_adapter(**fields: Any) -> Callable[[Any], None]:
    """Adds an active adapter "three" with such a configuration."""

    def change(model: Any) -> None:
        model.add_adapter("three", peft.LoraConfig(**{"r": 2, "target_modules": ["up"], **fields}))
        model.base_model.set_adapter(["one", "three"])

    return change


def replicated(model: Any) -> None:
    model.peft_config["two"].layer_replication = [[0, 1], [0, 1]]


def biased(model: Any) -> None:
    for name in ("one", "two"):
        model.peft_config[name].bias = "lora_only"


UNSUPPORTED: dict[str, tuple[Callable[[Any], None], tuple[str, ...]]] = {
    "dora": (with_adapter(use_dora=True), ("layer up", "'three' is a variant", "DoraLinear")),
    "dora convolution": (
        with_adapter(use_dora=True, target_modules=["image"]),
        ("layer image", "'three'", "DoraConv2d"),
    ),
    "embedding": (
        with_adapter(target_modules=["words"]),
        ("layer words", "'three'", "a Embedding layer", "pick rows"),
    ),
    "merged": (merged, ("layer up", "merged into the base weights (one)", "unmerge first")),
    "replication": (replicated, ("'two'", "layer_replication")),
    "biases": (biased, ("'one', 'two'", 'bias is not "none"')),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported(kind: str) -> None:
    change, parts = UNSUPPORTED[kind]
    model = make()
    change(model)
    refused(model, "cannot attach", *parts)
    expected = model(X)
    with attach(model, on_unsupported="skip", method="direct") as handle:
        skipped = [entry for entry in handle.report if entry.how == "skipped"]
        assert skipped
        assert all(entry.reason and entry.name not in handle.layers for entry in skipped)
        assert any(parts[-1] in entry.reason for entry in skipped)
        torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(X), expected)


def test_adapters_that_save_modules() -> None:
    """One may be merged with others, where it is in its place; not two that save one module."""
    model = make()
    for name in ("three", "four"):
        config = peft.LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"])
        model.add_adapter(name, config)
    both = ("layer head", "'three', 'four'", "both save this module")
    refused(model, "cannot attach", *both, adapters=["three", "four"])
    model.set_adapter("one")
    refused(model, "layer head", "'three'", "not active there", adapters=["one", "three"])
    model.set_adapter("three")
    with attach(model, ["one", "three"], method="direct"):
        ours = model(X)
    for name in TARGETS:
        layer(model, name)._active_adapter = ["one", "three"]
    torch.testing.assert_close(ours, model(X), rtol=1e-5, atol=1e-5)
    with attach(model, ["three", "four"], on_unsupported="skip") as handle:
        entry = next(entry for entry in handle.report if entry.name == "head")
        assert (entry.how, entry.adapters) == ("skipped", ("three", "four"))


def test_bare_parameters() -> None:
    """target_parameters, as for the experts of a mixture."""
    if "target_parameters" not in peft.LoraConfig.__dataclass_fields__:
        pytest.skip("this PEFT has no target_parameters")
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["up.weight"])
    model = peft.get_peft_model(Small(), config, "one")
    refused(model, "layer up", "'one'", "a ParamWrapper layer", "target_parameters")


def test_grouped_convolution() -> None:
    base = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Linear(6, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0", "1"]), "one")
    refused(model, "layer 0", "a convolution with groups")
    with attach(model, on_unsupported="skip") as handle:
        assert list(handle.layers) == ["1"]


def test_dilated_convolution() -> None:
    """PEFT's own layer of it fails at its first call."""
    base = nn.Sequential(nn.Conv2d(4, 8, 3, dilation=2), nn.Conv2d(8, 6, 1, dilation=2))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0", "1"]), "one")
    with pytest.raises(RuntimeError, match="size of tensor"):
        model(torch.ones(1, 4, 9, 9))
    refused(model, "layer 0", "a convolution with a dilation of (2, 2), which PEFT's lora_A lacks")
    with attach(model, on_unsupported="skip") as handle:
        assert list(handle.layers) == ["1"]


def test_another_forward_on_the_layer_itself() -> None:
    """No class is asked for its forward then; accelerate's hooks, which do ask, are served."""
    model = make()
    down = layer(model, "down")
    down.forward = lambda x, forward=down.forward: 2 * forward(x)
    refused(model, "layer down", "a hook replaced the forward")


def test_attention_that_reads_weights() -> None:
    base = nn.Sequential(nn.MultiheadAttention(8, 2))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]), "one")
    refused(model, "layer 0", "a MultiheadAttention layer", "reads the weights")


def test_other_methods_of_peft() -> None:
    model = peft.get_peft_model(Small(), peft.LoHaConfig(r=2, target_modules=["up"]), "one")
    refused(model, "layer up", "another method than LoRA")
    refused(model, "layer up", "another method than LoRA", on_unsupported="skip")


def test_a_variant_that_becomes_active_later() -> None:
    model = make()
    with attach(model):
        with_adapter(use_dora=True)(model)
        with pytest.raises(ValueError, match="layer up: adapter 'three' is a variant"):
            model(X)


def test_one_adapter_for_each_sample() -> None:
    model = make()
    with attach(model), pytest.raises(ValueError, match="adapter_names picks one"):
        layer(model, "up")(X, adapter_names=["one"] * 4)


def test_initialisations_that_change_the_base() -> None:
    model = make(init_lora_weights="pissa", target_modules=["up"])
    with pytest.warns(UserWarning, match="'one' was made with init_lora_weights='pissa'"):
        attach(model).detach()


@pytest.mark.parametrize(
    ("arguments", "error", "part"),
    [
        ({"adapters": "one"}, TypeError, "adapters must be a list of names, got str"),
        ({"adapters": []}, ValueError, "at least one name"),
        ({"adapters": ["three"]}, ValueError, "model has no 'three'; it has one, two"),
        ({"adapters": ["one", "one"]}, ValueError, "must be different"),
        ({"p": [0.5]}, ValueError, "p must hold 2 values"),
        ({"p": 0.5}, TypeError, "p must be a sequence"),
        ({"p": [0.5, 1.0]}, ValueError, "p[1] must be a dropout rate"),
        ({"p": [0.5, 0.4]}, ValueError, "smallest admissible rate"),
        ({"weights": [1.0]}, ValueError, "weights must hold 2 values"),
        ({"weights": [1.0, float("nan")]}, ValueError, "weights[1] must be finite"),
        ({"method": "sum"}, ValueError, "method must be one of"),
        ({"method": ["direct"]}, ValueError, "method must be one of"),
        (
            {"weights": TRAINED},
            TypeError,
            "weights must be numbers here, got a tensor that requires",
        ),
        ({"seed": "x"}, TypeError, "seed must be"),
        ({"seed": 1 << 64}, ValueError, "seed must fit"),
        ({"backend": "fpga"}, ValueError, "backend must be"),
        ({"on_unsupported": "ignore"}, ValueError, "on_unsupported must be"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], part: str) -> None:
    refused(make(), part, error=error, **arguments)


def test_backend_that_does_not_work_here() -> None:
    reason = lora_ortho.backends.available()["cuda"]
    if reason is None:
        pytest.skip("needs a machine on which the cuda backend does not work")
    refused(make(), f"backend 'cuda' does not work here: {reason}", backend="cuda")


@pytest.mark.parametrize(
    ("settings", "error", "part"),
    [
        ({"method": "sum"}, ValueError, "method"),
        ({"method": ["direct"]}, ValueError, "method must be one of"),
        ({"weights": TRAINED}, TypeError, "weights must be numbers here"),
        ({"weights": list(TRAINED)}, TypeError, "weights must be numbers here"),
        ({"sample": -1}, ValueError, "sample"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"weights": [1.0]}, ValueError, "weights must hold 2"),
        ({"p": [0.1, 0.1]}, ValueError, "smallest admissible"),
    ],
)
def test_set_refuses_without_a_change(
    settings: dict[str, Any], error: type[Exception], part: str
) -> None:
    model = make()
    with attach(model, seed=5, weights=[2.0, 1.0]) as handle:
        expected = model(X)
        with pytest.raises(error, match=part):
            handle.set(**{"weights": [3.0, 4.0], **settings})
        assert torch.equal(model(X), expected)


def test_models_without_peft_layers() -> None:
    refused(Small(), "model holds no PEFT layers", "inject")
    refused("model", "must be a torch module or a diffusers pipeline", error=TypeError)


def test_twice() -> None:
    model = make()
    with attach(model) as handle:
        with pytest.raises(ValueError, match="layer down is attached already"):
            attach(model)
        handle.detach()
        handle.detach()
        with attach(model):
            handle.detach()  # not its own
            with pytest.raises(ValueError, match="attached already"):
                attach(model)


def test_report_of_mixed_layers() -> None:
    model = make("one", "two")
    model.add_adapter("three", peft.LoraConfig(r=5, target_modules=["head"]))
    with attach(model, ["two", "three"], p=[0.75, 0.5]) as handle:
        lines = [str(entry) for entry in handle.report]
        assert lines == [
            "down: two r=3 p=0.75",
            "head: three r=5 p=0.5",
            "image: two r=3 p=0.75 [convolution: a convolution]",
            "up: two r=3 p=0.75",
        ]
        assert repr(handle) == "Attachment(4 layers, 0 skipped, adapters: two, three)"
