"""PEFT adapter folders: adapter_config.json beside adapter_model.safetensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ortho.adapters.components import base_modules
from lora_ortho.adapters.loaded import LoadedAdapter

from .errors import AdapterFileError
from .made import warn_of_other_masks
from .peft_config import (
    CONFIG_FILE,
    MAX_NAME,
    WAY_OUT,
    PeftConfig,
    leaves_of,
    read_peft_config,
    reader_settings,
)
from .pieces import Piece, assemble, check_shapes
from .targets import Targets, check_fit
from .tensor_file import TensorFile

TENSOR_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
# The level that PEFT has in memory, the adapter's name, is in some files too.
_KEY = re.compile(
    r"base_model\.model\.(?P<layer>.+)\.(?P<factor>lora_A|lora_B)(\.(?P<adapter>[^.]+))?"
    r"\.(?P<kind>weight|bias)"
)
# Whole weights that PEFT saves beside the factors: of embeddings, and of layers that it wraps.
_BASE = re.compile(r"base_model\.model\.(?P<layer>.+?)(\.base_layer)?\.(?P<kind>weight|bias)")
# Parts of keys that other kinds of adapters have, and what they are.
FOREIGN = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "lora_embedding_A": "an adapter of an embedding",
    "lora_embedding_B": "an adapter of an embedding",
    "lora_diag": "KaSA",
    "modules_to_save": "a whole module saved with the adapter",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "a convolution in three factors",
    ".diff": "a whole difference of weights",
}


def foreign(key: str) -> str:
    """Why a key has no place in an adapter that can be merged."""
    kinds = [kind for part, kind in FOREIGN.items() if part in key]
    return f"{kinds[0]} is not supported: {WAY_OUT}" if kinds else "unexpected key: left over"


def one_adapter(file: Path, names: Mapping[str | None, str]) -> None:
    """AdapterFileError where the keys have levels of several adapters.

    Args:
        names: a key by the adapter's name in it, None for keys without.
    """
    if len(names) > 1:
        kinds = ", ".join(sorted("none" if name is None else repr(name) for name in names))
        problem = f"keys of several adapters ({kinds}): a file holds one"
        raise AdapterFileError(file, problem, next(key for name, key in names.items() if name))


def read_folder(folder: Path, targets: Targets, name: str) -> LoadedAdapter:
    """The adapter of a folder that has both files; see `load_adapter`."""
    config, digest = read_peft_config(folder / CONFIG_FILE)
    tensor_file = folder / TENSOR_FILE
    with TensorFile(tensor_file) as opened:
        warn_of_other_masks(tensor_file, opened.metadata)
        by_layer, base = _by_layer(tensor_file, opened.entries, config)
        pieces = [
            _piece(tensor_file, layer, parts, opened.shapes, config, targets)
            for layer, parts in by_layer.items()
        ]
        # Weights of the model, by the keys of those in the file.
        whole = {key: _base_weight(tensor_file, key, opened.shapes[key], targets) for key in base}
        contents = opened.read()
    for key, weight in whole.items():
        saved = contents.tensors[key].to(weight.dtype)
        if not torch.equal(saved, weight.detach().to("cpu")):
            problem = (
                "a whole weight that differs from the model's: an adapter that changes more than "
                "its layers cannot be merged with others"
            )
            raise AdapterFileError(tensor_file, problem, key)
    layers, kernels = assemble(tensor_file, name, pieces, contents.tensors)
    return LoadedAdapter(
        name,
        layers,
        folder,
        config.base_model,
        kernels,
        {CONFIG_FILE: digest, TENSOR_FILE: contents.sha256},
        reader_settings(config.fields),
        frozenset([targets.part]) if targets.is_pipeline and targets.part else frozenset(),
        leaves_of(config.fields, layers),
    )


def _by_layer(
    file: Path, keys: Iterable[str], config: PeftConfig
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Keys by layer and part ("lora_A.weight" and so on), and those of whole weights of the base.

    A key that has no place is refused.
    """
    layers: dict[str, dict[str, str]] = {}
    adapters: dict[str | None, str] = {}
    base = []
    for key in keys:
        match = _KEY.fullmatch(key)
        part = f"{match['factor']}.{match['kind']}" if match else ""
        if match is None or part == "lora_A.bias":
            if foreign(key) != "unexpected key: left over" or not _BASE.fullmatch(key):
                raise AdapterFileError(file, foreign(key), key)
            base.append(key)
            continue
        if part == "lora_B.bias" and not config.lora_bias:
            raise AdapterFileError(file, f"a bias, but lora_bias is off in {CONFIG_FILE}", key)
        if len(match["layer"]) > MAX_NAME:
            raise AdapterFileError(file, f"a name longer than {MAX_NAME} characters", key)
        adapters.setdefault(match["adapter"], key)
        layers.setdefault(match["layer"], {})[part] = key
    if not layers:
        raise AdapterFileError(file, "holds no adapter: no lora_A and lora_B in it")
    one_adapter(file, adapters)
    return layers, base


def _base_weight(file: Path, key: str, shape: tuple[int, ...], targets: Targets) -> Tensor:
    """The model's weight under that key, of the same shape."""
    match = _BASE.fullmatch(key)
    assert match is not None
    if targets.model is None:
        problem = (
            "a whole weight of the base model beside the factors: give the model, which tells "
            "whether the adapter changed it"
        )
        raise AdapterFileError(file, problem, key)
    root = targets.root(targets.part or "")
    module: Any = None if root is None else dict(base_modules(root)).get(match["layer"])
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    weight = getattr(base, match["kind"], None)
    if not isinstance(weight, Tensor) or weight.is_meta:
        problem = f"a whole weight, and the model has no values for {match['layer']!r} to compare"
        raise AdapterFileError(file, problem, key)
    if tuple(weight.shape) != shape:
        problem = (
            f"a whole weight of shape {list(shape)}, the model's is {list(weight.shape)}: "
            f"was it resized? Resize the model's embeddings alike before loading"
        )
        raise AdapterFileError(file, problem, key)
    return weight


def _piece(
    file: Path,
    layer: str,
    parts: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    config: PeftConfig,
    targets: Targets,
) -> Piece:
    """All parts there, of shapes that fit one another, the configured rank and the model."""
    for part in ["lora_A.weight", "lora_B.weight"] + ["lora_B.bias"] * config.lora_bias:
        if part not in parts:
            raise AdapterFileError(file, "missing", f"{PREFIX}{layer}.{part}")
    key_A, key_B, bias = parts["lora_A.weight"], parts["lora_B.weight"], parts.get("lora_B.bias")
    check_shapes(file, (key_A, key_B, bias), shapes, config.rank_of(layer), CONFIG_FILE)
    target = targets.by_name(file, key_A, targets.part or "", layer)
    kernel = check_fit(file, key_A, target, shapes[key_A], shapes[key_B])
    return Piece(target.name, key_A, key_B, bias, kernel, config.scaling_of(layer))
