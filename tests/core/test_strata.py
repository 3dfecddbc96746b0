"""Stratified samples: a block shares out every element in proportion, and its mean is the direct
merge, through the op, the module, attach and inject."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, make
from numerics import Results, run
from peft import LoraConfig, get_peft_model
from servers import Server
from stratified import WHOLE, check_mean_of_integers
from torch import Tensor, nn

from lora_ortho import Adapter, FusedOrthoLoRALinear, attach, fused_ortho_lora, inject, mask_stream
from lora_ortho.adapters import LoadedAdapter

D_IN, D_OUT, SEED = 9, 40, 5
X = torch.randn(6, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
GRAD = torch.randn(6, D_OUT, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_a_sample_is_its_block_turned() -> None:
    rows, cols = range(7, 27), range(5, 65)
    for strata in (1, 2, 3, 1000, 65535, 65536):
        for sample in (0, 1, 2, strata - 1, strata, 3 * strata + strata // 2):
            block, part = divmod(sample, strata)
            found = mask_stream.draws(SEED, rows, cols, sample=sample, strata=strata, lane_set=3)
            plain = mask_stream.draws(SEED, rows, cols, sample=block, lane_set=3)
            assert torch.equal(found, (plain + part * 65536 // strata) % 65536)


@pytest.mark.parametrize("strata", [1, 2, 3, 4, 7, 32, 100])
@pytest.mark.parametrize("method", ["orthogonal", "dropout"])
def test_every_element_meets_every_adapter_in_proportion(method: str, strata: int) -> None:
    """In the whole number below or above strata times the realised probability, in every block."""
    p = [0.9, 0.625, 0.7]
    thresholds, keep = mask_stream.thresholds(p, method)
    for block in range(2):
        masks = [
            mask_stream.masks(
                SEED, range(40), range(50), thresholds, method, sample=sample, strata=strata
            )
            for sample in range(block * strata, (block + 1) * strata)
        ]
        for j, q in enumerate(keep):
            met = torch.stack([each[j] for each in masks]).sum(0)
            assert set(met.flatten().tolist()) <= {math.floor(strata * q), math.ceil(strata * q)}


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"strata": 0}, ValueError, r"^strata must be in \[1, 65536\], got 0$"),
        ({"strata": 65537}, ValueError, r"^strata must be in \[1, 65536\], got 65537$"),
        ({"strata": 2.0}, TypeError, "^strata must be an int, got float$"),
        ({"strata": 4, "sample": 1 << 24}, ValueError, "^sample must be in"),
    ],
)
def test_draws_are_refused(values: Any, error: type[Exception], message: str) -> None:
    for function in (mask_stream.draws, mask_stream.winners):
        p = [[0.5]] if function is mask_stream.winners else []
        with pytest.raises(error, match=message):
            function(0, range(2), range(2), *p, **values)


def mean_of(found: list[Results]) -> list[Tensor]:
    """Output and gradients, each the mean over samples."""
    flat = [[r.y, r.x, r.base, r.weights, *r.lora_A, *r.lora_B] for r in found]
    return [torch.stack(parts).mean(0) for parts in zip(*flat, strict=True)]


@pytest.mark.parametrize(("method", "adapters", "rate", "strata"), WHOLE)
@pytest.mark.parametrize("block", [0, 3])
def test_the_mean_of_a_block_is_the_direct_merge(
    server: Server, block: int, method: str, adapters: int, rate: float, strata: int
) -> None:
    """Output and every gradient, to the rounding of float64."""
    case = Case(11, 20, 70, (3,) * adapters)
    tensors, scaling = make(case, torch.float64), [0.5 + j for j in range(adapters)]
    place = {"stream": 3, "row_offset": 5, "col_offset": 11}

    def call(method: str, **given: Any) -> Results:
        return run(
            fused_ortho_lora, tensors, p=[rate] * adapters, scaling=scaling, method=method,
            seed=SEED, backend=server.backend, **place, **given,
        )  # fmt: skip

    samples = range(block * strata, (block + 1) * strata)
    found = [call(method, sample=sample, strata=strata) for sample in samples]
    assert all(not torch.equal(found[0].y, other.y) for other in found[1:])
    pairs = zip(mean_of(found), mean_of([call("direct")]), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in pairs)


@pytest.mark.parametrize(("method", "adapters", "rate", "strata"), WHOLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_of_integers_is_exact(
    server: Server, dtype: torch.dtype, method: str, adapters: int, rate: float, strata: int
) -> None:
    check_mean_of_integers(server, dtype, method, adapters, rate, strata)


Model = tuple[Any, Callable[..., object]]


def adapters(count: int) -> list[Adapter]:
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return [Adapter(normal(4, D_IN), normal(D_OUT, 4), scaling=1.5) for _ in range(count)]


def base() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(D_IN, D_OUT).double()


def module(method: str, p: list[float]) -> Model:
    layer = FusedOrthoLoRALinear(base(), adapters(len(p)), method=method, seed=SEED, trainable=True)
    layer.p = p

    def change(**settings: Any) -> None:
        for name, value in settings.items():
            setattr(layer, name, value)

    return layer, change


def attached(method: str, p: list[float]) -> Model:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    names = [f"adapter{j}" for j in range(len(p))]
    model: Any = get_peft_model(nn.Sequential(base()), config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.double()
    layer = model.base_model.model[0]
    for name, part in zip(names, adapters(len(p)), strict=True):
        layer.lora_A[name].weight.data = part.lora_A.clone()
        layer.lora_B[name].weight.data = part.lora_B.clone()
    return model, attach(model, names, method=method, p=p, seed=SEED, strata=7).set


def injected(method: str, p: list[float]) -> Model:
    model = nn.Sequential(base())
    loaded = [
        LoadedAdapter(str(j), {"0": part}, Path(str(j))) for j, part in enumerate(adapters(len(p)))
    ]
    return model, inject(model, loaded, method=method, p=p, seed=SEED, strata=7).set


MADE = [module, attached, injected]


def results(model: Any) -> list[Tensor]:
    """The output for X, and the gradients of x and of every parameter that has one."""
    x = X.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(GRAD)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [tensor.detach().clone() for tensor in (y, x.grad, *grads)]


@pytest.mark.parametrize(("method", "adapters", "rate", "strata"), WHOLE)
@pytest.mark.parametrize("make", MADE)
def test_layers_and_models(make: Any, method: str, adapters: int, rate: float, strata: int) -> None:
    model, change = make(method, [rate] * adapters)
    change(strata=strata)
    found = []
    for sample in range(2 * strata, 3 * strata):
        change(sample=sample)
        found.append(results(model))
        with torch.no_grad():  # the way of packed factors
            torch.testing.assert_close(model(X), found[-1][0], rtol=1e-12, atol=1e-12)
    change(method="direct")
    for parts, direct in zip(zip(*found, strict=True), results(model), strict=True):
        torch.testing.assert_close(torch.stack(parts).mean(0), direct, rtol=1e-12, atol=1e-12)
    assert not torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize("make", [attached, injected])
def test_strata_may_be_given_at_once(make: Any) -> None:
    """attach(strata=7) is what set(strata=7) gives."""
    model, change = make("orthogonal", [0.5, 0.5])
    change(sample=3)
    first = model(X)
    change(strata=1)
    assert not torch.equal(model(X), first)
    change(strata=7)
    assert torch.equal(model(X), first)


@pytest.mark.parametrize(
    ("strata", "error", "message"),
    [
        (0, ValueError, r"strata must be in \[1, 65536\], got 0"),
        (65537, ValueError, r"strata must be in \[1, 65536\], got 65537"),
        ("4", TypeError, "strata must be an int, got str"),
        (None, TypeError, "strata must be an int, got NoneType"),
    ],
)
def test_models_are_refused_and_left_as_they_were(
    strata: Any, error: type[Exception], message: str
) -> None:
    for made in (attached, injected):
        model, change = made("orthogonal", [0.5, 0.5])
        change(sample=3, strata=2)
        before = model(X)
        with pytest.raises(error, match=message):
            change(strata=strata, sample=1)
        assert torch.equal(model(X), before)
    plain = nn.Sequential(base())
    loaded = [LoadedAdapter("one", {"0": adapters(1)[0]}, Path("one"))]
    with pytest.raises(error, match=f"^{message}"):
        inject(plain, loaded, strata=strata)
    assert type(plain[0]) is nn.Linear
    peft: Any = get_peft_model(nn.Sequential(base()), LoraConfig(target_modules=["0"]))
    kind = type(peft.base_model.model[0])
    with pytest.raises(error, match=f"^{message}"):
        attach(peft, strata=strata)
    assert type(peft.base_model.model[0]) is kind


@pytest.mark.parametrize("make", MADE)
def test_copies_have_the_strata(make: Any) -> None:
    model, change = make("orthogonal", [0.5, 0.75])
    change(sample=5, strata=4)
    expected = model(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), expected)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(model(X), expected)
    change(strata=1)
    assert not torch.equal(model(X), expected)
