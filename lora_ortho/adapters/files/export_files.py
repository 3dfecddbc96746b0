"""The bytes of an exported merge: a folder of PEFT, or the file that diffusers reads."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lora_ortho.adapters.base_weights import lies_transposed
from lora_ortho.adapters.loaded import LoadedAdapter
from lora_ortho.module import Adapter

from .peft_config import CONFIG_FILE
from .peft_folder import PREFIX, TENSOR_FILE

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # what save_lora_weights writes into a folder
DIFFUSERS_METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's configurations

# The parts of pipelines that some pipeline's load_lora_weights reads.
_LOADABLE = """
    unet transformer transformer_2 transformer_ref connectors text_conditioner text_encoder
    text_encoder_2
"""
LOADABLE = frozenset(_LOADABLE.split())


def peft_files(
    merged: LoadedAdapter,
    modules: Mapping[str, nn.Module],
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
) -> dict[str, bytes]:
    """adapter_config.json and adapter_model.safetensors, by name.

    A layer of another rank than most has lora_B times rank / lora_alpha: then lora_alpha over a
    layer's own rank is its scaling for every reader, those that know no alpha_pattern included.

    Args:
        modules: of the base model by name; none where it is not known.
    """
    config = _config(merged, merged.layers, modules)
    alpha = config["lora_alpha"]
    layers = {n: _times(part, part.lora_A.shape[0] / alpha) for n, part in merged.layers.items()}
    tensors = _tensors(PREFIX, layers, merged.kernels, dtype)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return {CONFIG_FILE: text.encode(), TENSOR_FILE: _safetensors(tensors, metadata)}


def diffusers_files(
    merged: LoadedAdapter,
    modules: Mapping[str, nn.Module],
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
) -> dict[str, bytes]:
    """One file for all parts of a pipeline, with PEFT's configuration of each in its header.

    Readers that pass over the header take scaling 1, which is what it says.

    Args:
        modules: of the pipeline by name, after the part's; none where it is not known.
    """
    fields: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for part in sorted({name.partition(".")[0] for name in merged.layers}):
        layers, kernels = _inside(part, merged.layers), _inside(part, merged.kernels)
        config = _config(merged, layers, _inside(part, modules))
        config["alpha_pattern"] = config["rank_pattern"]
        fields |= {f"{part}.{field}": value for field, value in config.items()}
        tensors |= _tensors(f"{part}.", layers, kernels, dtype)
    header = {**metadata, DIFFUSERS_METADATA: json.dumps(fields, sort_keys=True)}
    return {DIFFUSERS_FILE: _safetensors(tensors, header)}


def pipeline_files(
    merged: LoadedAdapter,
    modules: Mapping[str, nn.Module],
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
) -> dict[str, bytes]:
    """For both readers: the file of :func:`diffusers_files`, and beside it the folder of PEFT for
    the model that it adapts; where it adapts several, a subfolder for each part."""
    files = diffusers_files(merged, modules, dtype, metadata)
    parts = sorted({name.partition(".")[0] for name in merged.layers})
    for part in parts:
        layers, kernels = _inside(part, merged.layers), _inside(part, merged.kernels)
        alone = replace(merged, layers=layers, kernels=kernels, parts=frozenset())
        where = f"{part}/" if len(parts) > 1 else ""
        for name, data in peft_files(alone, _inside(part, modules), dtype, metadata).items():
            files[where + name] = data
    return files


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


def _tensors(
    prefix: str,
    layers: Mapping[str, Adapter],
    kernels: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """The tensors of one model by their keys; where one layer has a bias, all have one."""
    has_bias = any(part.bias is not None for part in layers.values())
    found: dict[str, Tensor] = {}
    for name, part in layers.items():
        kernel = kernels.get(name, ())
        ones = (1,) * len(kernel)
        lora_A, lora_B, bias = part.lora_A, part.lora_B, part.bias
        if kernel:
            lora_A = lora_A.reshape(lora_A.shape[0], -1, *kernel)
        found[f"{prefix}{name}.lora_A.weight"] = lora_A
        found[f"{prefix}{name}.lora_B.weight"] = lora_B.reshape(*lora_B.shape, *ones)
        if has_bias:
            bias = lora_B.new_zeros(lora_B.shape[0]) if bias is None else bias
            found[f"{prefix}{name}.lora_B.bias"] = bias
    found = {key: tensor.to("cpu", dtype).contiguous() for key, tensor in found.items()}
    for key, tensor in found.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{key} is not finite in {tensor.dtype}; choose a wider dtype")
    return found


def _config(
    merged: LoadedAdapter, layers: Mapping[str, Adapter], modules: Mapping[str, nn.Module]
) -> dict[str, Any]:
    """PEFT's configuration of one model: one rank for most layers, a pattern for the others."""
    ranks = {name: part.lora_A.shape[0] for name, part in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    found = [modules[name] for name in ranks if name in modules]
    transposed = merged.settings.get("fan_in_fan_out", False)
    return {
        "init_lora_weights": True,
        **merged.settings,
        "peft_type": "LORA",
        "base_model_name_or_path": merged.base_model,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank},
        "target_modules": _target_modules(merged, list(ranks), modules),
        "lora_bias": any(part.bias is not None for part in layers.values()),
        "fan_in_fan_out": any(map(lies_transposed, found)) if found else transposed,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def _target_modules(
    merged: LoadedAdapter, names: list[str], modules: Mapping[str, nn.Module]
) -> list[str] | str:
    """The shortest ends of names that select these layers and no other module, as PEFT does it.

    Where even a whole name is the end of another's, a pattern; without a model the ends that
    selected the merged adapters' layers, else the names.
    """
    if not modules:
        return names if merged.leaves is None else sorted(merged.leaves)
    wanted, own = Counter(_ends(names)), Counter(_ends(modules))
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
