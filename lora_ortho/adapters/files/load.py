"""Adapters from disk: one function for every layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lora_ortho.adapters.loaded import LoadedAdapter

from .errors import AdapterFileError
from .image_file import DIFFUSERS_FILE, read_image_file
from .names import title_of
from .peft_config import CONFIG_FILE
from .peft_folder import TENSOR_FILE, read_folder
from .targets import Targets

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def load_adapter(
    path: str | os.PathLike[str],
    model: Any = None,
    *,
    name: str | None = None,
    part: str | None = None,
) -> LoadedAdapter:
    """Reads an adapter; nothing of a file that fails a check is kept.

    Three layouts: a folder that PEFT wrote; a safetensors file (or a folder with one) that
    diffusers wrote, with keys like "unet.mid_block...lora_A.weight"; a safetensors file with the
    names of kohya's scripts, like "lora_unet_mid_block_....lora_down.weight", which are found in
    the model. Blocks that are numbered otherwise than in diffusers' models (sgm, FLUX) are renamed
    by diffusers, where it is installed.

    Args:
        path: a folder with adapter_config.json and adapter_model.safetensors, or a .safetensors
            file.
        model: the base model, a module or a diffusers pipeline: every adapted layer is looked up
            in it and must be of fitting size. None takes names as they are, which is enough for
            PEFT's and diffusers' layouts.
        name: for display; None is the folder's or file's whole name, of a link the link's.
        part: which part of a file for several models to take ("unet", "text_encoder", ...), where
            the model is one of them; for a pipeline, which of its parts a PEFT folder belongs to.
    Raises:
        AdapterFileError: (a ValueError) a file is missing, broken, hostile, or of a kind that is
            not supported; the message names the file, and the key or configuration field.
        TypeError, ValueError: path, model or part is not one.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a path, got {type(path).__name__}")
    path = Path(path)
    targets = Targets(model, part)
    try:
        file = _file_of(path)
    except OSError as error:  # not allowed to look, a name too long
        raise AdapterFileError(path, error.strerror or str(error)) from None
    title = title_of(path) if name is None else name
    if file is None:
        return read_folder(path, targets, title)
    return read_image_file(file, targets, title)


def _file_of(path: Path) -> Path | None:
    """The file to read; None for a folder of PEFT. One clear reason if it is neither."""
    if path.suffix.lower() in _PICKLES and not path.is_dir():
        raise AdapterFileError(path, "a pickle by its name; pickles are never loaded")
    if not path.exists():
        raise AdapterFileError(path, "does not exist")
    if not path.is_dir():
        if path.suffix.lower() != ".safetensors":
            expected = f"a folder with {CONFIG_FILE} and {TENSOR_FILE}, or a .safetensors file"
            raise AdapterFileError(path, f"expected {expected}")
        return path
    if (path / DIFFUSERS_FILE).exists():  # whose keys name the parts, as PEFT's beside it do not
        return path / DIFFUSERS_FILE
    if (path / CONFIG_FILE).exists() and (path / TENSOR_FILE).exists():
        return None
    if not (path / CONFIG_FILE).exists():
        raise AdapterFileError(path, f"has no {CONFIG_FILE}: not a PEFT adapter")
    pickles = sorted(f.name for f in path.iterdir() if f.suffix.lower() in _PICKLES)
    reason = f" ({pickles[0]} is a pickle; pickles are never loaded)" if pickles else ""
    raise AdapterFileError(path, f"has no {TENSOR_FILE}{reason}")
