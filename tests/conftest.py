"""What every test runs under: poisoned outputs, a fixed generator, one server at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from servers import SERVERS, Server

from lora_ortho.backends import cpu

# Triton's interpreter stands in where there is no GPU; it must be on before a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fills what torch.empty returns with NaN, so that an element nobody wrote is noticed."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the tensors are small; tests about threads take the fixture below
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=SERVERS, ids=str)
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A backend, with the CPU kernels held to one instruction set."""
    chosen: Server = request.param
    if chosen.isa is not None:
        monkeypatch.setenv(cpu.ISA_VARIABLE, chosen.isa)
    return chosen


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request: pytest.FixtureRequest, _poisoned: None) -> int:
    """A number of threads for torch and so for the kernels."""
    torch.set_num_threads(request.param)
    return int(request.param)
