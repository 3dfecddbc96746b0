"""Training with every dense optimiser of torch, and with the ways of changing factors that move no
version counter: losses as with plain torch autograd."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lora_ortho import Adapter, FusedOrthoLoRALinear, attach, fused_ortho_lora, mask_stream
from lora_ortho.adapters import assign_streams
from lora_ortho.reference import merge

STEPS, TOKENS, D_IN, D_OUT, RANK, SEED = 50, 24, 12, 20, 3, 11
WEIGHTS = [1.5, 0.75]

Loss = Callable[[], Tensor]
Made = tuple[Loss, list[nn.Parameter]]


class DataSGD(torch.optim.Optimizer):
    """Writes through ``.data``, as optimisers outside torch do: no version counter moves."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Loss) -> None:  # type: ignore[override]
        with torch.enable_grad():
            closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-group["lr"])


def dense_optimisers() -> list[Any]:
    """Every optimiser of torch but SparseAdam, in each of its implementations."""
    found = []
    for name, kind in sorted(vars(torch.optim).items()):
        if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer):
            continue
        if kind in (torch.optim.Optimizer, torch.optim.SparseAdam):
            continue
        takes = inspect.signature(kind).parameters
        ways: list[dict[str, Any]] = [{}]
        ways += [{"foreach": True}] if "foreach" in takes else []
        ways += [{"fused": True}] if "fused" in takes else []
        for way in ways:
            label = "-".join([name, *way])
            found.append(pytest.param(kind, way, id=label))
    return [*found, pytest.param(DataSGD, {"lr": 0.05}, id="DataSGD")]


def tensors() -> tuple[nn.Linear, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """A frozen base, inputs and targets, and the factors of two adapters, the same every time."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    base = nn.Linear(D_IN, D_OUT, dtype=torch.float64).requires_grad_(False)
    with torch.no_grad():
        base.weight.copy_(normal(D_OUT, D_IN)), base.bias.copy_(normal(D_OUT))
    x, target = normal(TOKENS, D_IN), normal(TOKENS, D_OUT)
    return base, x, target, [normal(RANK, D_IN) for _ in "ab"], [normal(D_OUT, RANK) for _ in "ab"]


def plain(stream: int, scaling: float) -> Made:
    """The formula in torch, differentiated by torch."""
    base, x, target, A, B = tensors()
    lora_A, lora_B = ([nn.Parameter(f.clone()) for f in factors] for factors in (A, B))
    rows, cols = range(TOKENS), range(D_OUT)
    owner = mask_stream.winners(SEED, rows, cols, [0.5, 0.5], stream=stream)
    gains = [2 * scaling * weight for weight in WEIGHTS]

    def loss() -> Tensor:
        masks = [owner == j for j in range(2)]
        return (merge(x, lora_A, lora_B, gains, masks, base(x)) - target).square().mean()

    return loss, [*lora_A, *lora_B]


def by_op() -> Made:
    base, x, target, A, B = tensors()
    lora_A, lora_B = ([nn.Parameter(f.clone()) for f in factors] for factors in (A, B))

    def loss() -> Tensor:
        y = fused_ortho_lora(x, lora_A, lora_B, weights=WEIGHTS, base=base(x), seed=SEED)
        return (y - target).square().mean()

    return loss, [*lora_A, *lora_B]


def by_module() -> Made:
    base, x, target, A, B = tensors()
    adapters = [
        Adapter(a.clone(), b.clone(), weight=w) for a, b, w in zip(A, B, WEIGHTS, strict=True)
    ]
    layer = FusedOrthoLoRALinear(base, adapters, seed=SEED, trainable=True)
    factors = [layer.adapters[j].get_parameter(n) for n in ("lora_A", "lora_B") for j in range(2)]
    return lambda: (layer(x) - target).square().mean(), factors


def by_attach() -> Made:
    base, x, target, A, B = tensors()
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    model = get_peft_model(nn.Sequential(base), config, "one")
    model.add_adapter("two", config)
    model.base_model.set_adapter(["one", "two"])
    layer: Any = model.base_model.model[0]
    names = ["one", "two"]
    factors = [part[n].weight for part in (layer.lora_A, layer.lora_B) for n in names]
    for parameter, value in zip(factors, [*A, *B], strict=True):
        parameter.data = value.clone()
    attach(model, names, weights=WEIGHTS, seed=SEED)
    return lambda: (model(x) - target).square().mean(), factors


def train(made: Made, kind: Any, settings: dict[str, Any]) -> list[float]:
    """The losses of some steps, and of a look without gradients after each of the last ones."""
    loss_of, parameters = made
    optimiser = kind(parameters, **settings)
    losses = []

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    for step in range(STEPS):
        with torch.no_grad():
            losses.append(float(loss_of()))
        optimiser.step(closure)
        if step % 10 == 9:  # evaluated twice between two steps: packed factors are at hand
            with torch.no_grad():
                losses.append(float(loss_of()))
    return losses


@pytest.mark.parametrize(("kind", "settings"), dense_optimisers())
@pytest.mark.parametrize("way", [by_op, by_module, by_attach], ids=["op", "module", "attach"])
def test_losses_are_those_of_plain_torch(way: Any, kind: Any, settings: dict[str, Any]) -> None:
    stream = assign_streams(["", "0"])["0"] if way is by_attach else 0
    expected = train(plain(stream, 1.0), kind, settings)
    found = train(way(), kind, settings)
    assert expected[-1] < expected[0], "the optimiser got nowhere: nothing was tested"
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-6, atol=1e-9)
