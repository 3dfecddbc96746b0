"""adapter_config.json of PEFT: every field is honoured, known to change nothing, or refused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from .errors import AdapterFileError
from .layer_patterns import LayerPatterns, PatternError
from .tensor_file import open_regular, parse_json_object, what_it_is

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG = 16 * 1024 * 1024  # bytes
MAX_NAME = 512  # characters of a layer's name

# Fields that change nothing in what given factors compute: where they came from, which layers were
# chosen (the file says so itself), what happened in training only.
_NO_EFFECT = """
    task_type base_model_name_or_path revision inference_mode auto_mapping peft_version
    lora_dropout target_modules exclude_modules layers_to_transform layers_pattern
    fan_in_fan_out megatron_core loftq_config eva_config corda_config lora_ga_config
    velora_config qalora_group_size ensure_weight_tying runtime_config
"""
NO_EFFECT = frozenset(_NO_EFFECT.split())
_HONOURED = """
    peft_type r lora_alpha use_rslora rank_pattern alpha_pattern lora_bias init_lora_weights
    bias
"""
HONOURED = frozenset(_HONOURED.split())
# Of the fields that change nothing here, those that readers of an export go by: which class opens
# it, which base belongs to it.
FOR_READERS = ("task_type", "auto_mapping", "revision", "fan_in_fan_out")
# Fields that must be off, and what they would mean.
REFUSED = {
    "use_dora": "DoRA scales the columns of the merged weight",
    "use_qalora": "QA-LoRA pools the inputs in groups",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "alora_invocation_tokens": "activated LoRA depends on the tokens of the prompt",
    "target_parameters": "adapters of bare parameters have no linear layer",
    "layer_replication": "the model would have to be rebuilt with repeated layers",
    "modules_to_save": "whole modules replaced by an adapter cannot be merged with others",
    "megatron_config": "Megatron's parallel layers are not supported",
    "trainable_token_indices": "replaced embeddings cannot be merged with others",
    "arrow_config": "Arrow routes each token between adapters",
    "kasa_config": "KaSA changes the base weights and adds a diagonal factor",
    "monteclora_config": "MonteCLoRA adds random variables of its own",
}
# What to do about an adapter of another kind than LoRA.
WAY_OUT = (
    "merge it into the base weights with what made it, and load the other adapters on the result"
)
# Initialisations that leave the base weights alone; others subtract from them.
HARMLESS_INITS = frozenset(["gaussian", "eva", "orthogonal", "mica"])


def reader_settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those fields of a configuration that readers of an export go by, where they are set."""
    return {name: fields[name] for name in FOR_READERS if not _off(fields.get(name))}


def leaves_of(fields: Mapping[str, Any], layers: Iterable[str]) -> frozenset[str] | None:
    """The ends of names in target_modules; None where more decided, or a layer has none of them."""
    names = fields.get("target_modules")
    narrowed = any(fields.get(name) for name in ("layers_to_transform", "exclude_modules"))
    if narrowed or not isinstance(names, (list, set)) or not all(map(_is_name, names)):
        return None
    ends = tuple(f".{name}" for name in names)
    return frozenset(names) if all(f".{layer}".endswith(ends) for layer in layers) else None


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _off(value: object) -> bool:
    return value is None or value is False or value == [] or value == {}


def _number(path: Path, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise AdapterFileError(path, f"expected a number, found {value!r}", name)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise AdapterFileError(path, f"{value!r} is not finite", name)
    return number


def _rank(path: Path, name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise AdapterFileError(path, f"a rank must be a positive integer, found {value!r}", name)
    return value


def _flag(path: Path, name: str, value: object) -> bool:
    if value is None:
        return False
    if not isinstance(value, bool):
        raise AdapterFileError(path, f"expected true or false, found {value!r}", name)
    return value


def _pattern(path: Path, name: str, value: object, parse: Any) -> LayerPatterns[Any]:
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise AdapterFileError(path, f"expected an object, found {type(value).__name__}", name)
    found = {p: parse(path, f"{name}.{p}", number) for p, number in value.items()}
    try:
        return LayerPatterns(found)
    except PatternError as error:
        raise AdapterFileError(path, str(error), name) from None


def _nothing() -> LayerPatterns[Any]:
    return LayerPatterns({})


@dataclass(frozen=True)
class PeftConfig:
    """What of a PEFT LoRA configuration decides the result.

    Attributes:
        path: of the file, for errors.
        fields: all, as they were read.
    """

    rank: int
    alpha: float
    use_rslora: bool = False
    lora_bias: bool = False
    rank_pattern: LayerPatterns[int] = field(default_factory=_nothing)
    alpha_pattern: LayerPatterns[float] = field(default_factory=_nothing)
    base_model: str | None = None
    path: Path = Path(CONFIG_FILE)
    fields: Mapping[str, Any] = field(default_factory=dict)

    def rank_of(self, layer: str) -> int:
        """The rank of a layer, by its name in the base model."""
        found = self._find("rank_pattern", layer)
        return self.rank if found is None else found

    def scaling_of(self, layer: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732), of a layer by its name."""
        found = self._find("alpha_pattern", layer)
        alpha = self.alpha if found is None else found
        rank = self.rank_of(layer)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def _find(self, name: str, layer: str) -> Any:
        patterns: LayerPatterns[Any] = getattr(self, name)
        try:
            return patterns.find(layer)
        except PatternError as error:
            raise AdapterFileError(self.path, str(error), name) from None


def _check_fields(path: Path, fields: dict[str, Any]) -> None:
    kind = fields.get("peft_type")
    if kind != "LORA":
        problem = f"only 'LORA' is supported, found {kind!r}: {WAY_OUT}"
        raise AdapterFileError(path, problem, "peft_type")
    for name, why in REFUSED.items():
        if not _off(fields.get(name)):
            problem = f"{fields[name]!r} is not supported: {why}; {WAY_OUT}"
            raise AdapterFileError(path, problem, name)
    bias = fields.get("bias", "none")
    if bias != "none":
        problem = f"{bias!r} is not supported: the base model's biases would be replaced"
        raise AdapterFileError(path, problem, "bias")
    init = fields.get("init_lora_weights", True)
    if not isinstance(init, bool) and init is not None and init not in tuple(HARMLESS_INITS):
        problem = f"{init!r} is not supported: such adapters belong to changed base weights"
        raise AdapterFileError(path, problem, "init_lora_weights")
    for name in sorted(set(fields) - NO_EFFECT - HONOURED - set(REFUSED)):
        if not _off(fields[name]):
            raise AdapterFileError(path, f"unknown field, set to {fields[name]!r}", name)


def read_peft_config(path: Path) -> tuple[PeftConfig, str]:
    """Reads and checks one adapter_config.json; the second is its SHA-256 in hexadecimal.

    Raises:
        AdapterFileError: names the file and the field.
    """
    with open_regular(path) as file:
        text = file.read(MAX_CONFIG + 1)
    if len(text) > MAX_CONFIG:
        raise AdapterFileError(path, f"larger than {MAX_CONFIG} bytes")
    if not text.lstrip().startswith(b"{") and (found := what_it_is(text)) is not None:
        raise AdapterFileError(path, found)
    return parse_peft_config(path, parse_json_object(path, text)), sha256(text).hexdigest()


def parse_peft_config(path: Path, fields: dict[str, Any]) -> PeftConfig:
    """Checks the fields of a configuration; AdapterFileError names the file and the field."""
    _check_fields(path, fields)
    for name in ("r", "lora_alpha"):
        if name not in fields:
            raise AdapterFileError(path, "missing", name)
    base = fields.get("base_model_name_or_path")
    return PeftConfig(
        rank=_rank(path, "r", fields["r"]),
        alpha=_number(path, "lora_alpha", fields["lora_alpha"]),
        use_rslora=_flag(path, "use_rslora", fields.get("use_rslora")),
        lora_bias=_flag(path, "lora_bias", fields.get("lora_bias")),
        rank_pattern=_pattern(path, "rank_pattern", fields.get("rank_pattern"), _rank),
        alpha_pattern=_pattern(path, "alpha_pattern", fields.get("alpha_pattern"), _number),
        base_model=base if isinstance(base, str) else None,
        path=path,
        fields=fields,
    )
