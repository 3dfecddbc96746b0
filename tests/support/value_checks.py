"""Outputs and gradients of a server against float64, and against its own other calls."""

from __future__ import annotations

import functools

import torch
from cases import Case, Tensors, make, same_rank
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


def check_dtypes_of_gradients(server: Server, factor_dtype: torch.dtype) -> None:
    tensors = make(same_rank(4, 8, 24, 2, 3), torch.float32, factor_dtype=factor_dtype)
    found = run(fused_ortho_lora, tensors, seed=1, backend=server.backend)
    assert {t.dtype for t in (*found.lora_A, *found.lora_B)} == {factor_dtype}


def check_same_bits(server: Server, threads: int, dtype: torch.dtype, case: Case) -> None:
    tensors = make(case, dtype)
    first, second = (run(fused_ortho_lora, tensors, seed=9, backend=server.backend) for _ in "ab")
    for a, b in zip(first, second, strict=True):
        pairs = zip(a, b, strict=True) if isinstance(a, list) else [(a, b)]
        assert all(torch.equal(u, v) for u, v in pairs)


def check_single_gradients(server: Server, method: str) -> None:
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
