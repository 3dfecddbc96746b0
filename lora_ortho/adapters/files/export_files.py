"""The bytes of an exported merge: a folder of PEFT, or the file that diffusers reads."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lora_ortho.adapters.base_weights import lies_transposed
from lora_ortho.adapters.loaded import LoadedAdapter
from lora_ortho.module import Adapter

from .image_file import DIFFUSERS_FILE, DIFFUSERS_METADATA
from .peft_config import CONFIG_FILE
from .peft_folder import PREFIX, TENSOR_FILE

# The parts of pipelines that some pipeline's load_lora_weights reads.
_LOADABLE = """
    unet transformer transformer_2 transformer_ref connectors text_conditioner text_encoder
    text_encoder_2
"""
LOADABLE = frozenset(_LOADABLE.split())


def export_files(
    merged: LoadedAdapter,
    modules: Mapping[str, nn.Module],
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
) -> dict[str, bytes]:
    """Every file of an export by its path: the folder that PEFT reads, and of a pipeline the file
    that diffusers reads, beside what PEFT reads for the part, in a subfolder for each where it
    adapts several.

    Args:
        modules: of the base model or pipeline by name; none where it is not known.
        dtype: of the tensors; None is their own.
        metadata: for the headers.
    """
    if not merged.parts:
        return _peft_folder(_Model(merged, merged.layers, merged.kernels, modules, dtype), metadata)
    found = {
        part: _Model(
            merged,
            _inside(part, merged.layers),
            _inside(part, merged.kernels),
            _inside(part, modules),
            dtype,
        )
        for part in sorted({name.partition(".")[0] for name in merged.layers})
    }
    files = _diffusers_file(found, metadata)
    for part, model in found.items():
        where = f"{part}/" if len(found) > 1 else ""
        files |= {where + name: data for name, data in _peft_folder(model, metadata).items()}
    return files


@dataclass(frozen=True)
class _Model:
    """What is written for one model: layers, kernels and modules by their names in it."""

    merged: LoadedAdapter
    layers: Mapping[str, Adapter]
    kernels: Mapping[str, tuple[int, ...]]
    modules: Mapping[str, nn.Module]
    dtype: torch.dtype | None


def _peft_folder(model: _Model, metadata: Mapping[str, str]) -> dict[str, bytes]:
    """adapter_config.json and adapter_model.safetensors, by name.

    A layer of another rank than most has lora_B times rank / lora_alpha: then lora_alpha over a
    layer's own rank is its scaling for every reader, those that know no alpha_pattern included.
    """
    config = _config(model)
    alpha = config["lora_alpha"]
    layers = {n: _times(part, part.lora_A.shape[0] / alpha) for n, part in model.layers.items()}
    tensors = _tensors(PREFIX, replace(model, layers=layers))
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return {CONFIG_FILE: text.encode(), TENSOR_FILE: _safetensors(tensors, metadata)}


def _diffusers_file(models: Mapping[str, _Model], metadata: Mapping[str, str]) -> dict[str, bytes]:
    """One file for all parts of a pipeline, with PEFT's configuration of each in its header.

    Readers that pass over the header take scaling 1, which is what it says.
    """
    fields: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for part, model in models.items():
        config = _config(model)
        config["alpha_pattern"] = config["rank_pattern"]
        fields |= {f"{part}.{field}": value for field, value in config.items()}
        tensors |= _tensors(f"{part}.", model)
    header = {**metadata, DIFFUSERS_METADATA: json.dumps(fields, sort_keys=True)}
    return {DIFFUSERS_FILE: _safetensors(tensors, header)}


def stranger(folder: Path, *, inner: bool = False) -> Path | None:
    """The first thing in a folder that is none of the files above, nor what PEFT puts beside them.

    Args:
        inner: the folder is that of one part of a pipeline.
    """
    known = {CONFIG_FILE, TENSOR_FILE} | (set() if inner else {DIFFUSERS_FILE})
    if (folder / CONFIG_FILE).is_file():
        known.add("README.md")
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not inner and not path.is_symlink():
            found = stranger(path, inner=True) if (path / CONFIG_FILE).is_file() else path
            if found is not None:
                return found
        elif path.name not in known or not path.is_file():
            return path
    return None


def _times(part: Adapter, factor: float) -> Adapter:
    bias = None if part.bias is None else part.bias * factor
    return replace(part, lora_B=part.lora_B * factor, bias=bias)


def _inside(part: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """What lies in one part of a pipeline, by its name there."""
    start = f"{part}."
    return {name.removeprefix(start): x for name, x in found.items() if name.startswith(start)}


def with_equal_ranks(merged: LoadedAdapter) -> LoadedAdapter:
    """The same function with one rank for all layers: rows of zeros where one has fewer."""
    most = max(part.lora_A.shape[0] for part in merged.layers.values())
    return replace(merged, layers={n: _widened(part, most) for n, part in merged.layers.items()})


def _widened(part: Adapter, rank: int) -> Adapter:
    more = rank - part.lora_A.shape[0]
    lora_A = nn.functional.pad(part.lora_A, (0, 0, 0, more))
    return replace(part, lora_A=lora_A, lora_B=nn.functional.pad(part.lora_B, (0, more)))


def _tensors(prefix: str, model: _Model) -> dict[str, Tensor]:
    """The tensors of one model by their keys; where one layer has a bias, all have one."""
    has_bias = any(part.bias is not None for part in model.layers.values())
    found: dict[str, Tensor] = {}
    for name, part in model.layers.items():
        kernel = model.kernels.get(name, ())
        ones = (1,) * len(kernel)
        lora_A, lora_B, bias = part.lora_A, part.lora_B, part.bias
        if kernel:
            lora_A = lora_A.reshape(lora_A.shape[0], -1, *kernel)
        found[f"{prefix}{name}.lora_A.weight"] = lora_A
        found[f"{prefix}{name}.lora_B.weight"] = lora_B.reshape(*lora_B.shape, *ones)
        if has_bias:
            bias = lora_B.new_zeros(lora_B.shape[0]) if bias is None else bias
            found[f"{prefix}{name}.lora_B.bias"] = bias
    found = {key: tensor.to("cpu", model.dtype).contiguous() for key, tensor in found.items()}
    for key, tensor in found.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{key} is not finite in {tensor.dtype}; choose a wider dtype")
    return found


def _config(model: _Model) -> dict[str, Any]:
    """PEFT's configuration of one model: one rank for most layers, a pattern for the others."""
    ranks = {name: part.lora_A.shape[0] for name, part in model.layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    found = [model.modules[name] for name in ranks if name in model.modules]
    transposed = model.merged.settings.get("fan_in_fan_out", False)
    return {
        "init_lora_weights": True,
        **model.merged.settings,
        "peft_type": "LORA",
        "base_model_name_or_path": model.merged.base_model,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank},
        "target_modules": _target_modules(model),
        "lora_bias": any(part.bias is not None for part in model.layers.values()),
        "fan_in_fan_out": any(map(lies_transposed, found)) if found else transposed,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def _target_modules(model: _Model) -> list[str] | str:
    """The shortest ends of names that select these layers and no other module, as PEFT does it.

    Where even a whole name is the end of another's, a pattern; without a model the ends that
    selected the merged adapters' layers, else the names.
    """
    names, leaves = list(model.layers), model.merged.leaves
    if not model.modules:
        return names if leaves is None else sorted(leaves)
    wanted, own = Counter(_ends(names)), Counter(_ends(model.modules))
    found = set()
    for name in names:
        end = next((end for end in _ends([name]) if wanted[end] == own[end]), None)
        if end is None:
            return "|".join(map(re.escape, names))
        found.add(end)
    return sorted(found)


def _ends(names: Iterable[str]) -> Iterable[str]:
    """Of each name its last component, the last two, and so on."""
    for name in names:
        parts = name.split(".")
        for start in range(len(parts) - 1, -1, -1):
            yield ".".join(parts[start:])


def _safetensors(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file whose bytes depend on nothing else: metadata stands in name order."""
    data = save(tensors, {"format": "pt", **metadata})
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
