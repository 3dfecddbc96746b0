"""Outputs and gradients of every backend against float64, over the case table."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import CHECKED, DTYPES, METHODS, Case, Tensors, make, same_rank
from numerics import Expected, assert_as_good, expected, masks_of, run
from servers import Server

from lora_ortho import fused_ortho_lora

SEED = -0x123456789ABCDEF
PLACE = {"stream": 3, "sample": 2, "row_offset": 5, "col_offset": 11}


@functools.cache
def prepare(
    case: Case, dtype: torch.dtype, method: str, factor_dtype: torch.dtype | None
) -> tuple[Tensors, list[float], Expected]:
    """A case's tensors, scaling and what to compare with; the same for every server."""
    tensors = make(case, dtype, factor_dtype=factor_dtype)
    masks, keep = masks_of(case, method, SEED, **PLACE)
    scaling = [0.5 + 0.25 * (j % 3) for j in range(len(case.ranks))]
    return tensors, scaling, expected(tensors, masks, keep, scaling)


def check(
    server: Server,
    case: Case,
    dtype: torch.dtype,
    method: str,
    factor_dtype: torch.dtype | None = None,
) -> None:
    """One case, forward and backward, under the rule of numerics.py."""
    tensors, scaling, wanted = prepare(case, dtype, method, factor_dtype)
    ours = run(
        fused_ortho_lora, tensors, p=case.p, scaling=scaling, method=method, seed=SEED,
        backend=server.backend, **PLACE,
    )  # fmt: skip
    assert_as_good(ours, wanted)


@pytest.mark.parametrize("case", CHECKED, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_case_table(server: Server, dtype: torch.dtype, method: str, case: Case) -> None:
    check(server, case, dtype, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_wide_factors_on_narrow_inputs(server: Server, narrow: torch.dtype, method: str) -> None:
    """PEFT keeps float32 factors beside a half-precision base."""
    check(server, same_rank(29, 40, 150, 3, 8), narrow, method, factor_dtype=torch.float32)


@pytest.mark.parametrize("factor_dtype", DTYPES)
def test_gradients_have_the_dtype_of_their_factor(
    server: Server, factor_dtype: torch.dtype
) -> None:
    tensors = make(same_rank(4, 8, 24, 2, 3), torch.float32, factor_dtype=factor_dtype)
    found = run(fused_ortho_lora, tensors, seed=1, backend=server.backend)
    assert {t.dtype for t in (*found.lora_A, *found.lora_B)} == {factor_dtype}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads(server: Server, threads: int, dtype: torch.dtype, method: str) -> None:
    """Enough rows and columns that the work is split."""
    check(server, same_rank(300, 64, 520, 4, 16), dtype, method)


@pytest.mark.parametrize("case", [same_rank(257, 96, 384, 3, 16), same_rank(65, 64, 640, 16, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_call_gives_the_same_bits(
    server: Server, threads: int, dtype: torch.dtype, case: Case
) -> None:
    tensors = make(case, dtype)
    first, second = (run(fused_ortho_lora, tensors, seed=9, backend=server.backend) for _ in "ab")
    for a, b in zip(first, second, strict=True):
        pairs = zip(a, b, strict=True) if isinstance(a, list) else [(a, b)]
        assert all(torch.equal(u, v) for u, v in pairs)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_are_not_asked_for(server: Server, method: str) -> None:
    """Each gradient alone equals the one among all."""
    tensors = make(same_rank(13, 20, 70, 3, 4), torch.float32)
    everything = run(fused_ortho_lora, tensors, seed=4, method=method, backend=server.backend)
    names = ("x", "base", "weights", "lora_A", "lora_B")
    for name in names:
        leaves = {n: _detached(getattr(tensors, n)) for n in names}
        wanted = leaves[name][1] if isinstance(leaves[name], list) else leaves[name]
        wanted.requires_grad_()
        x, lora_A, lora_B = (leaves.pop(n) for n in ("x", "lora_A", "lora_B"))
        y = fused_ortho_lora(
            x, lora_A, lora_B, **leaves, seed=4, method=method, backend=server.backend
        )
        y.backward(tensors.grad)
        expected = getattr(everything, name)
        assert torch.equal(wanted.grad, expected[1] if isinstance(expected, list) else expected)


def _detached(value: object) -> object:
    return [t.detach() for t in value] if isinstance(value, list) else value.detach()
