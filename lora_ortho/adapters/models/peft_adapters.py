"""The adapters in a model's PEFT layers, as if they had been loaded from files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_ortho.adapters.components import components
from lora_ortho.adapters.files.peft_config import reader_settings
from lora_ortho.adapters.loaded import LoadedAdapter, agreed
from lora_ortho.module import Adapter

from .peft_checks import (
    configs_of,
    layer_problems,
    merged_on,
    model_problems,
    pick,
    raise_problems,
    saving_problems,
    tuner_layers,
    warn_of_changed_bases,
)


def adapters_of(model: Any, adapters: Sequence[str] | None = None) -> list[LoadedAdapter]:
    """The adapters that a model with PEFT layers holds, as if they had been loaded.

    Args:
        model: as for `attach`; attached or not.
        adapters: names, in merge order; None takes those that are active.
    Returns:
        One for each name, with PEFT's present scaling; factors share memory with the model's.
    Raises:
        TypeError, ValueError: as for `attach`; an adapter that changes more than its layers.
    """
    layers = tuner_layers(model, attached=True)
    order, every = pick(adapters, layers), adapters is not None
    problems = [*model_problems(model, order), *layer_problems(layers, order, every)]
    problems += saving_problems(model, order)
    raise_problems([problem for problem in problems if problem.adapters], "take adapters")
    warn_of_changed_bases(model, order)
    found: dict[str, dict[str, Adapter]] = {name: {} for name in order}
    kernels: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in order}
    for entry in layers:
        for name in merged_on(entry.module, order, every):
            A, B = (part[name] for part in (entry.module.lora_A, entry.module.lora_B))
            bias = None if B.bias is None else _whole(B.bias, entry.name, 1)
            found[name][entry.name] = Adapter(
                _whole(A.weight, entry.name, 2).flatten(1),
                _whole(B.weight, entry.name, 2).flatten(1),
                scaling=float(entry.module.scaling[name]),
                bias=bias,
                name=name,
            )
            if A.weight.dim() > 2:
                kernels[name][entry.name] = tuple(A.weight.shape[2:])
    split = "" not in components(model)
    made = []
    for n in order:
        layers_of, digest = dict(sorted(found[n].items())), {"tensors": _digest(found[n])}
        base, settings = _told(model, n)
        parts = frozenset(name.partition(".")[0] for name in layers_of if split)
        made.append(LoadedAdapter(n, layers_of, Path(n), base, kernels[n], digest, settings, parts))
    return made


def _told(model: Any, name: str) -> tuple[str | None, dict[str, Any]]:
    """Base model and reader's fields that PEFT's configurations of an adapter agree on."""
    roots = components(model).values()
    fields = [configs_of(root)[name].to_dict() for root in roots if name in configs_of(root)]
    bases = {field.get("base_model_name_or_path") for field in fields}
    base = bases.pop() if len(bases) == 1 else None
    return base or None, agreed([reader_settings(field) for field in fields])


def _whole(tensor: Any, layer: str, least: int) -> torch.Tensor:
    """A tensor of an adapter, gathered where FSDP2 or tensor parallelism split it."""
    found: torch.Tensor = tensor.detach()
    if hasattr(found, "full_tensor"):
        found = found.full_tensor()
    if found.dim() < least or 0 in found.shape:
        raise ValueError(
            f"layer {layer}: its adapters are split among processes; export inside of "
            f"FullyShardedDataParallel.summon_full_params(model)"
        )
    return found


def _digest(layers: Mapping[str, Adapter]) -> str:
    """SHA-256 over names, dtypes and bytes of all factors, in name order."""
    digest = hashlib.sha256()
    for name in sorted(layers):
        part = layers[name]
        digest.update(f"{name} {part.scaling!r} ".encode())
        for tensor in (part.lora_A, part.lora_B, part.bias):
            if tensor is not None:
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
                # A copy: memory that numpy saw cannot be freed by those who own it, as FSDP does.
                copy = tensor.cpu().contiguous().view(torch.uint8).clone()
                digest.update(copy.numpy().tobytes())
    return digest.hexdigest()
