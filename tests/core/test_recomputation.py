"""Layers that activation checkpointing runs again: with the settings of their first pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_ortho import Adapter, FusedOrthoLoRALinear, attach, inject
from lora_ortho.adapters import LoadedAdapter

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
DRAWS = 4


class Net(nn.Module):
    """Two layers, under a checkpoint of a kind or of none (None), one for each or one for both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)
        self.reentrant: bool | None = None
        self.each = False

    def forward(self, x: Tensor) -> Tensor:
        if self.each:
            return self._under(self._second, self._under(self._first, x))
        return self._under(lambda x: self._second(self._first(x)), x)

    def _first(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x))

    def _second(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(x)
        return y

    def _under(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.reentrant is None:
            return function(x)
        return checkpoint(function, x, use_reentrant=self.reentrant)


Set = Callable[[int], object]
Made = tuple[nn.Module, Net, Set]


def settings_of(draw: int) -> dict[str, dict[str, Any]]:
    return {
        "sample": {"sample": draw},
        "strata": {"sample": 5, "strata": 1 + draw},
        "seed": {"seed": draw},
        "weights": {"weights": [1.0, (draw + 1) / 4]},
        "method": {"method": ["direct", "orthogonal"][draw % 2]},
        "p": {"p": [0.5 + draw / 16, 0.75]},
    }


def attached(what: str) -> Made:
    torch.manual_seed(0)
    net, targets = Net(), ["a", "b"]
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(net, config, "one")
    model.add_adapter("two", config)
    model.base_model.set_adapter(["one", "two"])
    handle = attach(model, seed=0)
    return model, net, lambda draw: handle.set(**settings_of(draw)[what])


def parts(name: str) -> LoadedAdapter:
    sizes = {"a": (8, 16), "b": (16, 8)}
    layers = {k: Adapter(torch.randn(4, i), torch.randn(o, 4)) for k, (i, o) in sizes.items()}
    return LoadedAdapter(name, layers, Path(name))


def injected(what: str) -> Made:
    """Frozen factors; gradients go through them, to the base."""
    torch.manual_seed(0)
    net = Net()
    handle = inject(net, [parts("one"), parts("two")], seed=0)
    return net, net, lambda draw: handle.set(**settings_of(draw)[what])


def modules(what: str) -> Made:
    torch.manual_seed(0)
    net = Net()
    for name, (features, out) in {"a": (8, 16), "b": (16, 8)}.items():
        pair = [Adapter(torch.randn(4, features), torch.randn(out, 4)) for _ in range(2)]
        base = getattr(net, name)
        setattr(net, name, FusedOrthoLoRALinear(base, pair, seed=0, trainable=True))

    def change(draw: int) -> None:
        for name, value in settings_of(draw)[what].items():
            for layer in (net.a, net.b):
                setattr(layer, name, value)

    return net, net, change


def gradients(made: Made, reentrant: bool | None, each: bool, at_once: bool) -> Tensor:
    """Of the mean over some draws; one backward for all, or one after each."""
    model, net, change = made
    net.reentrant, net.each = reentrant, each
    model.zero_grad()
    x, losses = X.clone().requires_grad_(), []
    for draw in range(DRAWS):
        change(draw)
        loss = model(x).square().mean() / DRAWS
        losses.append(loss)
        if not at_once:
            loss.backward()
    if at_once:
        torch.stack(losses).sum().backward()
    found = [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    return torch.cat([grad.flatten() for grad in found if grad is not None])


@pytest.mark.parametrize("what", ["sample", "strata", "seed", "weights", "method", "p"])
@pytest.mark.parametrize("make", [attached, injected, modules])
@pytest.mark.parametrize("each", [False, True], ids=["one block", "two blocks"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_those_without_checkpoints(
    reentrant: bool, each: bool, make: Callable[[str], Made], what: str
) -> None:
    made = make(what)
    for at_once in (False, True):
        expected = gradients(made, None, each, at_once)
        found = gradients(made, reentrant, each, at_once)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # sums in another order


@pytest.mark.parametrize("keep_rng", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_fresh_seed_is_drawn_once(reentrant: bool, keep_rng: bool) -> None:
    """Even where the checkpoint does not bring the generator back."""
    base = nn.Linear(8, 8)
    pair = [Adapter(torch.randn(4, 8), torch.randn(8, 4)) for _ in range(2)]
    layer = FusedOrthoLoRALinear(base, pair, trainable=True)
    found = []
    for wrapped in (False, True):
        torch.manual_seed(1)
        x = X.clone().requires_grad_()
        y = layer(x)
        if wrapped:
            torch.manual_seed(1)
            y = checkpoint(layer, x, use_reentrant=reentrant, preserve_rng_state=keep_rng)
        torch.manual_seed(9)
        layer.zero_grad()
        y.square().sum().backward()
        found.append([x.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class OwnCheckpoint(torch.autograd.Function):
    """A checkpoint that is not torch's, as training frameworks bring: nothing tells its passes."""

    @staticmethod
    def forward(ctx: Any, layer: Any, x: Tensor, _: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        y: Tensor = layer(x)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            y = ctx.layer(x)
        torch.autograd.backward(y, grad)
        return None, x.grad, None


def own_layer(seed: int | None) -> FusedOrthoLoRALinear:
    torch.manual_seed(0)
    pair = [Adapter(torch.randn(4, 8), torch.randn(8, 4)) for _ in range(2)]
    return FusedOrthoLoRALinear(nn.Linear(8, 8), pair, seed=seed, trainable=True)


def own_loss(layer: FusedOrthoLoRALinear, wrapped: bool) -> Tensor:
    x, one = X.clone().requires_grad_(), torch.ones((), requires_grad=True)
    run: Any = OwnCheckpoint.apply
    y: Tensor = run(layer, x, one) if wrapped else layer(x)
    return y.square().sum()


@pytest.mark.parametrize("seed", [None, 4])
def test_a_foreign_checkpoint_whose_pass_is_the_only_one_open(seed: int | None) -> None:
    """Its settings and its seed are used, whatever was set since."""
    layer, found = own_layer(seed), []
    for wrapped in (False, True):
        layer.zero_grad()
        torch.manual_seed(1)
        for sample in range(3):
            layer.sample, layer.weights = sample, [1.0, 1.0 + sample]
            loss = own_loss(layer, wrapped)
            layer.sample, layer.weights = 9, [5.0, 0.0]
            state = torch.get_rng_state()
            loss.backward()
            torch.set_rng_state(state)  # it draws once more, as dropout does
        found.append([p.grad.clone() for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_change_is_refused_where_the_pass_cannot_be_told() -> None:
    layer = own_layer(seed=4)
    first = own_loss(layer, wrapped=True)
    layer.sample, layer.strata, layer.weights = 3, 2, [1.0, 2.0]
    second = own_loss(layer, wrapped=True)
    words = r"weights .* sample \(0 to 3\), strata \(1 to 2\) changed between forward"
    with pytest.raises(RuntimeError, match=words):
        (first + second).backward()


def test_fresh_seeds_of_passes_that_cannot_be_told_apart() -> None:
    """Right where the checkpoint restores the generator, else refused."""
    layer = own_layer(seed=None)
    losses = [own_loss(layer, wrapped=True) for _ in range(2)]
    with pytest.raises(RuntimeError, match="the random seed changed between forward passes"):
        torch.stack(losses).sum().backward()


def test_a_pass_inside_a_backward_hook_is_a_pass_of_its_own() -> None:
    layer = own_layer(seed=4)
    y = layer(X.clone().requires_grad_())
    seen = []

    def hook(grad: Tensor) -> None:
        layer.sample = 5
        with torch.enable_grad():
            seen.append(layer(X).detach())

    y.register_hook(hook)
    y.sum().backward()
    assert torch.equal(seen[0], layer(X))


def nested(outer: bool, inner: bool) -> Callable[[Any, Any, Tensor], Tensor]:
    def run(f: Any, g: Any, x: Tensor) -> Tensor:
        def both(u: Tensor) -> Tensor:
            y: Tensor = g(checkpoint(f, u, use_reentrant=inner))
            return y

        return checkpoint(both, x, use_reentrant=outer)

    return run


@pytest.mark.parametrize("what", ["sample", "strata", "seed", "weights", "method", "p"])
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("outer", [False, True])
def test_nested_checkpoints(outer: bool, inner: bool, what: str) -> None:
    """What runs again inside of what runs again has the settings of the first time."""
    _, net, change = modules(what)
    found: list[Tensor] = []
    for run in (lambda f, g, x: g(f(x)), nested(outer, inner)):
        net.zero_grad()
        x, losses = X.clone().requires_grad_(), []
        for draw in range(DRAWS):
            change(draw)
            losses.append(run(net.a, net.b, x).square().mean())
        torch.stack(losses).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in (x, *net.parameters())]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_a_checkpointed_model_under_a_checkpoint() -> None:
    """As transformers' own checkpointing inside of a user's."""
    model, net, change = attached("sample")
    expected = gradients((model, net, change), None, True, True)
    net.each, found = True, []
    for outer in (False, True):
        for inner in (False, True):
            net.reentrant = inner
            model.zero_grad()
            x, losses = X.clone().requires_grad_(), []
            for draw in range(DRAWS):
                change(draw)
                y = checkpoint(model, x, use_reentrant=outer)
                losses.append(y.square().mean() / DRAWS)
            torch.stack(losses).sum().backward()
            grads = [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
            found.append(torch.cat([g.flatten() for g in grads if g is not None]))
    for each in found:
        torch.testing.assert_close(each, expected, rtol=1e-5, atol=1e-5)


def test_a_block_that_sets_its_own_samples() -> None:
    """Several draws inside one checkpoint: each call has the settings that it had."""
    pair = [Adapter(torch.randn(4, 8), torch.randn(8, 4)) for _ in range(2)]
    layer = FusedOrthoLoRALinear(nn.Linear(8, 8), pair, seed=0, trainable=True)

    def mean(x: Tensor) -> Tensor:
        total = torch.zeros(())
        for sample in range(3):
            layer.sample = sample
            total = total + layer(x).square().mean()
        return total

    found = []
    for run in (mean, lambda x: checkpoint(mean, x, use_reentrant=False)):
        layer.zero_grad()
        loss = run(X.clone().requires_grad_())
        layer.sample = 7
        loss.backward()
        found.append([p.grad.clone() for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.fixture
def _fresh_compiler(_poisoned: None) -> Iterator[None]:
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(what: str) -> Made:
    made = modules(what)
    for layer in (made[1].a, made[1].b):
        layer.compile(backend="aot_eager", fullgraph=True)
    return made


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("what", ["sample", "strata", "seed", "weights"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_compiled_block_under_a_checkpoint(reentrant: bool, what: str) -> None:
    """Right where nothing changes before backward, else refused: torch saves the inputs first."""
    expected = gradients(modules(what), None, True, False)
    found = gradients(compiled(what), reentrant, True, False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="changed between a forward pass and its recomputation"):
        gradients(compiled(what), reentrant, True, True)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("what", ["sample", "strata", "seed", "weights"])
def test_a_compiled_model_with_its_checkpoints(what: str) -> None:
    """A pass keeps what it used: the tensors that it was given are never written over."""
    model, net, change = modules(what)
    expected = gradients((model, net, change), None, True, True)
    model.compile(backend="aot_eager", fullgraph=True)
    found = gradients((model, net, change), False, True, True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
