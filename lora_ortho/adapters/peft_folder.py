"""PEFT adapter folders: adapter_config.json beside adapter_model.safetensors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from lora_ortho.module import Adapter

from .errors import AdapterFileError
from .peft_config import MAX_NAME, PeftConfig, read_peft_config
from .tensor_file import Entry, read_tensors

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(
    r"base_model\.model\.(?P<layer>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias)"
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Parts of keys that other kinds of adapters have, and what they are.
_FOREIGN = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_A": "an adapter of an embedding",
    "lora_embedding_B": "an adapter of an embedding",
    "lora_diag": "KaSA",
    "modules_to_save": "a whole module saved with the adapter",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
}


@dataclass(frozen=True)
class LoadedAdapter:
    """One adapter for a whole model, read and checked.

    Attributes:
        name: for display; the folder's name unless another was given.
        layers: an `Adapter` for each adapted layer, by the layer's qualified name in the base
            model, in name order. Factors are on the CPU, in the file's dtype.
        source: the folder it came from.
        base_model: the model it says it was trained for, or None.
    """

    name: str
    layers: Mapping[str, Adapter]
    source: Path
    base_model: str | None = None

    def __repr__(self) -> str:
        return f"LoadedAdapter({self.name!r}, {len(self.layers)} layers, from {str(self.source)!r})"


def load_adapter(
    path: str | os.PathLike[str], model: nn.Module | None = None, *, name: str | None = None
) -> LoadedAdapter:
    """Reads an adapter from a PEFT folder; nothing of a file that fails a check is kept.

    Args:
        path: a folder with adapter_config.json and adapter_model.safetensors.
        model: the base model, to check that every adapted layer is there and of fitting size.
        name: for display; None is the folder's name.
    Raises:
        AdapterFileError: (a ValueError) a file is missing, broken, hostile, or of a kind that is
            not supported; the message names the file, and the key or configuration field.
        TypeError: path is not a path, or model is not a module.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a path, got {type(path).__name__}")
    folder = Path(path)
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module or None, got {type(model).__name__}")
    try:
        _check_folder(folder)
    except OSError as error:  # not allowed to look, a name too long
        raise AdapterFileError(folder, error.strerror or str(error)) from None
    tensor_file = folder / TENSOR_FILE
    config = read_peft_config(folder / CONFIG_FILE)
    found: dict[str, dict[str, str]] = {}

    def check(entries: dict[str, Entry]) -> None:
        found.update(_by_layer(tensor_file, entries, config))
        for layer, parts in found.items():
            _check_layer(tensor_file, layer, parts, entries, config)
            if model is not None:
                _check_fits(tensor_file, layer, parts, entries, model)

    tensors = read_tensors(tensor_file, check)
    name = folder.resolve().name if name is None else name
    layers = {
        layer: _adapter(tensors, found[layer], config.scaling_of(layer), name)
        for layer in sorted(found)
    }
    return LoadedAdapter(name, layers, folder, config.base_model)


def _check_folder(folder: Path) -> None:
    """One clear reason if this is not a PEFT folder that may be read."""
    if folder.suffix.lower() in _PICKLES and not folder.is_dir():
        raise AdapterFileError(folder, "a pickle by its name; pickles are never loaded")
    if not folder.exists():
        raise AdapterFileError(folder, "does not exist")
    if not folder.is_dir():
        raise AdapterFileError(folder, f"expected a folder with {CONFIG_FILE} and {TENSOR_FILE}")
    if not (folder / CONFIG_FILE).exists():
        raise AdapterFileError(folder, f"has no {CONFIG_FILE}: not a PEFT adapter")
    if not (folder / TENSOR_FILE).exists():
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix.lower() in _PICKLES)
        reason = f" ({pickles[0]} is a pickle; pickles are never loaded)" if pickles else ""
        raise AdapterFileError(folder, f"has no {TENSOR_FILE}{reason}")


def _by_layer(
    file: Path, entries: Mapping[str, Entry], config: PeftConfig
) -> dict[str, dict[str, str]]:
    """Keys by layer and part ("lora_A.weight" and so on); a key that has no place is refused."""
    layers: dict[str, dict[str, str]] = {}
    for key in entries:
        match = _KEY.fullmatch(key)
        if match is None:
            kinds = [kind for part, kind in _FOREIGN.items() if part in key]
            problem = f"{kinds[0]} is not supported" if kinds else "unexpected key: left over"
            raise AdapterFileError(file, problem, key)
        if match["part"] == "lora_B.bias" and not config.lora_bias:
            raise AdapterFileError(file, f"a bias, but lora_bias is off in {CONFIG_FILE}", key)
        if len(match["layer"]) > MAX_NAME:
            raise AdapterFileError(file, f"a name longer than {MAX_NAME} characters", key)
        layers.setdefault(match["layer"], {})[match["part"]] = key
    if not layers:
        raise AdapterFileError(file, "holds no adapter: no lora_A and lora_B in it")
    return layers


def _check_layer(
    file: Path,
    layer: str,
    parts: Mapping[str, str],
    entries: Mapping[str, Entry],
    config: PeftConfig,
) -> None:
    """All parts there, of shapes that fit one another and the configured rank."""
    wanted = ["lora_A.weight", "lora_B.weight"] + ["lora_B.bias"] * config.lora_bias
    for part in wanted:
        if part not in parts:
            raise AdapterFileError(file, "missing", f"{_PREFIX}{layer}.{part}")
    for part, dimensions in zip(wanted, (2, 2, 1), strict=False):
        shape = entries[parts[part]].shape
        if len(shape) != dimensions or 0 in shape:
            problem = f"expected {dimensions} dimensions, none of them 0, found shape {list(shape)}"
            raise AdapterFileError(file, problem, parts[part])
    a, b = entries[parts["lora_A.weight"]].shape, entries[parts["lora_B.weight"]].shape
    rank = config.rank_of(layer)
    if a[0] != rank:
        problem = f"rank {a[0]}, but {CONFIG_FILE} says {rank}"
        raise AdapterFileError(file, problem, parts["lora_A.weight"])
    if b[1] != rank:
        problem = f"rank {b[1]}, but lora_A and {CONFIG_FILE} have {rank}"
        raise AdapterFileError(file, problem, parts["lora_B.weight"])
    if config.lora_bias and entries[parts["lora_B.bias"]].shape != b[:1]:
        shape = entries[parts["lora_B.bias"]].shape
        problem = f"shape {list(shape)} does not fit lora_B's {list(b)}"
        raise AdapterFileError(file, problem, parts["lora_B.bias"])


def _check_fits(
    file: Path,
    layer: str,
    parts: Mapping[str, str],
    entries: Mapping[str, Entry],
    model: nn.Module,
) -> None:
    """The layer exists in the model and has the adapter's sizes."""
    key = parts["lora_A.weight"]
    try:
        module = model.get_submodule(layer)
    except AttributeError:
        raise AdapterFileError(file, f"the model has no layer {layer!r}", key) from None
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    adapted = entries[key].shape[1], entries[parts["lora_B.weight"]].shape[0]
    if sizes != adapted:
        is_linear = all(isinstance(size, int) for size in sizes)
        kind = f"takes {sizes[0]} features to {sizes[1]}" if is_linear else "is not a linear layer"
        problem = f"takes {adapted[0]} features to {adapted[1]}, the model's layer {kind}"
        raise AdapterFileError(file, problem, key)


def _adapter(
    tensors: Mapping[str, Tensor], parts: Mapping[str, str], scaling: float, name: str
) -> Adapter:
    bias = parts.get("lora_B.bias")
    return Adapter(
        tensors[parts["lora_A.weight"]],
        tensors[parts["lora_B.weight"]],
        scaling=scaling,
        bias=None if bias is None else tensors[bias],
        name=name,
    )
