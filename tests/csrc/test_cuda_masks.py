"""The masks in the CUDA kernels, run on the CPU, bit for bit, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from cuda_host import MULTIPROCESSORS, use
from servers import Server
from spelled import PLACES, check_backward, check_forward, check_halves

CUDA = Server("cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A multiple of eight columns, beyond 32 bits.
ALIGNED = ({"col_offset": (1 << 33) + 64, "row_offset": 8},)


@pytest.fixture(autouse=True, params=[1, 132])
def _on_the_host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    monkeypatch.setenv(MULTIPROCESSORS, str(request.param))


@pytest.mark.parametrize("place", [*PLACES, *ALIGNED], ids=str)
@pytest.mark.parametrize("method", ["orthogonal", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(dtype: torch.dtype, method: str, place: Mapping[str, int]) -> None:
    check_forward(CUDA, dtype, method, dict(place))


@pytest.mark.parametrize("place", [*PLACES, *ALIGNED], ids=str)
@pytest.mark.parametrize("method", ["orthogonal", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(dtype: torch.dtype, method: str, place: Mapping[str, int]) -> None:
    check_backward(CUDA, dtype, method, dict(place))


@pytest.mark.parametrize("method", ["orthogonal", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_halves_are_the_whole(dtype: torch.dtype, method: str) -> None:
    check_halves(CUDA, dtype, method)
