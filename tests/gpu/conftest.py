"""Tests on a GPU. With LORA_ORTHO_GPU_REHEARSAL=1 the CPU stands in, so that they can be tried.

In a rehearsal Triton's interpreter runs its kernels, and what needs the device itself is skipped.
"""

from __future__ import annotations

import os

import pytest
import torch
from on_device import REHEARSAL

from lora_ortho import backends

# torch's deterministic mode asks for it, before the first product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def device() -> torch.device:
    """The GPU, or in a rehearsal the CPU."""
    if torch.cuda.is_available() and not REHEARSAL:
        return torch.device("cuda", torch.cuda.current_device())
    if not REHEARSAL:
        pytest.skip("needs an NVIDIA GPU")
    return torch.device("cpu")


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """The GPU itself; nothing stands in."""
    if device.type != "cuda":
        pytest.skip("needs an NVIDIA GPU, and a rehearsal has none")
    return device


@pytest.fixture(params=["reference", "triton", "cuda"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Each backend that serves the device here."""
    name: str = request.param
    reason = backends.available()[name]
    if reason is None and device.type == "cpu" and name == "cuda":
        reason = "a rehearsal has no device for them"
    if reason is not None:
        pytest.skip(f"the {name} kernels cannot run: {reason}")
    return name
