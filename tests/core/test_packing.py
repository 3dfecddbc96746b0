"""When factors are packed, how long packed factors live, and the prepared call."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from cases import make, same_rank
from op_checks import check_prepared_call
from packs import NEEDS_KERNELS, count_packs
from servers import Server

from lora_ortho import fused_ortho_lora, packing
from lora_ortho.backends import cpu
from lora_ortho.packing import PackedAdapters
from lora_ortho.problem import METHODS

pytestmark = NEEDS_KERNELS
CASE = same_rank(7, 12, 50, 3, 4)


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often the CPU backend packs."""
    return count_packs(monkeypatch)


def call(tensors: Any, **arguments: Any) -> torch.Tensor:
    return fused_ortho_lora(*tensors[:3], **{"seed": 1, "backend": "cpu", **arguments})


def test_the_op_packs_once(packs: list[int]) -> None:
    tensors = make(CASE, torch.float32)
    for seed in range(4):
        call(tensors, seed=seed)
    assert len(packs) == 1
    tensors.x.requires_grad_()
    call(tensors).sum().backward()
    assert len(packs) == 1


def test_the_op_packs_again_for_another_problem(packs: list[int]) -> None:
    tensors = make(CASE, torch.float32)
    for arguments in ({}, {"method": "direct"}, {"p": [0.9] * 3}, {}, {"method": "direct"}):
        call(tensors, **arguments)
    assert len(packs) == 3
    for rate in (0.8, 0.85, 0.95, 0.99):  # more problems than are kept
        call(tensors, p=[rate] * 3)
    call(tensors)
    assert len(packs) == 8


@pytest.mark.parametrize("which", [1, 2])
def test_the_op_packs_again_after_a_change(packs: list[int], which: int) -> None:
    tensors = make(CASE, torch.float32)
    factor = tensors[which][2]
    call(tensors)
    factor.add_(1)
    call(tensors)
    assert len(packs) == 2
    factor.data = factor.data.clone()
    call(tensors)
    assert len(packs) == 3
    for made in (4, 5):  # other tensors on the same memory, which do not count its changes
        tensors[which][2] = factor.data
        call(tensors)
        assert len(packs) == made
        factor.add_(1)


def test_alternating_first_factors_with_the_same_others(packs: list[int]) -> None:
    """The cache hangs on lora_B[0]; a different lora_A beside it is noticed."""
    tensors, other = make(CASE, torch.float32), make(CASE, torch.float32, seed=1)
    first = call(tensors)
    second = fused_ortho_lora(tensors.x, other.lora_A, tensors.lora_B, seed=1, backend="cpu")
    assert len(packs) == 2
    assert not torch.equal(first, second)
    assert torch.equal(call(tensors), first)


def test_packed_factors_die_with_their_tensors() -> None:
    gc.collect()
    before = len(packing._storages)
    tensors = make(CASE, torch.float32)
    call(tensors)
    assert len(packing._storages) == before + 1
    del tensors
    gc.collect()
    assert len(packing._storages) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_prepared_call_is_the_op(server: Server, method: str, dtype: torch.dtype) -> None:
    check_prepared_call(server, method, dtype)


def test_prepared_defaults_are_those_of_the_op(server: Server) -> None:
    tensors = make(CASE, torch.float32)
    prepared = PackedAdapters(*tensors[1:3], torch.float32, backend=server.backend)
    expected = fused_ortho_lora(*tensors[:3], seed=3, backend=server.backend)
    assert torch.equal(prepared.apply(tensors.x, None, 3), expected)
    assert prepared.holds([*tensors.lora_A, *tensors.lora_B])
    tensors.lora_B[1].zero_()
    assert not prepared.holds([*tensors.lora_A, *tensors.lora_B])


def test_the_cap_on_the_instruction_set_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make(CASE, torch.float32)
    for isa in cpu.instruction_sets():
        monkeypatch.setenv(cpu.ISA_VARIABLE, isa)
        prepared = PackedAdapters(*tensors[1:3], torch.float32, backend="cpu")
        assert prepared.packed.native.isa == isa
    monkeypatch.setenv(cpu.ISA_VARIABLE, "sse9")
    with pytest.raises(ValueError, match="sse9"):
        PackedAdapters(*tensors[1:3], torch.float32, backend="cpu")
