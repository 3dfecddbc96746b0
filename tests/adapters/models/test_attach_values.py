"""attach: values, gradients and draws against PEFT, on plain, quantised and hooked layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft_models import Small, X, layer, make
from torch import Tensor, nn

from lora_ortho import attach, inject
from lora_ortho.adapters import adapters_of


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
        torch.autograd.backward(ours.square().sum())
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        expected = gradients(model, X)
        torch.testing.assert_close(ours, model(X), rtol=1e-6, atol=1e-6)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5)


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


class Pixels(nn.Module):
    """One convolution of (2, 3, 9, 9)."""

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 4, 3, **fields).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.image(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "fields",
    [
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": (2, 1), "padding_mode": "circular", "stride": 2},
        {"padding": "same", "padding_mode": "replicate"},
        {"padding": "same", "dilation": 2},
    ],
)
def test_convolutions_run_as_with_peft(fields: dict[str, Any]) -> None:
    """PEFT's lora_A pads with zeros and is not dilated, whatever the layer is."""
    torch.manual_seed(0)
    base = Pixels(**fields)
    plain = copy.deepcopy(base)
    model = make("one", "two", base=base, target_modules=["image"]).double()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        direct = model(x)
        with attach(model, seed=3) as handle:
            masked, attached = model(x), handle.report
        with inject(plain, adapters_of(model), seed=3) as injection:
            torch.testing.assert_close(plain(x), masked, rtol=1e-9, atol=1e-9)
            injection.set(method="direct")
            torch.testing.assert_close(plain(x), direct, rtol=1e-9, atol=1e-9)
            mode = fields.get("padding_mode")
            for entry in (*attached, *injection.report):
                assert (f"the layer pads with {mode!r}, its adapters" in entry.reason) == bool(mode)
