"""Outputs and gradients of every backend against float64, over the case table."""

from __future__ import annotations

import pytest
import torch
from cases import CHECKED, DTYPES, METHODS, Case, same_rank
from servers import Server
from value_checks import (
    check,
    check_dtypes_of_gradients,
    check_same_bits,
    check_single_gradients,
)


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
    check_dtypes_of_gradients(server, factor_dtype)


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
    check_same_bits(server, threads, dtype, case)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_are_not_asked_for(server: Server, method: str) -> None:
    """Each gradient alone equals the one among all."""
    check_single_gradients(server, method)
