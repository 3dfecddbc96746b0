"""The compiled CPU kernels: raw addresses into :mod:`lora_ortho._C`."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_ortho.backends.base import Gradients, Needs, empty_gradients
from lora_ortho.backends.native import DTYPE_NAMES, factors, layer, matrix
from lora_ortho.problem import Place, Problem

name, devices, preference, copies = "cpu", ("cpu",), 10, True

_C: Any = None
_REASON: str | None = None
try:
    # After torch, so that both share the OpenMP library that torch brings.
    _C = importlib.import_module("lora_ortho._C")
except ImportError as error:
    _REASON = f"lora_ortho was installed without its compiled CPU kernels: {error}"
    # pip hides what a build prints, and the other backend would be noticed by its slowness alone.
    warnings.warn(
        f"{_REASON}; on CPUs the slow reference backend stands in (`lora-ortho doctor` says more)",
        RuntimeWarning,
        stacklevel=2,
    )

# Caps the instruction set; read when factors are packed. For tests and benchmarks.
ISA_VARIABLE = "LORA_ORTHO_CPU_ISA"

_WRAP = 1 << 64
# Outputs of at least two huge pages.
_HUGE_BYTES = 4 << 20


class Packed(NamedTuple):
    """Factors in the kernels' layout, and the sizes of what they make."""

    native: Any  # lora_ortho._C.Packed
    d_out: int
    rank_sum: int


def unavailable() -> str | None:
    """Why the kernels cannot run here; None where they can."""
    return _REASON


def instruction_sets() -> list[str]:
    """The instruction sets that were compiled and that this processor has, weakest first."""
    return [] if _REASON is not None else list(_C.isas())


def supports(problem: Problem) -> str | None:
    """Why the kernels cannot serve a problem; None where they can."""
    if problem.device != "cpu":
        return f"x is on a {problem.device} device, and the kernels run on the CPU"
    return None


def sampler(tensors: Sequence[Tensor]) -> Any:
    """Something whose ``hash()`` is that of a few elements of each CPU tensor of up to two
    dimensions, as they are now; None without the compiled part."""
    if _REASON is not None:
        return None
    matrices = [tensor if tensor.dim() == 2 else tensor.unsqueeze(0) for tensor in tensors]
    return _C.Sampler([(*matrix(t), *t.shape, t.element_size()) for t in matrices])


def pack(
    problem: Problem, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], out: Packed | None = None
) -> Packed:
    """Always in new memory: an older pack may be in use by another thread."""
    lora_A, lora_B = ([t.resolve_neg() for t in tensors] for tensors in (lora_A, lora_B))
    isa = os.environ.get(ISA_VARIABLE, "auto")
    native = _C.Packed(*layer(problem), factors(lora_A), factors(lora_B), isa=isa)
    return Packed(native, problem.d_out, sum(problem.ranks))


def forward(
    packed: Packed,
    x: Tensor,
    base: Tensor | None,
    gains: Tensor,
    seed: int | Tensor,
    place: Place,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    tokens = x.shape[0]
    y = _empty(x, (tokens, packed.d_out), x.dtype) if out is None else out
    s = torch.empty((tokens, packed.rank_sum), dtype=x.dtype)
    packed.native.forward(
        matrix(x),
        None if base is None else matrix(base),
        y.data_ptr(),
        s.data_ptr(),
        tokens,
        gains.data_ptr(),
        _unsigned(seed),
        *place,
        torch.get_num_threads(),
    )
    return y, s


def backward(
    packed: Packed,
    grad: Tensor,
    x: Tensor,
    s: Tensor,
    gains: Tensor,
    seed: int | Tensor,
    place: Place,
    needs: Needs,
    factor_dtype: torch.dtype,
) -> Gradients:
    found = empty_gradients(x, s, packed.d_out, gains, needs, factor_dtype, _empty)
    grad_x, grad_A, grad_B, grad_gains = (
        gradient.data_ptr() if need else 0 for gradient, need in zip(found, needs, strict=True)
    )
    packed.native.backward(
        matrix(grad),
        matrix(x),
        s.data_ptr(),
        grad_x,
        grad_A,
        grad_B,
        DTYPE_NAMES[factor_dtype],
        grad_gains,
        x.shape[0],
        gains.data_ptr(),
        _unsigned(seed),
        *place,
        torch.get_num_threads(),
    )
    return found


def _empty(_: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor; a large one on huge pages, where the system gives them on request."""
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.nbytes >= _HUGE_BYTES:
        _C.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def _unsigned(seed: int | Tensor) -> int:
    value = seed if isinstance(seed, int) else int(seed.item())
    return value if value >= 0 else value + _WRAP
