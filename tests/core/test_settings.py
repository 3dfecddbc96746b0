"""Settings of modules and handles: weight 0 is off, rates may be set, errors come at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import METHODS
from peft import LoraConfig, get_peft_model
from servers import Server
from torch import Tensor, nn

from lora_ortho import Adapter, FusedOrthoLoRALinear, attach, fused_ortho_lora, inject, mask_stream
from lora_ortho.adapters import LoadedAdapter, assign_streams

D_IN, D_OUT, SEED = 9, 40, 5
X = torch.randn(6, D_IN, generator=torch.Generator().manual_seed(1))


def adapters(count: int = 3, bias: bool = False) -> list[Adapter]:
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [
        Adapter(normal(4, D_IN), normal(D_OUT, 4), bias=normal(D_OUT) if bias else None)
        for _ in range(count)
    ]


def formula(
    y: Tensor, parts: list[Adapter], weights: list[float], p: list[float], method: str,
    lanes: list[int], stream: int = 0,
) -> Tensor:  # fmt: skip
    """The merge of these adapters by plain torch, each on its own lane set."""
    place: Any = {"stream": stream}
    rows, cols = range(X.shape[0]), range(D_OUT)
    thresholds, keep = mask_stream.thresholds(p, method)
    owner = None
    if method == "orthogonal":
        owner = mask_stream.winners(SEED, rows, cols, p, **place)
    for j, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        if owner is not None:
            mask = owner == j
        elif method == "direct":
            mask = torch.ones(len(rows), len(cols), dtype=torch.bool)
        else:
            mask = mask_stream.draws(SEED, rows, cols, lane_set=lanes[j], **place) < thresholds[j]
        delta = X @ part.lora_A.T @ part.lora_B.T
        delta = delta if part.bias is None else delta + part.bias
        y = y + weight / keep[j] * mask * delta
    return y


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("p", [None, [0.7, 0.6, 0.8]], ids=["default", "given"])
@pytest.mark.parametrize("off", [0, 1, 2])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grad", [False, True])
def test_weight_zero_is_off_in_the_module(
    server: Server, grad: bool, method: str, off: int, p: list[float] | None, bias: bool
) -> None:
    """As if it had not been given; the others keep their rates, order and lane sets."""
    parts, weights = adapters(bias=bias), [1.5, -0.5, 2.0]
    weights[off] = 0.0
    layer = FusedOrthoLoRALinear(
        nn.Linear(D_IN, D_OUT), parts, method=method, seed=SEED, trainable=grad,
        backend=server.backend,
    )  # fmt: skip
    layer.p, layer.weights = p, weights
    left = [j for j in range(3) if j != off]
    rates = [0.5, 0.5] if p is None else [p[j] for j in left]
    with torch.set_grad_enabled(grad):
        expected = formula(
            layer.base(X), [parts[j] for j in left], [weights[j] for j in left], rates, method, left
        )
        torch.testing.assert_close(layer(X), expected, rtol=1e-4, atol=1e-4)


def test_all_weights_zero_give_the_base(server: Server) -> None:
    layer = FusedOrthoLoRALinear(
        nn.Linear(D_IN, D_OUT), adapters(), seed=SEED, backend=server.backend
    )
    layer.weights = [0.0] * 3
    assert torch.equal(layer(X), layer.base(X))
    layer.weights = [0.0, 1.0, 0.0]
    alone = layer.base(X) + X @ layer.adapters[1].lora_A.T @ layer.adapters[1].lora_B.T
    torch.testing.assert_close(layer(X), alone, rtol=1e-4, atol=1e-4)


def test_weights_of_zero_may_be_kept() -> None:
    """Then they own their share of the elements, as in the op."""
    parts, weights = adapters(), [1.0, 0.0, 2.0]
    layer = FusedOrthoLoRALinear(nn.Linear(D_IN, D_OUT), parts, seed=SEED, keep_zero_weights=True)
    layer.weights = weights
    expected = fused_ortho_lora(
        X, [a.lora_A for a in parts], [a.lora_B for a in parts], weights=weights,
        base=layer.base(X), seed=SEED,
    )  # fmt: skip
    assert torch.equal(layer(X), expected)
    layer.keep_zero_weights = False
    assert not torch.equal(layer(X), expected)


def handles(weights: list[float], **settings: Any) -> list[tuple[Any, Any, nn.Linear]]:
    """The same adapters attached and injected: model, handle, base layer."""
    base, parts, names = nn.Linear(D_IN, D_OUT), adapters(), ["one", "two", "three"]
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights=False)
    peft = get_peft_model(nn.Sequential(base), config, names[0])
    for name in names[1:]:
        peft.add_adapter(name, config)
    layer: Any = peft.base_model.model[0]
    for name, part in zip(names, parts, strict=True):
        layer.lora_A[name].weight.data = part.lora_A.clone()
        layer.lora_B[name].weight.data = part.lora_B.clone()
    attached = attach(peft, names, weights=weights, seed=SEED, **settings)
    plain = nn.Sequential(nn.Linear(D_IN, D_OUT))
    plain.load_state_dict({"0.weight": base.weight, "0.bias": base.bias})
    loaded = [LoadedAdapter(n, {"0": a}, Path(n)) for n, a in zip(names, parts, strict=True)]
    injected = inject(plain, loaded, weights=weights, seed=SEED, **settings)
    return [(peft, attached, base), (plain, injected, base)]


@pytest.mark.parametrize("method", METHODS)
def test_weight_zero_is_off_in_attach_and_inject(method: str) -> None:
    parts, stream = adapters(), assign_streams(["", "0"])["0"]
    for model, handle, base in handles([1.0, 0.0, 3.0], method=method):
        for left, weights in (([0, 2], [1.0, 0.0, 3.0]), ([1, 2], [0.0, 2.0, 1.0])):
            handle.set(weights=weights)
            expected = formula(
                base(X), [parts[j] for j in left], [weights[j] for j in left], [0.5] * 2, method,
                left, stream,
            )  # fmt: skip
            torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)
        handle.set(weights=[0.0, 0.0, 0.0])
        torch.testing.assert_close(model(X), base(X), rtol=1e-6, atol=1e-6)


def test_reports_name_those_that_take_part() -> None:
    for _, handle, _ in handles([1.0, 0.0, 3.0]):
        (entry,) = handle.report
        assert entry.adapters == ("one", "three")
        assert entry.p == (0.5, 0.5)
    for _, handle, _ in handles([1.0, 0.0, 3.0], keep_zero_weights=True):
        assert handle.report[0].adapters == ("one", "two", "three")


def test_rates_may_be_set() -> None:
    parts, stream = adapters(), assign_streams(["", "0"])["0"]
    for model, handle, base in handles([1.0, 1.0, 1.0]):
        for p, rates in (([0.5, 0.75, 0.75], None), (None, [2 / 3] * 3)):
            handle.set(p=p)
            expected = formula(
                base(X), parts, [1.0] * 3, rates or p or [], "orthogonal", [0, 1, 2], stream
            )
            torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)
        before = model(X)
        with pytest.raises(ValueError, match="smallest admissible"):
            handle.set(p=[0.1, 0.1, 0.1])
        with pytest.raises(ValueError, match="p must hold 3 values"):
            handle.set(p=[0.9])
        assert torch.equal(model(X), before)


@pytest.mark.parametrize(
    ("name", "value", "error", "part"),
    [
        ("sample", -3, ValueError, r"sample must be in \[0, 2\*\*24\), got -3"),
        ("sample", 1.5, TypeError, "sample must be an int, got float"),
        ("strata", 0, ValueError, r"strata must be in \[1, 65536\], got 0"),
        ("strata", 65537, ValueError, r"strata must be in \[1, 65536\], got 65537"),
        ("strata", "4", TypeError, "strata must be an int, got str"),
        ("stream", 2**32, ValueError, r"stream must be in \[0, 2\*\*32\)"),
        ("seed", "3", TypeError, "seed must be an int or an int64 tensor, got str"),
        ("seed", True, TypeError, "seed must be an int"),
        ("p", [0.1, 0.1, 0.1], ValueError, "smallest admissible"),
        ("p", [0.9, 1.5, 0.9], ValueError, r"p\[1\] must be a dropout rate in \[0, 1\)"),
        ("p", [0.9], ValueError, "p must hold 3 values, one for each adapter, got 1"),
        ("p", {"one": 0.5}, TypeError, "p must be a sequence of numbers, got dict"),
        ("weights", [1.0, float("nan"), 1.0], ValueError, r"weights\[1\] must be finite"),
        ("weights", [1.0], ValueError, "weights must hold 3"),
        ("method", "sum", ValueError, "method must be one of"),
        ("method", ["direct"], ValueError, "method must be one of"),
        ("backend", "tpu", ValueError, "backend must be None or one of"),
    ],
)
def test_wrong_settings_are_refused_at_once(
    name: str, value: Any, error: type[Exception], part: str
) -> None:
    layer = FusedOrthoLoRALinear(nn.Linear(D_IN, D_OUT), adapters(), seed=SEED)
    before, output = getattr(layer, name), layer(X)
    with pytest.raises(error, match=part):
        setattr(layer, name, value)
    assert getattr(layer, name) == before
    assert torch.equal(layer(X), output)


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint64])
def test_numpy_integers_are_integers(kind: Any) -> None:
    parts = adapters()
    factors = [a.lora_A for a in parts], [a.lora_B for a in parts]
    offsets = {"row_offset": 6, "col_offset": 7}
    plain = fused_ortho_lora(X, *factors, seed=3, stream=4, sample=5, strata=3, **offsets)
    given = {"seed": kind(3), "stream": kind(4), "sample": kind(5)}
    given |= {"strata": kind(3), "row_offset": kind(6), "col_offset": kind(7)}
    assert torch.equal(fused_ortho_lora(X, *factors, **given), plain)
    layer = FusedOrthoLoRALinear(nn.Linear(D_IN, D_OUT), parts, seed=kind(3), stream=kind(4))
    layer.sample, layer.strata = kind(5), kind(3)
    kinds = [type(getattr(layer, name)) for name in ("seed", "stream", "sample", "strata")]
    assert kinds == [int] * 4
    given = {"seed": 3, "stream": 4, "sample": 5, "strata": 3}
    expected = fused_ortho_lora(X, *factors, base=layer.base(X), **given)
    assert torch.equal(layer(X), expected)
    for _, handle, _ in handles([1.0, 1.0, 1.0]):
        handle.set(seed=kind(3), sample=kind(2), strata=kind(4))


def test_settings_that_fit_together_need_not_fit_one_by_one() -> None:
    for model, handle, base in handles([1.0, 1.0, 1.0], method="dropout", p=[0.2, 0.2, 0.2]):
        handle.set(method="orthogonal", p=[0.5, 0.75, 0.75])
        stream = assign_streams(["", "0"])["0"]
        expected = formula(
            base(X), adapters(), [1.0] * 3, [0.5, 0.75, 0.75], "orthogonal", [0, 1, 2], stream
        )
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)
        handle.set(p=[0.0, 0.5, 0.5], weights=[1.0, 0.0, 0.0])


def test_a_refused_set_changes_no_layer() -> None:
    """One that fits the first layer and not the second, where more adapters meet."""
    model = nn.Sequential(nn.Linear(D_IN, D_OUT), nn.Linear(D_OUT, D_IN))
    parts = adapters()
    back = [Adapter(torch.randn(4, D_OUT), torch.randn(D_IN, 4)) for _ in range(3)]
    loaded = [
        LoadedAdapter(str(j), {"1": back[j], **({"0": parts[j]} if j < 2 else {})}, Path(str(j)))
        for j in range(3)
    ]
    handle = inject(model, loaded, seed=SEED, p=[0.1, 0.7, 0.9], weights=[1.0, 0.0, 1.0])
    before = model(X), [(layer.p, layer.weights) for layer in handle.layers.values()]
    with pytest.raises(ValueError, match=r"layer 1: .*smallest admissible"):
        handle.set(p=[0.5, 0.5, 0.5], weights=[1.0, 1.0, 1.0], sample=4)
    assert torch.equal(model(X), before[0])
    assert [(layer.p, layer.weights) for layer in handle.layers.values()] == before[1]
