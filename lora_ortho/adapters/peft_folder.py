"""PEFT adapter folders: adapter_config.json beside adapter_model.safetensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from .errors import AdapterFileError
from .loaded import LoadedAdapter, Piece, assemble, check_shapes
from .peft_config import CONFIG_FILE, MAX_NAME, PeftConfig, read_peft_config
from .targets import Targets, check_fit
from .tensor_file import Entry, read_tensors

TENSOR_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_KEY = re.compile(
    r"base_model\.model\.(?P<layer>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias)"
)
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
    return f"{kinds[0]} is not supported" if kinds else "unexpected key: left over"


def read_folder(folder: Path, targets: Targets, name: str) -> LoadedAdapter:
    """The adapter of a folder that has both files; see `load_adapter`."""
    config, digest = read_peft_config(folder / CONFIG_FILE)
    tensor_file = folder / TENSOR_FILE
    pieces: list[Piece] = []

    def check(entries: dict[str, Entry], _: dict[str, str]) -> None:
        for layer, parts in _by_layer(tensor_file, entries, config).items():
            pieces.append(_piece(tensor_file, layer, parts, entries, config, targets))

    contents = read_tensors(tensor_file, check)
    layers, kernels = assemble(tensor_file, name, pieces, contents.tensors)
    hashes = {CONFIG_FILE: digest, TENSOR_FILE: contents.sha256}
    return LoadedAdapter(name, layers, folder, config.base_model, kernels, hashes)


def _by_layer(
    file: Path, entries: Mapping[str, Entry], config: PeftConfig
) -> dict[str, dict[str, str]]:
    """Keys by layer and part ("lora_A.weight" and so on); a key that has no place is refused."""
    layers: dict[str, dict[str, str]] = {}
    for key in entries:
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterFileError(file, foreign(key), key)
        if match["part"] == "lora_B.bias" and not config.lora_bias:
            raise AdapterFileError(file, f"a bias, but lora_bias is off in {CONFIG_FILE}", key)
        if len(match["layer"]) > MAX_NAME:
            raise AdapterFileError(file, f"a name longer than {MAX_NAME} characters", key)
        layers.setdefault(match["layer"], {})[match["part"]] = key
    if not layers:
        raise AdapterFileError(file, "holds no adapter: no lora_A and lora_B in it")
    return layers


def _piece(
    file: Path,
    layer: str,
    parts: Mapping[str, str],
    entries: Mapping[str, Entry],
    config: PeftConfig,
    targets: Targets,
) -> Piece:
    """All parts there, of shapes that fit one another, the configured rank and the model."""
    for part in ["lora_A.weight", "lora_B.weight"] + ["lora_B.bias"] * config.lora_bias:
        if part not in parts:
            raise AdapterFileError(file, "missing", f"{PREFIX}{layer}.{part}")
    key_A, key_B, bias = parts["lora_A.weight"], parts["lora_B.weight"], parts.get("lora_B.bias")
    check_shapes(file, (key_A, key_B, bias), entries, config.rank_of(layer))
    target = targets.by_name(file, key_A, targets.part or "", layer)
    check_fit(file, key_A, target, entries[key_A].shape, entries[key_B].shape)
    kernel = entries[key_A].shape[2:] if target.shape is None else target.shape.kernel
    return Piece(target.name, key_A, key_B, bias, config.scaling_of(layer), kernel)
