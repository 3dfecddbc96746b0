"""The compiled CUDA kernels: raw device addresses into :mod:`lora_ortho._C`."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_ortho.backends.base import Gradients, Needs, empty_gradients
from lora_ortho.backends.native import DTYPE_NAMES, factors, layer, matrix
from lora_ortho.problem import Place, Problem

name, devices, preference, copies = "cuda", ("cuda",), 10, True

_C: Any = None
_REASON: str | None = None
try:
    _C = importlib.import_module("lora_ortho._C")
except ImportError as error:
    _REASON = f"lora_ortho was installed without its compiled kernels: {error}"

# Where the kernels run; the tests run them on the CPU.
_DEVICE = "cuda"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MASK = (1 << 64) - 1


class Packed(NamedTuple):
    """Factors in the kernels' layout, and the sizes of what they make."""

    native: Any  # lora_ortho._C.CudaFactors
    buffer: Tensor  # uint8, on the device
    d_out: int
    rank_sum: int


def unavailable() -> str | None:
    """Why the kernels cannot run here; None where they can."""
    if _REASON is not None:
        return _REASON
    reason: str | None = _C.cuda_unavailable()
    return reason


def supports(problem: Problem) -> str | None:
    """Why the kernels cannot serve a problem; None where they can."""
    if problem.device != _DEVICE:
        return f"x is on a {problem.device} device, and the kernels run on NVIDIA GPUs"
    if problem.dtype not in _DTYPES:
        return f"the CUDA kernels serve float32, bfloat16 and float16, not {problem.dtype}"
    return None


def pack(
    problem: Problem, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], out: Packed | None = None
) -> Packed:
    lora_A, lora_B = ([t.detach().resolve_neg() for t in tensors] for tensors in (lora_A, lora_B))
    device = lora_A[0].device
    with _current(device):
        out = _empty_pack(problem, device) if out is None else out
        address = out.buffer.data_ptr()
        out.native.pack(factors(lora_A), factors(lora_B), address, _stream(device))
    return out


def _empty_pack(problem: Problem, device: torch.device) -> Packed:
    native = _C.CudaFactors(*layer(problem))
    buffer = torch.empty(native.nbytes, dtype=torch.uint8, device=device)
    return Packed(native, buffer, problem.d_out, sum(problem.ranks))


def forward(
    packed: Packed,
    x: Tensor,
    base: Tensor | None,
    gains: Tensor,
    seed: int | Tensor,
    place: Place,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    tokens, device = x.shape[0], x.device
    with _current(device):
        gains = gains.to(torch.float32)
        y = x.new_empty((tokens, packed.d_out)) if out is None else out
        s = x.new_empty((tokens, packed.rank_sum))
        workspace = _workspace(packed.native.forward_bytes(tokens), device)
        packed.native.forward(
            packed.buffer.data_ptr(),
            matrix(x),
            None if base is None else matrix(base),
            y.data_ptr(),
            s.data_ptr(),
            workspace.data_ptr(),
            workspace.numel(),
            _call(tokens, gains, seed, place, device),
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
    tokens, device = x.shape[0], x.device
    with _current(device):
        wide_gains = gains.to(torch.float32)
        found = empty_gradients(x, s, packed.d_out, wide_gains, needs, factor_dtype)
        grad_x, grad_A, grad_B, grad_gains = (
            gradient.data_ptr() if need else 0 for gradient, need in zip(found, needs, strict=True)
        )
        workspace = _workspace(packed.native.backward_bytes(tokens), device)
        packed.native.backward(
            packed.buffer.data_ptr(),
            matrix(grad),
            matrix(x),
            s.data_ptr(),
            grad_x,
            grad_A,
            grad_B,
            DTYPE_NAMES[factor_dtype],
            grad_gains,
            workspace.data_ptr(),
            workspace.numel(),
            _call(tokens, wide_gains, seed, place, device),
        )
    return *found[:3], found[3].to(gains.dtype)


def _call(
    tokens: int, gains: Tensor, seed: int | Tensor, place: Place, device: torch.device
) -> tuple[int, ...]:
    """What every call ends with; a seed tensor is read by the kernels, on the device."""
    value, address = (seed & _MASK, 0) if isinstance(seed, int) else (0, seed.data_ptr())
    return (
        tokens,
        gains.data_ptr(),
        value,
        address,
        *place,
        _stream(device),
    )


def _workspace(nbytes: int, device: torch.device) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def _stream(device: torch.device) -> int:
    """Address of torch's current stream on a device."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes a GPU the current one: the kernels run on it."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
