"""The CUDA backend with its kernels on the CPU (tests/cuda_host), in place of a GPU."""

from __future__ import annotations

import importlib.util
from functools import cache
from types import ModuleType

import pytest
from native import build

from lora_ortho.backends import cuda

# Sets how many multiprocessors the launches are laid out for.
MULTIPROCESSORS = "LORA_ORTHO_HOST_MULTIPROCESSORS"


@cache
def extension() -> ModuleType:
    """The Python extension whose CUDA kernels run on the CPU, thread by thread; built once."""
    (path,) = (build("cuda-host") / "python" / "lora_ortho").glob("_C.*.so")
    spec = importlib.util.spec_from_file_location("lora_ortho_cuda_host._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def use(patch: pytest.MonkeyPatch) -> None:
    """Makes backend="cuda" serve CPU tensors by the kernels on the host."""
    patch.setattr(cuda, "_C", extension())
    patch.setattr(cuda, "_REASON", None)
    patch.setattr(cuda, "_DEVICE", "cpu")
