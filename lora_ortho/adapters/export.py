"""A merge as an adapter on disk, for PEFT and for this package."""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

import lora_ortho
from lora_ortho.problem import DTYPES

from .components import base_modules, components
from .loaded import LoadedAdapter
from .merge import adapters_of, merge_adapters
from .peft_config import CONFIG_FILE
from .peft_folder import PREFIX, TENSOR_FILE
from .targets import shape_of

METADATA = "lora_ortho"  # the name of our metadata in the tensor file's header


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the folder.
        ranks: of each layer.
        errors: relative error of each layer's reduction to a lower rank, in the Frobenius norm of
            its B A; 0 where nothing was reduced.
    """

    path: Path
    ranks: Mapping[str, int]
    errors: Mapping[str, float]

    def __str__(self) -> str:
        worst = max(self.errors.values())
        ranks = f"ranks {min(self.ranks.values())} to {max(self.ranks.values())}"
        return f"{self.path}: {len(self.ranks)} layers, {ranks}, relative error at most {worst:.3g}"


def export(
    source: Any,
    path: str | os.PathLike[str],
    method: str = "direct",
    *,
    adapters: Sequence[str] | None = None,
    p: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    sample: int = 0,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    model: Any = None,
    force: bool = False,
) -> Exported:
    """Writes a merge of adapters as one ordinary PEFT adapter: a folder, whole or not at all.

    The adapter has rank Σ r_j, scaling 1, and the masks of `ortho_rows` in its lora_B. The header
    of its tensor file says how it was made, under "lora_ortho": method, rates, weights, seed,
    versions, and SHA-256 of the inputs.

    Args:
        source: a module with PEFT layers, attached or not, or a list of what `load_adapter` gave.
        path: of the new folder.
        method: "direct" (an exact concatenation) or "ortho_rows" (what the orthogonal method gives
            for row 0 of this seed and sample, for every token). The masks of the other methods
            change from token to token and are no weight.
        adapters: of a module: names in merge order; None takes those that are active.
        p: a dropout rate for each adapter; None gives 1 - 1/K on a layer that K of them adapt.
        weights: a merge weight for each adapter; None is 1.
        seed, sample: which masks `ortho_rows` draws.
        rank: reduces every layer to at most that rank; the errors are returned.
        dtype: of the written factors; None is float32, or float64 where a factor has it.
        model: the base model of loaded adapters: then their layers are looked up in it.
        force: replaces a folder that is there.
    Raises:
        TypeError, ValueError: an argument or adapter that does not fit, by name.
        FileExistsError: path exists, and force is not set.
        OSError: it could not be written; then nothing is left of it.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a path, got {type(path).__name__}")
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype must be None or a floating point dtype, got {dtype}")
    folder = Path(path)
    if os.path.lexists(folder) and not force:
        raise FileExistsError(f"path {folder} exists; force=True replaces it")
    base = model
    if isinstance(source, nn.Module) or hasattr(source, "_lora_loadable_modules"):
        base = source
        source = adapters_of(source, adapters)
    elif adapters is not None:
        raise ValueError("adapters can be chosen of a module only; give the list that you want")
    if base is not None and "" not in components(base):
        raise ValueError("model must be one module, not a pipeline: export its parts one by one")
    merged, errors = merge_adapters(
        source, method, p=p, weights=weights, seed=seed, sample=sample, rank=rank, model=base
    )
    tensors = _tensors(merged, dtype)
    made = {
        "method": method,
        "adapters": _inputs(source, p, weights),
        "seed": None if method == "direct" else seed,
        "sample": None if method == "direct" else sample,
        "rank": rank,
        "largest_error": max(errors.values()),
        "versions": {
            "lora_ortho": lora_ortho.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    _write(folder, _config(merged, base), tensors, {METADATA: json.dumps(made)}, force)
    return Exported(folder, {n: a.lora_A.shape[0] for n, a in merged.layers.items()}, errors)


def _inputs(
    source: Sequence[LoadedAdapter], p: Sequence[float] | None, weights: Sequence[float] | None
) -> list[dict[str, Any]]:
    """What was merged, for the metadata."""
    return [
        {
            "name": adapter.name,
            "p": None if p is None else float(p[j]),
            "weight": 1.0 if weights is None else float(weights[j]),
            "sha256": dict(adapter.sha256),
        }
        for j, adapter in enumerate(source)
    ]


def _tensors(merged: LoadedAdapter, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of the file by PEFT's keys; where one layer has a bias, all have one."""
    has_bias = any(part.bias is not None for part in merged.layers.values())
    found: dict[str, Tensor] = {}
    for name, part in merged.layers.items():
        kernel = merged.kernels.get(name, ())
        ones = (1,) * len(kernel)
        lora_A, lora_B, bias = part.lora_A, part.lora_B, part.bias
        if kernel:
            lora_A = lora_A.reshape(lora_A.shape[0], -1, *kernel)
        found[f"{PREFIX}{name}.lora_A.weight"] = lora_A
        found[f"{PREFIX}{name}.lora_B.weight"] = lora_B.reshape(*lora_B.shape, *ones)
        if has_bias:
            bias = lora_B.new_zeros(lora_B.shape[0]) if bias is None else bias
            found[f"{PREFIX}{name}.lora_B.bias"] = bias
    found = {key: tensor.to("cpu", dtype).contiguous() for key, tensor in found.items()}
    for key, tensor in found.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{key} is not finite in {tensor.dtype}; choose a wider dtype")
    return found


def _config(merged: LoadedAdapter, model: nn.Module | None) -> dict[str, Any]:
    """adapter_config.json: one rank for most layers, patterns for the others; scaling 1."""
    ranks = {name: part.lora_A.shape[0] for name, part in merged.layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    modules = {} if model is None else dict(base_modules(model))
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": merged.base_model,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": _target_modules(list(ranks), modules),
        "lora_bias": any(part.bias is not None for part in merged.layers.values()),
        "fan_in_fan_out": _fan_in_fan_out([modules[n] for n in ranks if n in modules]),
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _target_modules(names: list[str], modules: Mapping[str, nn.Module]) -> list[str] | str:
    """The names, which PEFT matches as suffixes too; a pattern where that would catch another."""
    others = [name for name, m in modules.items() if name not in names and shape_of(m) is not None]
    if any(other.endswith(f".{name}") for name in names for other in others):
        return "|".join(map(re.escape, names))
    return names


def _fan_in_fan_out(layers: Sequence[Any]) -> bool:
    """Whether the layers' weights lie transposed, as those of transformers' Conv1D."""
    bases = [m.get_base_layer() if hasattr(m, "get_base_layer") else m for m in layers]
    return any(type(base).__name__ == "Conv1D" for base in bases)


def _safetensors(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file whose bytes depend on nothing else: metadata stands in name order."""
    data = save(tensors, metadata)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _write(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    force: bool,
) -> None:
    """Both files in a folder beside, which then takes its name in one step."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as scratch:
        fresh, old = Path(scratch) / "adapter", Path(scratch) / "replaced"
        fresh.mkdir()
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (fresh / CONFIG_FILE).write_text(text, encoding="utf-8")
        (fresh / TENSOR_FILE).write_bytes(_safetensors(tensors, {"format": "pt", **metadata}))
        if force and os.path.lexists(folder):
            os.replace(folder, old)
        try:
            os.rename(fresh, folder)
        except OSError:
            if os.path.lexists(old):
                os.replace(old, folder)
            raise
