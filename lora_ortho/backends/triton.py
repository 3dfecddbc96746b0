"""The Triton kernels: the layer's products by torch, everything of size tokens x d_out fused.

Runs on NVIDIA and AMD GPUs; where Triton's interpreter is on (TRITON_INTERPRET=1), also on the CPU,
slowly, and only when named explicitly. s = x Aᵀ, grad_x = grad_s A and grad_A = grad_sᵀ x are
torch's own products, so they follow ``torch.backends.cuda.matmul.allow_tf32`` for float32; the
kernels never use tf32.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_ortho._torch_internals import WIDE_OUTPUT, constant_in_graphs
from lora_ortho.backends.base import Gradients, Needs, empty_gradients
from lora_ortho.mask_stream import seed_tensor
from lora_ortho.problem import Place, Problem

if TYPE_CHECKING:
    from lora_ortho.triton_kernels.launch import Factors

name, devices, preference, copies = "triton", ("cuda",), 20, True

OLDEST = (3, 6)  # as in pyproject.toml
MAX_RANK = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    """Why the kernels cannot run here; None where they can."""
    return _reason()


@functools.cache
def _reason() -> str | None:
    try:
        version: str = importlib.import_module("triton").__version__
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if tuple(int(word) for word in version.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"triton {version} is older than {oldest}, which the kernels are written for"
    if not interpreted() and not torch.cuda.is_available():
        return "torch sees no NVIDIA or AMD GPU (torch.cuda.is_available() is False)"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU, as it was when first asked."""
    return _interpreted()


@functools.cache
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


for _function in (unavailable, interpreted):
    constant_in_graphs(_function)


def supports(problem: Problem) -> str | None:
    """Why the kernels cannot serve a problem; None where they can."""
    served = ("cpu", "cuda") if interpreted() else devices
    if problem.device not in served:
        return f"x is on a {problem.device} device, and the kernels run on {' or '.join(served)}"
    if problem.dtype not in _DTYPES:
        return f"x is {problem.dtype}, and the kernels take float32, bfloat16 and float16"
    if max(problem.ranks) > MAX_RANK:
        return f"a rank is {max(problem.ranks)}, and the kernels take ranks up to {MAX_RANK}"
    return None


def pack(
    problem: Problem, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], out: Factors | None = None
) -> Factors:
    """Factors in the dtype of x, each B padded to one width."""
    out = _empty_factors(problem, lora_A[0].device) if out is None else out
    with torch.no_grad():
        torch.cat([A.to(problem.dtype) for A in lora_A], out=out.A)
        for j, rank in enumerate(problem.ranks):
            out.B[j, :, :rank] = lora_B[j]
    return out


def _empty_factors(problem: Problem, device: torch.device) -> Factors:
    from lora_ortho.triton_kernels.launch import Factors
    from lora_ortho.triton_kernels.launch_config import width_of

    ranks, dtype = problem.ranks, problem.dtype
    with torch.inference_mode(False):
        A = torch.empty((sum(ranks), problem.d_in), dtype=dtype, device=device)
        shape = (len(ranks), problem.d_out, width_of(max(ranks)))
        B = torch.zeros(shape, dtype=dtype, device=device)
    rank = ranks[0] if len(set(ranks)) == 1 else 0
    return Factors(problem.draw.value, A, B, _table_on(problem, device), rank, sum(ranks))


@functools.lru_cache(maxsize=1024)
def _table_on(problem: Problem, device: torch.device) -> Tensor:
    """:func:`_table` on a device, sent there once: a copy from the host ends a graph's capture."""
    with torch.inference_mode(False):
        return torch.tensor(_table(problem), dtype=torch.int32, device=device)


def _table(problem: Problem) -> list[list[int]]:
    """For each adapter the first and the last 32-bit word, read as int32, whose upper half is one
    of its draws; its first column in s; its rank."""
    from lora_ortho.triton_kernels.mask_stream import signed

    rows, column = [], 0
    for (first, last), rank in zip(problem.intervals, problem.ranks, strict=True):
        rows.append([signed(first << 16), signed((last << 16) + 0xFFFF), column, rank])
        column += rank
    return rows


def forward(
    packed: Factors,
    x: Tensor,
    base: Tensor | None,
    gains: Tensor,
    seed: int | Tensor,
    place: Place,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from lora_ortho.triton_kernels.expand import expand
    from lora_ortho.triton_kernels.launch import gpu_of

    with torch.no_grad(), torch.autocast(x.device.type, enabled=False), _guard(x):
        s = x @ packed.A.T
        y = x.new_empty((x.shape[0], packed.B.shape[1])) if out is None else out
        if y.numel():
            key = seed_tensor(seed, x.device)
            gpu = gpu_of(x.device)
            expand(packed, gpu, y, base, s, gains.float(), key, place).run()
    return y, s


def backward(
    packed: Factors,
    grad: Tensor,
    x: Tensor,
    s: Tensor,
    gains: Tensor,
    seed: int | Tensor,
    place: Place,
    needs: Needs,
    factor_dtype: torch.dtype,
) -> Gradients:
    from lora_ortho.triton_kernels.grad_B import grad_B as grad_B_launch
    from lora_ortho.triton_kernels.grad_s import grad_s as grad_s_launch
    from lora_ortho.triton_kernels.launch import gpu_of

    with torch.no_grad(), torch.autocast(x.device.type, enabled=False), _guard(x):
        if x.shape[0] == 0:
            return empty_gradients(
                x, s, packed.B.shape[1], gains, needs, factor_dtype, Tensor.new_zeros
            )
        grad_x, grad_gains = x.new_empty(0), gains.new_empty(0)
        grad_A, grad_B = (x.new_empty(0, dtype=factor_dtype) for _ in "AB")
        key = seed_tensor(seed, x.device)
        call = (packed, gpu_of(x.device), grad, s, gains.float(), key, place)
        if needs.x or needs.A or needs.gains:
            launch, grad_s_parts, grad_gain_parts = grad_s_launch(*call)
            launch.run()
            grad_s = _sum_parts(grad_s_parts, x.dtype)
            grad_x = grad_s @ packed.A if needs.x else grad_x
            grad_A = _product(grad_s.T, x, factor_dtype) if needs.A else grad_A
            if needs.gains:
                grad_gains = grad_gain_parts.sum(dim=(0, 2)).to(gains.dtype)
        if needs.B:
            launch, grad_B_parts = grad_B_launch(*call, factor_dtype)
            launch.run()
            grad_B = _sum_parts(grad_B_parts, factor_dtype)
    return grad_x, grad_A, grad_B, grad_gains


def _guard(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of x the current one, on whose current stream Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first axis, in float32 and in a fixed order; rounded once."""
    return (parts[0] if parts.shape[0] == 1 else parts.sum(dim=0)).to(dtype)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b, accumulated in float32 and rounded once to ``dtype``."""
    if dtype == a.dtype:
        return a @ b
    if a.is_cuda and dtype == torch.float32 and WIDE_OUTPUT:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a.float() @ b.float()).to(dtype)
