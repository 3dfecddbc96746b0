"""Layouts whose blocks are numbered otherwise than in diffusers' models: renamed by diffusers."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import AdapterFileError

# Starts of names that a converter knows, by the class of the model: which of diffusers' mixins
# converts them, and how many layers it makes of one.
_SGM = re.compile(r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)_")
_FLUX = re.compile(
    r"double_blocks_\d+_(img|txt)_(attn_(?P<qkv>qkv)|attn_proj|mlp_0|mlp_2|mod_lin)|"
    r"single_blocks_\d+_((?P<linear1>linear1)|linear2|modulation_lin)"
)
_CONVERTERS: dict[str, tuple[re.Pattern[str], str]] = {
    "UNet2DConditionModel": (_SGM, "StableDiffusionXLLoraLoaderMixin"),
    "FluxTransformer2DModel": (_FLUX, "FluxLoraLoaderMixin"),
}
_DOWN, _UP, _ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
_FARTHEST = 2.0**24  # a scaling above it, or below its inverse, is no scaling
_MADE = (".lora.down.weight", "_lora.down.weight", ".lora_A.weight")


def _converter(model: nn.Module) -> tuple[re.Pattern[str], str] | None:
    names = [base.__name__ for base in type(model).__mro__]
    return next((_CONVERTERS[name] for name in names if name in _CONVERTERS), None)


def needs_converter(stem: str, model: nn.Module) -> bool:
    """True for a name of kohya's that is none of the model's, but one that diffusers renames."""
    found = _converter(model)
    return found is not None and found[0].match(stem) is not None


def convert(
    file: Path, tensors: Mapping[str, Tensor], model: nn.Module | None, pipeline: Any
) -> dict[str, Tensor]:
    """The tensors under diffusers' names, by the public function of its pipelines.

    Raises:
        AdapterFileError: diffusers is not installed, cannot convert them, or dropped a layer.
    """
    try:
        loaders: Any = importlib.import_module("diffusers.loaders")
    except ImportError as error:
        problem = f"its blocks are numbered otherwise; diffusers could rename them, but: {error}"
        raise AdapterFileError(file, problem, next(iter(tensors))) from None
    found = _converter(model) if model is not None else None
    assert found is not None  # or there would be nothing to convert
    assert model is not None
    pattern, mixin = found
    tensors = _with_tame_alphas(file, tensors)
    arguments = {"unet_config": model.config} if pattern is _SGM else {"return_alphas": True}
    try:
        fresh, alphas = getattr(loaders, mixin).lora_state_dict(dict(tensors), **arguments)
    except Exception as error:  # whatever it stumbles over in a stranger's file
        problem = f"diffusers cannot convert it ({type(error).__name__}: {error})"
        raise AdapterFileError(file, problem) from error
    expected = sum(_layers_of(key, pattern) for key in tensors if key.endswith(_DOWN))
    made = sum(key.endswith(_MADE) for key in fresh)
    if made != expected:
        raise AdapterFileError(file, f"diffusers made {made} layers of what holds {expected}")
    return {**fresh, **_alphas(alphas or {}, next(iter(tensors.values())))}


def _with_tame_alphas(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same function with alphas above 0: diffusers halves and doubles them until they fit.

    A sign goes into the up factor; an alpha of 0 becomes one of the rank, the up factor 0.
    """
    found = dict(tensors)
    for key in [key for key in tensors if key.endswith(_ALPHA)]:
        up, alpha = key.removesuffix(_ALPHA) + _UP, float(tensors[key])
        if up not in tensors:
            raise AdapterFileError(file, f"an alpha without {up!r}", key)
        rank = tensors[up].shape[1]
        if alpha == 0:
            found[up], found[key] = torch.zeros_like(tensors[up]), torch.tensor(float(rank))
        elif not rank / _FARTHEST <= abs(alpha) <= rank * _FARTHEST:
            problem = f"an alpha of {alpha:g} for rank {rank}; expected a scaling of a usual size"
            raise AdapterFileError(file, problem, key)
        elif alpha < 0:
            found[up], found[key] = -tensors[up], -tensors[key]
    return found


def _layers_of(key: str, pattern: re.Pattern[str]) -> int:
    """How many layers of diffusers' model one of the file's becomes."""
    match = pattern.match(key.removesuffix(_DOWN).removeprefix("lora_unet_"))
    kinds = match.groupdict() if match else {}
    return 3 if kinds.get("qkv") else 4 if kinds.get("linear1") else 1


def _alphas(alphas: Mapping[str, float], like: Tensor) -> dict[str, Tensor]:
    """diffusers' alphas under the names of their layers."""
    stems = {re.sub(r"((_lora|\.lora)\.down\.weight)?\.alpha$", "", key): key for key in alphas}
    return {
        f"{stem}.alpha": like.new_tensor(alphas[key], dtype=torch.float64)
        for stem, key in stems.items()
    }
