"""FusedOrthoLoRALinear: when its factors are packed, after changes and in copies."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from layers import both_ways, build, by_op, changed_in_place
from packs import NEEDS_KERNELS, count_packs
from servers import Server
from torch import nn

from lora_ortho import Adapter, FusedOrthoLoRALinear


def changed_data(module: FusedOrthoLoRALinear) -> None:
    module.adapters[0].lora_A.data = module.adapters[0].lora_A.data * 2


def cut_rank(module: FusedOrthoLoRALinear) -> None:
    """The same memory, read with another shape."""
    factors = module.adapters[0]
    factors.lora_A.data, factors.lora_B.data = factors.lora_A.data[:2], factors.lora_B.data[:, :2]


def replaced(module: FusedOrthoLoRALinear) -> None:
    factors = module.adapters[2]
    value = torch.randn(40, 4)
    factors.lora_B = nn.Parameter(value) if module.trainable else value


def loaded(module: FusedOrthoLoRALinear) -> None:
    module.load_state_dict({k: v + 0.5 for k, v in module.state_dict().items()})


def rounded(module: FusedOrthoLoRALinear) -> None:
    module.half().float()


@pytest.mark.parametrize(
    "change", [changed_in_place, changed_data, cut_rank, replaced, loaded, rounded]
)
@pytest.mark.parametrize("trainable", [False, True])
def test_factors_are_packed_again_after_a_change(
    server: Server, trainable: bool, change: Any
) -> None:
    module, x, _ = build(trainable=trainable, backend=server.backend)
    before = both_ways(module, x)
    change(module)
    after = both_ways(module, x)
    adapters = [
        Adapter(f.lora_A.detach().clone(), f.lora_B.detach().clone(), 0.5 + j, 1.5 - j)
        for j, f in enumerate(module.adapters)
    ]
    assert torch.equal(after, by_op(module, x, adapters).detach())
    assert not torch.equal(before, after)


@NEEDS_KERNELS
def test_factors_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, _ = build(trainable=True, backend="cpu")
    packs = count_packs(monkeypatch)
    with torch.no_grad():
        for _ in range(3):
            module(x)
    assert len(packs) == 1
    for _ in range(3):  # an optimiser may have been at work: in every call, once for both passes
        module(x).sum().backward()
    assert len(packs) == 4
    with torch.no_grad():
        for _ in range(3):
            module(x)
    assert len(packs) == 5
    frozen, x, _ = build(backend="cpu")
    for _ in range(3):  # gradients of the input alone leave the pack for calls without any
        frozen(x.requires_grad_()).sum().backward()
        with torch.no_grad():
            frozen(x)
    assert len(packs) == 7  # the op's and the prepared call's


def test_copies_are_independent() -> None:
    module, x, _ = build(trainable=True)
    before = both_ways(module, x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(both_ways(other, x), before)
        changed_in_place(other)
        assert not torch.equal(both_ways(other, x), before)
        assert torch.equal(both_ways(module, x), before)
