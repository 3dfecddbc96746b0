"""attach: what PEFT promises stays true; what cannot be merged is refused or skipped by name."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_ortho
from lora_ortho import attach

peft = pytest.importorskip("peft", reason="PEFT is not installed: nothing to attach to")


class Small(nn.Module):
    """A linear layer, one without a bias, an embedding, a convolution, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6, bias=False)
        self.image = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.relu(self.up(x)))
        pixels = self.image(x.reshape(-1, 3, 2, 1)).mean(dim=(2, 3))
        return self.head(x) + pixels.mean()  # type: ignore[no-any-return]


X = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(1))
TARGETS = ["up", "down", "image"]


def make(*names: str, base: nn.Module | None = None, **fields: Any) -> Any:
    """A PeftModel of Small with adapters of ranks 2, 3, ..., all active and trainable."""
    torch.manual_seed(0)
    model: Any = None
    for j, name in enumerate(names or ("one", "two")):
        config = peft.LoraConfig(
            **{"r": 2 + j, "lora_alpha": 3, "target_modules": TARGETS, **fields}
        )
        if model is None:
            model = peft.get_peft_model(base or Small(), config, name)
        else:
            model.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    model.base_model.set_adapter(list(names or ("one", "two")))
    return model.eval()


def layer(model: Any, name: str) -> Any:
    return model.base_model.model.get_submodule(name)


# What PEFT promises


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


# Numbers


def gradients(model: Any, x: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("lora_bias", [False, True])
def test_gradients_of_direct_are_those_of_peft(lora_bias: bool) -> None:
    model = make("one", "two", "three", base=Small().double(), lora_bias=lora_bias).double()
    model.base_model.set_adapter(["one", "three"])
    expected = gradients(model, X.double())
    with attach(model, method="direct"):
        ours = gradients(model, X.double())
    for name, gradient in expected.items():
        other = ours[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            assert "one" in name or "three" in name
            torch.testing.assert_close(other, gradient, rtol=1e-9, atol=1e-9)


def test_gradients_under_masks_are_those_of_finite_differences() -> None:
    model = make(base=Small().double()).double()
    with attach(model, seed=5):
        found = gradients(model, X.double())
        for name, parameter in model.named_parameters():
            gradient = found[name]
            if gradient is None:
                continue
            with torch.no_grad():
                values = []
                for step in (1e-5, -1e-5):
                    parameter.view(-1)[1] += step
                    values.append(float(model(X.double()).square().sum()))
                    parameter.view(-1)[1] -= step
            slope = (values[0] - values[1]) / 2e-5
            assert float(gradient.view(-1)[1]) == pytest.approx(slope, rel=1e-5, abs=1e-6), name


def test_training_changes_what_is_computed() -> None:
    """Packed factors follow the optimiser."""
    model = make()
    with attach(model, seed=3) as handle:
        before = model(X)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model(X).square().mean().backward()
        optimizer.step()
        after = model(X)
        with torch.no_grad():
            assert torch.equal(model(X), after)
        assert not torch.equal(before, after)
        handle.set(method="direct")
        direct = model(X)
    torch.testing.assert_close(direct, model(X), rtol=1e-5, atol=1e-5)


def test_dropout_of_the_adapters_inputs() -> None:
    """In training each adapter sees its own dropped inputs, as PEFT draws them."""
    model = make(lora_dropout=0.5).train()
    torch.manual_seed(7)
    expected = model(X)
    with attach(model, method="direct", seed=0):  # no seed is drawn from torch's generator
        torch.manual_seed(7)
        ours = model(X)
        model.eval()
        quiet = model(X)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, quiet)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_base_with_float32_adapters(dtype: torch.dtype) -> None:
    """The usual case: as near to float64 as PEFT is."""
    exact = make(base=Small().double()).double()
    model = make(base=Small().to(dtype))
    model.load_state_dict(exact.state_dict())
    assert layer(model, "up").lora_A["one"].weight.dtype == torch.float32
    exact.load_state_dict(model.state_dict())
    x = X.to(dtype)
    with torch.no_grad():
        theirs = model(x)
        with attach(model, method="direct"):
            ours = model(x)
        wanted = exact(x.double())
    assert ours.dtype == dtype
    error, allowed = (float((y.double() - wanted).abs().max()) for y in (ours, theirs))
    assert error <= 2 * allowed


def test_fresh_seed_at_every_forward() -> None:
    model = make()
    with attach(model) as handle, torch.no_grad():
        torch.manual_seed(1)
        first, second = model(X), model(X)
        torch.manual_seed(1)
        assert torch.equal(model(X), first)
        assert not torch.equal(first, second)
        handle.set(seed=8)
        assert torch.equal(model(X), model(X))


def test_checkpointing_draws_the_same_masks() -> None:
    from torch.utils.checkpoint import checkpoint

    model = make()
    with attach(model):
        torch.manual_seed(3)
        plain = gradients(model, X)
        model.zero_grad()
        torch.manual_seed(3)
        checkpoint(model, X, use_reentrant=False).square().sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, plain[name], rtol=0, atol=0)


def test_functional_call_reaches_the_parameters() -> None:
    model = make()
    with attach(model, method="direct"):
        zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters() if "lora_B" in n}
        ours = torch.func.functional_call(model, zeros, (X,))
    with model.disable_adapter():
        torch.testing.assert_close(ours, model(X), rtol=1e-5, atol=1e-5)


def test_compiles_without_a_graph_break() -> None:
    model = make()
    with attach(model, seed=3):
        compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
        ours = compiled(X)
        ours.square().sum().backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        expected = gradients(model, X)
        torch.testing.assert_close(ours, model(X), rtol=1e-6, atol=1e-6)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5)


# Bases that keep their own forward


class Packed8Bit(nn.Linear):
    """A quantised layer in small: integer weights and a scale, its own forward."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None)
        self.scale = float(plain.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter((plain.weight / self.scale).round().to(torch.int8), False)
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def test_quantised_base_keeps_its_forward() -> None:
    base = Small()
    base.up = Packed8Bit(base.up)
    model = make(base=base)
    expected = model(X)
    with attach(model, method="direct") as handle:
        ours = model(X)
        entry = next(entry for entry in handle.report if entry.name == "up")
    assert (entry.how, entry.reason) == ("base + delta", "the base layer is a Packed8Bit")
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_hooked_base_keeps_its_hooks() -> None:
    model = make()
    kept: list[Tensor] = []
    hook = layer(model, "up").base_layer.register_forward_hook(lambda _m, _x, y: kept.append(y))
    with attach(model, method="direct") as handle, torch.no_grad():
        ours = model(X)
        assert "up: " in str(handle.report[-1])
        assert "[base + delta: hooks on the base layer]" in str(handle.report[-1])
    hook.remove()
    torch.testing.assert_close(ours, model(X), rtol=1e-5, atol=1e-5)
    assert torch.equal(kept[0], layer(model, "up").base_layer(X))  # not written over


def test_hooks_of_accelerate() -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    model = make()
    expected = model(X)
    hooks.add_hook_to_module(layer(model, "up").base_layer, hooks.ModelHook())
    with attach(model, method="direct") as handle:
        assert handle.report[-1].how == "base + delta"
        torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5)
    hooks.add_hook_to_module(layer(model, "down"), hooks.ModelHook())
    refused(model, "layer down", "a hook replaced the forward")


# Refusals


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
        ({"seed": "x"}, TypeError, "seed must be"),
        ({"seed": 1 << 64}, ValueError, "seed must fit"),
        ({"backend": "fpga"}, ValueError, "backend must be"),
        ({"on_unsupported": "ignore"}, ValueError, "on_unsupported must be"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], part: str) -> None:
    refused(make(), part, error=error, **arguments)


def test_backend_that_does_not_work_here(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {**lora_ortho.backends.available(), "cuda": "no GPU"}
    monkeypatch.setattr(lora_ortho.backends, "available", lambda: reasons)
    refused(make(), "backend 'cuda' does not work here: no GPU", backend="cuda")


@pytest.mark.parametrize(
    ("settings", "error", "part"),
    [
        ({"method": "sum"}, ValueError, "method"),
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
            handle.set(**{"weights": [0.0, 0.0], **settings})
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
