"""The compiled CPU kernels: raw addresses into :mod:`lora_ortho._C`."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_ortho.backends.native import DTYPE_NAMES, matrix
from lora_ortho.problem import Place, Problem

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
    problem: Problem,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    *,
    out: Packed | None = None,
) -> Packed:
    """Factors in the kernels' own layout and compute dtype; see ``backends.reference.pack``.

    Always in new memory: an older pack may be in use by another thread.
    """
    lora_A, lora_B = ([t.resolve_neg() for t in factors] for factors in (lora_A, lora_B))
    native = _C.Packed(
        problem.method,
        DTYPE_NAMES[problem.dtype],
        problem.d_in,
        problem.d_out,
        list(problem.ranks),
        list(problem.thresholds),
        [(*matrix(A), DTYPE_NAMES[A.dtype]) for A in lora_A],
        [(*matrix(B), DTYPE_NAMES[B.dtype]) for B in lora_B],
        isa=os.environ.get(ISA_VARIABLE, "auto"),
    )
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
    """See ``backends.reference.forward``."""
    tokens = x.shape[0]
    y = _output((tokens, packed.d_out), x.dtype) if out is None else out
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
    needs: tuple[bool, bool, bool, bool],
    factor_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``backends.reference.backward``."""
    rank_sum = s.shape[1]
    shapes = (x.shape, (rank_sum, x.shape[1]), (grad.shape[1] * rank_sum,), gains.shape)
    dtypes = (x.dtype, factor_dtype, factor_dtype, gains.dtype)
    outputs = tuple(
        _output(shape if needed else (0,), dtype)
        for shape, dtype, needed in zip(shapes, dtypes, needs, strict=True)
    )
    dx, dA, dB, dgains = outputs
    addresses = [out.data_ptr() if need else 0 for out, need in zip(outputs, needs, strict=True)]
    packed.native.backward(
        matrix(grad),
        matrix(x),
        s.data_ptr(),
        *addresses[:3],
        DTYPE_NAMES[factor_dtype],
        addresses[3],
        x.shape[0],
        gains.data_ptr(),
        _unsigned(seed),
        *place,
        torch.get_num_threads(),
    )
    return dx, dA, dB, dgains


def _output(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor; a large one on huge pages, where the system gives them on request."""
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.nbytes >= _HUGE_BYTES:
        _C.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def _unsigned(seed: int | Tensor) -> int:
    value = seed if isinstance(seed, int) else int(seed.item())
    return value if value >= 0 else value + _WRAP
