"""The gains w_j c_j / q̂_j as a tensor: merge weight, scaling, realised keep probability."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_ortho._torch_internals import all_plain
from lora_ortho.problem import DTYPES, Rule, finite_numbers

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def gain_dtype(device: str) -> torch.dtype:
    """The dtype in which gains travel to a type of device."""
    return torch.float64 if device == "cpu" else torch.float32


def weighted_gains(rule: Rule, weights: Sequence[float] | Tensor | None, x: Tensor) -> Tensor:
    """The gains as a (K,) tensor on the device of x, differentiable in weights that are a tensor.

    Args:
        rule: without merge weights.
        weights: K numbers or a (K,) tensor; None is 1.
    """
    count = len(rule.gains)
    if weights is None:
        return constants(rule.gains, x)
    if not isinstance(weights, Tensor):
        return constants(rule.weighted(finite_numbers("weights", weights, count)).gains, x)
    if weights.dtype not in DTYPES + _INTEGERS:
        raise TypeError(f"weights must be a floating point or integer tensor, got {weights.dtype}")
    if weights.shape != (count,):
        raise ValueError(f"weights must have shape ({count},), got {tuple(weights.shape)}")
    if weights.device != x.device:
        raise ValueError(f"weights must be on the device of x, {x.device}, got {weights.device}")
    return weights.to(gain_dtype(x.device.type)) * constants(rule.gains, x)


def constants(gains: tuple[float, ...], x: Tensor) -> Tensor:
    """Gains on the device of x, sent there once: a copy from the host ends a graph's capture."""
    if x.is_cuda and all_plain((x,)):
        return _on_device(gains, x.device)
    return torch.tensor(gains, dtype=gain_dtype(x.device.type), device=x.device)


@functools.lru_cache(maxsize=1024)
def _on_device(gains: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(gains, dtype=gain_dtype(device.type), device=device)
