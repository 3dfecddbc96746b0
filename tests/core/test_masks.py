"""The masks inside every backend's kernels, bit for bit, forward and backward."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES
from servers import Server
from spelled import PLACES, check_backward, check_forward, check_halves, codes, rates, spelled

from lora_ortho import fused_ortho_lora, mask_stream


@pytest.mark.parametrize("place", PLACES, ids=range(len(PLACES)))
@pytest.mark.parametrize("method", ["orthogonal", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(server: Server, dtype: torch.dtype, method: str, place: dict) -> None:
    check_forward(server, dtype, method, place)


@pytest.mark.parametrize("place", PLACES, ids=range(len(PLACES)))
@pytest.mark.parametrize("method", ["orthogonal", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(server: Server, dtype: torch.dtype, method: str, place: dict) -> None:
    """Row m of x is 2**m, so with a gradient of ones element n of grad_B_j spells in binary in
    which rows adapter j owns column n."""
    check_backward(server, dtype, method, place)


@pytest.mark.parametrize("method", ["orthogonal", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_halves_are_the_whole(server: Server, dtype: torch.dtype, method: str) -> None:
    """Split between rows and between columns, at places that fit no tile."""
    check_halves(server, dtype, method)


@pytest.mark.parametrize("method", ["orthogonal", "dropout"])
def test_threads_do_not_change_masks(server: Server, threads: int, method: str) -> None:
    p = rates(method, 3)
    lora_A, lora_B, keep, thresholds = spelled(method, 3, 16, 1030, torch.float32, p)
    y = fused_ortho_lora(
        torch.ones(513, 1), lora_A, lora_B, p=p, scaling=keep, method=method, seed=5,
        backend=server.backend,
    )  # fmt: skip
    assert torch.equal(y.double(), codes(5, 513, 1030, thresholds, method, {}))


def test_masks_never_overlap() -> None:
    """Owners are single by construction; here in what the kernels multiply."""
    p = [0.5, 0.7, 0.8]
    thresholds, _ = mask_stream.thresholds(p, "orthogonal")
    masks = mask_stream.masks(3, range(2000), range(2048), thresholds, "orthogonal")
    assert int(torch.stack(masks).sum(0).max()) == 1
