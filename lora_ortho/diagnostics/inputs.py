"""Inputs of a task, layer by layer: collected from a model, and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from lora_ortho.adapters import LoadedAdapter

# Inputs of each adapter's own task: by adapter name, then by layer name, (samples, d_in).
Inputs = Mapping[str, Mapping[str, Tensor]]


def collect_inputs(
    model: nn.Module, layers: Iterable[str], run: Callable[[], object], *, limit: int = 1024
) -> dict[str, Tensor]:
    """What reaches the named layers while `run()` calls the model, for `inspect`.

    Args:
        layers: qualified names, of an adapter's layers say.
        run: calls the model on a task's data, as often as wanted.
        limit: rows kept of each layer's inputs, the first ones.
    Returns:
        (rows, d_in) by layer, in the dtype of the inputs, on the CPU.
    Raises:
        ValueError: the model has no such layer, or `run` did not reach it.
    """
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            room = limit - sum(len(rows) for rows in kept[name])
            if room > 0:
                kept[name].append(args[0].detach().flatten(0, -2)[:room].cpu())

        return keep

    handles = []
    try:
        for name in kept:
            try:
                module = model.get_submodule(name)
            except AttributeError:
                raise ValueError(f"layers: the model has no layer {name!r}") from None
            handles.append(module.register_forward_pre_hook(hook(name)))
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    missed = [name for name, rows in kept.items() if not rows]
    if missed:
        raise ValueError(f"layers: run() did not reach {missed[0]!r}")
    return {name: torch.cat(rows) for name, rows in kept.items()}


def check_inputs(named: Mapping[str, LoadedAdapter], inputs: Inputs) -> None:
    """Raise ValueError unless inputs fit the adapters whose tasks they are of."""
    for task, tensors in inputs.items():
        if task not in named:
            raise ValueError(f"inputs: {task!r} is not among the adapters {', '.join(named)}")
        for layer, x in tensors.items():
            part = named[task].layers.get(layer)
            if part is None:
                raise ValueError(f"inputs: adapter {task!r} has no layer {layer!r}")
            d_in = part.lora_A.shape[1]
            if x.dim() != 2 or x.shape[1] != d_in or not x.is_floating_point():
                raise ValueError(
                    f"inputs: {layer!r} of {task!r} must be floating point (samples, {d_in}), "
                    f"got {x.dtype} {tuple(x.shape)}"
                )
            if not bool(torch.isfinite(x).all()):
                raise ValueError(f"inputs: {layer!r} of {task!r} holds NaN or infinity")
