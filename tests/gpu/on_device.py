"""The tensors of a case on a device, in the memory layout that the case asks for."""

from __future__ import annotations

import os

import torch
from cases import Case, Tensors, lay_out
from numerics import Results
from torch import Tensor

REHEARSAL = os.environ.get("LORA_ORTHO_GPU_REHEARSAL", "0") not in ("", "0")


def move(tensors: Tensors, case: Case, device: torch.device) -> Tensors:
    """The same tensors on a device."""

    def there(tensor: Tensor, layout: str) -> Tensor:
        return lay_out(tensor.to(device), layout)

    base = tensors.base
    return Tensors(
        there(tensors.x, case.x),
        [there(A, case.factors) for A in tensors.lora_A],
        [there(B, case.factors) for B in tensors.lora_B],
        tensors.weights.to(device),
        None if base is None or case.base is None else there(base, case.base),
        there(tensors.grad, case.grad),
    )


def back(results: Results) -> Results:
    """Results on the CPU."""
    base = None if results.base is None else results.base.cpu()
    lists = ([t.cpu() for t in group] for group in (results.lora_A, results.lora_B))
    return Results(results.y.cpu(), results.x.cpu(), base, results.weights.cpu(), *lists)
