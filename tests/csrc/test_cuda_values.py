"""The CUDA kernels, run on the CPU thread by thread, over the case table and its rule."""

from __future__ import annotations

import functools

import pytest
import torch
import value_checks
from cases import CHECKED, METHODS, Case, Tensors, make, same_rank
from cuda_host import MULTIPROCESSORS, use
from numerics import Expected, Results, assert_as_good, expected, masks_of, run
from servers import Server

from lora_ortho import fused_ortho_lora

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Masks that start at a multiple of eight columns, so that the widest accesses are possible.
PLACE = {"stream": 3, "sample": 2, "row_offset": 5, "col_offset": 24}
WIDE = (
    same_rank(1, 256, 128, 3, 16),
    same_rank(16, 72, 264, 3, 16),
    same_rank(70, 64, 272, 2, 32),
    Case(45, 40, 328, (8, 17, 1), p=(0.75, 0.9, 0.75)),
    Case(130, 64, 1000, (4, 4, 4), base=None),
    Case(20, 32, 136, (16,) * 12, p=(0.5,) + (0.98,) * 11),
    Case(33, 24, 160, (120, 9, 200)),
    Case(40, 40, 256, (8, 8), x="broadcast", base="broadcast", grad="broadcast"),
)


@pytest.fixture(autouse=True)
def _on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)


@pytest.mark.parametrize("case", CHECKED, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_case_table(dtype: torch.dtype, method: str, case: Case) -> None:
    value_checks.check(Server("cuda"), case, dtype, method)


@functools.cache
def prepare(case: Case, dtype: torch.dtype, method: str) -> tuple[Tensors, list[float], Expected]:
    """A case's tensors, scaling and what to compare with, at ``PLACE``."""
    tensors = make(case, dtype)
    masks, keep = masks_of(case, method, 77, **PLACE)
    scaling = [0.5 + 0.25 * (j % 3) for j in range(len(case.ranks))]
    return tensors, scaling, expected(tensors, masks, keep, scaling)


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("case", WIDE, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_wide_accesses(
    dtype: torch.dtype,
    method: str,
    case: Case,
    multiprocessors: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a small device and on a large one, where the sums are split more."""
    monkeypatch.setenv(MULTIPROCESSORS, str(multiprocessors))
    tensors, scaling, wanted = prepare(case, dtype, method)
    ours = run(
        fused_ortho_lora, tensors, p=case.p, scaling=scaling, method=method, seed=77,
        backend="cuda", **PLACE,
    )  # fmt: skip
    assert_as_good(ours, wanted)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_wide_factors_on_narrow_inputs(narrow: torch.dtype, method: str) -> None:
    case = same_rank(29, 40, 150, 3, 8)
    value_checks.check(Server("cuda"), case, narrow, method, factor_dtype=torch.float32)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_are_not_asked_for(method: str) -> None:
    value_checks.check_single_gradients(Server("cuda"), method)


@pytest.mark.parametrize("factor_dtype", [*DTYPES, torch.float64])
def test_gradients_have_the_dtype_of_their_factor(factor_dtype: torch.dtype) -> None:
    value_checks.check_dtypes_of_gradients(Server("cuda"), factor_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_call_gives_the_same_bits(dtype: torch.dtype) -> None:
    """Threads and blocks run in another order the second time."""
    tensors = make(same_rank(70, 64, 640, 16, 8), dtype)
    first, second = (run(fused_ortho_lora, tensors, seed=9, backend="cuda") for _ in "ab")
    for a, b in zip(flat(first), flat(second), strict=True):
        assert torch.equal(a, b)


def flat(results: Results) -> list[torch.Tensor]:
    """Every tensor of the results."""
    groups = [group if isinstance(group, list) else [group] for group in results]
    return [tensor for group in groups for tensor in group if tensor is not None]


def test_float64_is_declined() -> None:
    tensors = make(same_rank(2, 8, 8, 1, 1), torch.float64)
    with pytest.raises(ValueError, match=r"the CUDA kernels serve float32, bfloat16 and float16"):
        run(fused_ortho_lora, tensors, seed=1, backend="cuda")
