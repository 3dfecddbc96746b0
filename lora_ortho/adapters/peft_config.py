"""adapter_config.json of PEFT: every field is honoured, known to change nothing, or refused."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from .errors import AdapterFileError
from .tensor_file import open_regular, parse_json_object

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
# Initialisations that leave the base weights alone; others subtract from them.
HARMLESS_INITS = frozenset(["gaussian", "eva", "orthogonal", "mica"])


def _off(value: object) -> bool:
    return value is None or value is False or value == [] or value == {}


def _check_pattern(path: Path, name: str, pattern: str) -> None:
    """A layer pattern is a regular expression from a stranger: bound what matching it can cost."""
    if len(pattern) > MAX_NAME:
        raise AdapterFileError(path, f"a pattern of {len(pattern)} characters is too long", name)
    quantifiers = len(re.findall(r"[*+?{]", pattern))
    if quantifiers > 2 or pattern.count("|") > 4 or re.search(r"\)[*+?{]|\\[1-9]|\(\?", pattern):
        problem = f"pattern {pattern!r}: at most two quantifiers, four '|', no repeated group"
        raise AdapterFileError(path, problem, name)
    try:
        re.compile(pattern)
    except re.error as error:
        problem = f"pattern {pattern!r} is not a regular expression ({error})"
        raise AdapterFileError(path, problem, name) from None


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


def _pattern(path: Path, name: str, value: object, parse: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise AdapterFileError(path, f"expected an object, found {type(value).__name__}", name)
    for pattern in value:
        _check_pattern(path, name, pattern)
    return {pattern: parse(path, f"{name}.{pattern}", number) for pattern, number in value.items()}


def _find(patterns: dict[str, Any], layer: str) -> Any:
    """The value of the first pattern that matches the end of a layer's name, at a dot, or None."""
    for pattern, value in patterns.items():
        if re.match(rf"(?:.*\.)?(?:{pattern})$", layer):
            return value
    return None


@dataclass(frozen=True)
class PeftConfig:
    """What of a PEFT LoRA configuration decides the result."""

    rank: int
    alpha: float
    use_rslora: bool = False
    lora_bias: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    base_model: str | None = None

    def rank_of(self, layer: str) -> int:
        """The rank of a layer, by its name in the base model."""
        found = _find(self.rank_pattern, layer)
        return self.rank if found is None else found

    def scaling_of(self, layer: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732), of a layer by its name."""
        found = _find(self.alpha_pattern, layer)
        alpha = self.alpha if found is None else found
        rank = self.rank_of(layer)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _check_fields(path: Path, fields: dict[str, Any]) -> None:
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise AdapterFileError(path, f"only 'LORA' is supported, found {kind!r}", "peft_type")
    for name, why in REFUSED.items():
        if not _off(fields.get(name)):
            raise AdapterFileError(path, f"{fields[name]!r} is not supported: {why}", name)
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
    )
