"""Single files with adapters of image models: diffusers' names and those of kohya's scripts."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from lora_ortho.adapters.loaded import LoadedAdapter

from .diffusers_kohya import convert, needs_converter
from .errors import AdapterFileError
from .made import warn_of_other_masks
from .peft_config import CONFIG_FILE, MAX_NAME, PeftConfig, parse_peft_config
from .peft_folder import PREFIX, foreign, one_adapter
from .pieces import Piece, assemble, check_shapes
from .targets import Target, Targets, check_fit
from .tensor_file import TensorFile, parse_json_object

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # what save_lora_weights writes into a folder
DIFFUSERS_METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's configurations

# kohya's prefixes, and which part of a pipeline they mean: the first that it has.
_KOHYA = {
    "lora_unet_": ("unet", "transformer"),
    "lora_transformer_": ("transformer",),
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3",),
}
# The end of a key, and which tensor of its layer it is.
_ROLES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "bias",
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ".lora_linear_layer.down.weight": "A",
    ".lora_linear_layer.up.weight": "B",
    "_lora.down.weight": "A",
    "_lora.up.weight": "B",
    ".alpha": "alpha",
}
# The level that PEFT has in memory, the adapter's name, where it stands in a key.
_ADAPTER = re.compile(r"(?P<start>.+\.lora_[AB])\.(?P<adapter>[^.]+)(?P<end>\.(weight|bias))")
# How names of programs begin that name layers otherwise than diffusers and kohya's scripts.
_OTHER_PROGRAMS = ("diffusion_model.", "model.diffusion_model.", "lycoris_")
_WAY = (
    "if diffusers can read the file, load it there (pipeline.load_lora_weights) and merge with "
    "lora_ortho.attach"
)
# diffusers' older names of attention layers, as they end after a role was taken off.
_PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)$")


@dataclass
class _Group:
    """The keys of one layer, as the file names it.

    Attributes:
        part: of the pipeline; "" where the file names none.
        stem: the layer's name: with dots for diffusers, without for kohya.
        flat: True for kohya's.
        keys: by role, "A", "B", "bias", "alpha".
    """

    part: str
    stem: str
    flat: bool
    keys: dict[str, str] = field(default_factory=dict)


def read_image_file(file: Path, targets: Targets, name: str) -> LoadedAdapter:
    """The adapter in a safetensors file; see `load_adapter`."""
    with TensorFile(file) as opened:
        groups = _groups(file, opened.entries, targets)
        wanted = targets.wanted(file, (group.part for group in groups))
        groups = [group for group in groups if group.part in wanted]
        warn_of_other_masks(file, opened.metadata)
        configs = _configs(file, opened.metadata, targets.known_parts)
        pieces, renumbered = _pieces(file, groups, opened.shapes, targets, configs)
        contents = opened.read()
    tensors = contents.tensors
    if renumbered:
        taken = {key: tensors[key] for group in renumbered for key in group.keys.values()}
        part = renumbered[0].part
        fresh = convert(file, taken, targets.root(part), targets.model)
        pieces += _converted(file, fresh, part, targets)
        tensors = {**tensors, **fresh}
    layers, kernels = assemble(file, name, pieces, tensors)
    named = targets.is_pipeline or (targets.model is None and targets.part is None)
    parts = frozenset(group.part for group in groups if named and group.part)
    hashes = {file.name: contents.sha256}
    return LoadedAdapter(name, layers, file, None, kernels, hashes, {}, parts)


def _groups(file: Path, keys: Iterable[str], targets: Targets) -> list[_Group]:
    """Keys by layer; a key that has no place is refused."""
    groups: dict[tuple[str, str], _Group] = {}
    adapters: dict[str | None, str] = {}
    for key in keys:
        if key.startswith(PREFIX):
            problem = f"PEFT's key, whose scaling is in {CONFIG_FILE}: load the folder of both"
            raise AdapterFileError(file, problem, key)
        match = _ADAPTER.fullmatch(key)
        plain = key if match is None else match["start"] + match["end"]
        end = next((end for end in _ROLES if plain.endswith(end)), None)
        if end is None or _is_foreign(key):
            raise AdapterFileError(file, foreign(key), key)
        role = _ROLES[end]
        if role != "alpha":
            adapters.setdefault(match["adapter"] if match else None, key)
        group = _group(plain.removesuffix(end), targets)
        if len(group.stem) > MAX_NAME or not group.stem:
            raise AdapterFileError(file, f"names no layer of 1 to {MAX_NAME} characters", key)
        group = groups.setdefault((group.part, group.stem), group)
        if role in group.keys:
            raise AdapterFileError(file, f"says the same as {group.keys[role]!r}", key)
        group.keys[role] = key
    if not groups:
        raise AdapterFileError(file, "holds no adapter: no lora_A and lora_B in it")
    one_adapter(file, adapters)
    return list(groups.values())


def _is_foreign(key: str) -> bool:
    """True for a key of another kind of adapter, whatever it ends with."""
    return not foreign(key).startswith("unexpected")


def _group(stem: str, targets: Targets) -> _Group:
    """The part and the layer that the rest of a key names."""
    for prefix, parts in _KOHYA.items():
        if stem.startswith(prefix):
            there = [part for part in parts if part == targets.part]
            there += [part for part in parts if targets.root(part) is not None]
            return _Group([*there, *parts][0], stem.removeprefix(prefix), True)
    first, _, rest = stem.partition(".")
    part, layer = (first, rest) if first in targets.known_parts and rest else ("", stem)
    return _Group(part, _PROCESSOR.sub(_plain_attention, layer), False)


def _plain_attention(match: re.Match[str]) -> str:
    return f".to_{match[1]}" + (".0" if match[1] == "out" else "")


def _pieces(
    file: Path,
    groups: Iterable[_Group],
    shapes: Mapping[str, tuple[int, ...]],
    targets: Targets,
    configs: Mapping[str, PeftConfig],
) -> tuple[list[Piece], list[_Group]]:
    """The layers of a file, each checked; apart, those whose names diffusers must convert first."""
    pieces, renumbered = [], []
    for group in groups:
        config = configs.get(group.part)
        _check_group(file, group, shapes, config)
        target = _target(file, group, targets)
        if target is None:
            renumbered.append(group)
        else:
            pieces.append(_piece(file, group, target, shapes, config))
    return pieces, renumbered


def _check_group(
    file: Path,
    group: _Group,
    shapes: Mapping[str, tuple[int, ...]],
    config: PeftConfig | None,
) -> None:
    """Both factors there and of shapes that fit, an alpha of one element, a configuration that
    says the same."""
    known = next(iter(group.keys.values()))
    for role in ("A", "B"):
        if role not in group.keys:
            problem = f"{'down' if role == 'A' else 'up'} factor of {group.stem!r} is missing"
            raise AdapterFileError(file, problem, known)
    key_A, bias, alpha = (group.keys.get(role) for role in ("A", "bias", "alpha"))
    rank = None if config is None else config.rank_of(group.stem)
    keys = (group.keys["A"], group.keys["B"], bias)
    check_shapes(file, keys, shapes, rank, "the configuration")
    if alpha is not None and shapes[alpha] not in ((), (1,)):
        raise AdapterFileError(
            file, f"expected one number, found shape {list(shapes[alpha])}", alpha
        )
    if config is not None and alpha is not None:
        problem = f"an alpha besides the configuration in {DIFFUSERS_METADATA}"
        raise AdapterFileError(file, problem, alpha)
    if config is not None and config.lora_bias != (bias is not None):
        raise AdapterFileError(file, "lora_bias and the keys do not agree", key_A)


def _target(file: Path, group: _Group, targets: Targets) -> Target | None:
    """The layer of a group; None for one whose name diffusers must convert first."""
    key = group.keys["A"]
    if not group.flat:
        return _by_name(file, key, group, targets)
    found = targets.by_flat_name(file, key, group.part, group.stem)
    if found is None:
        root = targets.root(group.part)
        if root is None or not needs_converter(group.stem, root):
            raise AdapterFileError(file, f"the model has no layer for {group.stem!r}; {_WAY}", key)
    return found


def _by_name(file: Path, key: str, group: _Group, targets: Targets) -> Target:
    """The layer of a name with dots; for names of other programs the error says what to do."""
    try:
        return targets.by_name(file, key, group.part, group.stem)
    except AdapterFileError as error:
        if key.startswith(_OTHER_PROGRAMS):
            problem = str(error).partition(f"{key!r}: ")[2]
            raise AdapterFileError(file, f"{problem}; {_WAY}", key) from None
        raise


def _piece(
    file: Path,
    group: _Group,
    target: Target,
    shapes: Mapping[str, tuple[int, ...]],
    config: PeftConfig | None,
) -> Piece:
    """The scaling: alpha/r by the file's alpha or configuration, 1 where it has neither."""
    key_A, key_B = group.keys["A"], group.keys["B"]
    kernel = check_fit(file, key_A, target, shapes[key_A], shapes[key_B])
    scaling = 1.0 if config is None else config.scaling_of(group.stem)
    bias, alpha = group.keys.get("bias"), group.keys.get("alpha")
    return Piece(target.name, key_A, key_B, bias, kernel, scaling, alpha)


def _converted(
    file: Path, tensors: Mapping[str, Tensor], part: str, targets: Targets
) -> list[Piece]:
    """The layers of what diffusers made of a part of the file, checked as if they were read."""
    groups = _groups(file, tensors, targets)
    for group in groups:
        group.part = part
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    pieces, renumbered = _pieces(file, groups, shapes, targets, {})
    if renumbered:
        raise AdapterFileError(file, "diffusers did not rename it", renumbered[0].keys["A"])
    return pieces


def _configs(
    file: Path, metadata: Mapping[str, str], parts: Collection[str]
) -> dict[str, PeftConfig]:
    """PEFT's configurations by part, where diffusers wrote them into the header."""
    text = metadata.get(DIFFUSERS_METADATA)
    if text is None:
        return {}
    by_part: dict[str, dict[str, object]] = {}
    for key, value in parse_json_object(file, text.encode()).items():
        first, _, rest = key.partition(".")
        part, name = (first, rest) if first in parts and rest else ("", key)
        by_part.setdefault(part, {})[name] = value
    return {part: parse_peft_config(file, fields) for part, fields in by_part.items()}
