"""What a merge can be refused for before its model is loaded, which may take minutes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lora_ortho import backends
from lora_ortho.adapters import load_adapter
from lora_ortho.adapters.files.tensor_file import TensorFile, open_regular
from lora_ortho.mask_stream import UNIT, thresholds
from lora_ortho.merge_config import Lora, MergeConfig
from lora_ortho.merges import Gives, method_named
from lora_ortho.problem import Draw, Problem

from .console import CliError, Progress

# What follows a layer's name in the keys of a file, in every layout that is read.
_LEAF = re.compile(r"\.lora[._].*|_lora\..*|\.(alpha|dora_scale)$")


def check_config(config: MergeConfig, kind: str, progress: Progress) -> None:
    """Everything that needs no model: device, backend, texts, adapter files, rates.

    Raises:
        CliError, AdapterFileError, ValueError: naming the key, the file or the layer.
    """
    if not config.on:
        raise CliError("every adapter_weight is 0, which leaves an adapter out: nothing to merge")
    device = device_of(config)
    _check_backend(config, device, kind)
    if kind == "image":
        if config.prompt is None:
            raise CliError("nothing to run: give a prompt")
        if config.texts:
            reason = "texts are for language models; a pipeline has no loss to take on them"
            raise CliError(reason + _taken_for_images(config))
        if config.strata != 1:
            reason = "strata are for the samples of language models; a pipeline takes no samples"
            raise CliError(reason + _taken_for_images(config))
    elif not config.texts and config.prompt is None:
        raise CliError("nothing to run: give a prompt, or texts to take the loss on")
    for name in config.texts:
        read_text(config, name)
    layers = {}
    for lora in (config.loras[j] for j in config.on):
        progress(f"looking at {lora.adapter_name}")
        layers[str(lora.adapter_name)] = _layers(config, lora, kind)
    _check_rates(config, layers, config.methods)


def check_export(config: MergeConfig, method: str) -> None:
    """What an export can be refused for without the model; raises as `check_config`."""
    merge = method_named(method)
    if merge.gives is not Gives.FACTORS:
        raise CliError(f"method {method!r} gives a dense weight, which no adapter holds")
    layers = {config.names[j]: _layers(config, config.loras[j], "language") for j in config.on}
    if merge.draws:
        _check_rates(config, layers, (merge.masks,))


def device_of(config: MergeConfig) -> torch.device:
    """The device of the model; CliError where torch has none of that name."""
    name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # whatever torch raises for a device that it does not have
        first = str(error).strip().split("\n")[0]
        raise CliError(f"device: torch cannot use {name!r} here: {first}") from error
    return device


def dtype_of(config: MergeConfig, kind: str) -> torch.dtype:
    """The dtype of the model: as configured, else float16 for images on a GPU, else float32."""
    narrow = kind == "image" and device_of(config).type != "cpu"
    found: torch.dtype = getattr(torch, config.dtype or ("float16" if narrow else "float32"))
    return found


def read_text(config: MergeConfig, name: str) -> str:
    """A text to take the loss on."""
    path = config.local(name)
    if path is None:
        raise CliError(f"texts: there is no file {name}")
    try:
        with open_regular(path) as file:
            return file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CliError(f"texts: {name} is not UTF-8: {error}") from error


def _check_backend(config: MergeConfig, device: torch.device, kind: str) -> None:
    backends.check_name(config.backend)
    if config.backend is None:
        return
    problem = Problem(Draw.NONE, ((0, UNIT - 1),), 8, 8, (1,), dtype_of(config, kind), device.type)
    reason = backends.decline(config.backend, problem)
    if reason is not None:
        raise CliError(f"backend {config.backend!r} cannot serve this merge: {reason}")


def _taken_for_images(config: MergeConfig) -> str:
    """What to add to an error where the kind was guessed for want of a folder to look into."""
    if config.kind is not None or not config.pipe_id or config.local(config.pipe_id):
        return ""
    return (
        f" (pipe_id {config.pipe_id} is no folder here, so it is taken for a pipeline on a hub; "
        f'kind = "language" for a language model there)'
    )


def _layers(config: MergeConfig, lora: Lora, kind: str) -> set[str]:
    """Names of the layers of an adapter, as its file has them; the file is checked."""
    path = config.adapter_path(lora)
    if kind == "image":
        if path.is_dir() or path.suffix != ".safetensors":
            reason = f"{path}: an adapter of a pipeline is a .safetensors file"
            raise CliError(reason + _taken_for_images(config))
        return file_layers(path)
    # Names of single files may be resolved by the model alone; a folder's are the layers' own.
    return set(load_adapter(path).layers) if path.is_dir() else file_layers(path)


def file_layers(path: Path) -> set[str]:
    """What stands before lora_A, lora_down and the like in the keys of a safetensors file."""
    with TensorFile(path) as opened:
        return {_LEAF.sub("", key) for key in opened.entries}


def _check_rates(
    config: MergeConfig, layers: Mapping[str, set[str]], methods: Sequence[str]
) -> None:
    """Every method must admit the rates of the adapters that meet in a layer."""
    if config.p is None:
        return
    rates = {config.names[j]: config.p[j] for j in config.on}
    groups: dict[tuple[str, ...], str] = {}
    for layer in sorted(set().union(*layers.values())):
        groups.setdefault(tuple(name for name in layers if layer in layers[name]), layer)
    for names, layer in groups.items():
        for method in methods:
            _check_layer(layer, [rates[name] for name in names], method)


def _check_layer(layer: str, p: Sequence[float], method: str) -> None:
    try:
        thresholds(p, method)
    except ValueError as error:
        raise CliError(f"layer {layer}: {error}") from error
