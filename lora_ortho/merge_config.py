"""The TOML file of a merge: the tables of the paper's reference code, and a few keys more.

Every key is known or refused; docs/command_line.md lists them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lora_ortho.adapters import LoadedAdapter, load_adapter
from lora_ortho.adapters.files.image_file import DIFFUSERS_FILE
from lora_ortho.adapters.files.names import titles
from lora_ortho.adapters.files.peft_config import CONFIG_FILE
from lora_ortho.adapters.files.peft_folder import TENSOR_FILE
from lora_ortho.adapters.files.tensor_file import open_regular
from lora_ortho.mask_stream import MOST_STRATA
from lora_ortho.problem import METHODS

KINDS = ("language", "image")
DTYPES = ("float32", "bfloat16", "float16")
_MAX_CONFIG = 1024 * 1024  # bytes


class ConfigError(ValueError):
    """A file of a merge that does not say what it must; the message names file and key."""


@dataclass(frozen=True)
class Lora:
    """One ``[[loras]]`` table.

    Attributes:
        file_path: a folder, a file, or a repository of the Hugging Face hub.
        file_name: a file in it; None for a PEFT folder.
        adapter_name: name in tables and pictures.
        dropout_rate: in [0, 1); None is 1 - 1/K of the adapters in a layer.
        adapter_weight: merge weight; 0 leaves the adapter out.
    """

    file_path: str
    file_name: str | None = None
    adapter_name: str | None = None
    dropout_rate: float | None = None
    adapter_weight: float = 1.0


@dataclass(frozen=True)
class MergeConfig:
    """A whole configuration. The first group of keys is the paper's, with its values as defaults.

    Attributes:
        loras: the adapters, in merge order.
        pipe_id: the base model: a folder, or a repository of the hub.
        prompt: what to make a picture of, or to continue.
        neg_prompt, batch_size, num_batches: of pictures; a batch's number is its generator's seed.
        save_folder_name: where results go unless --out is given.
        kind: "language" or "image"; None looks into the folder, and takes a repository for images.
        methods: which merges to compare.
        seed: of the masks.
        samples: Monte Carlo draws for each random method, language models only.
        strata: how many of them in a row share the elements out among the adapters in proportion.
        dtype: of the base model; None is float16 for images on a GPU, else float32.
        device: None is "cuda" where torch has one.
        backend: of lora_ortho; None is the best.
        texts: files to take the loss on, language models only.
        max_tokens: tokens read of each text.
        max_new_tokens: tokens written after the prompt.
        steps, guidance_scale: of the image pipeline; the defaults are the paper's.
        clip_skip, width, height: of the image pipeline; None is its own.
        scheduler: name of a diffusers class; None is the pipeline's own.
        folder: of the file; relative paths start here.
    """

    loras: tuple[Lora, ...]
    pipe_id: str | None = None
    prompt: str | None = None
    neg_prompt: str = ""
    batch_size: int = 1
    num_batches: int = 1
    save_folder_name: str | None = None
    kind: str | None = None
    methods: tuple[str, ...] = ("direct", "dropout", "orthogonal")
    seed: int = 0
    samples: int = 4
    strata: int = 1
    dtype: str | None = None
    device: str | None = None
    backend: str | None = None
    texts: tuple[str, ...] = ()
    max_tokens: int = 512
    max_new_tokens: int = 32
    steps: int = 40
    guidance_scale: float = 7.0
    clip_skip: int | None = None
    width: int | None = None
    height: int | None = None
    scheduler: str | None = None
    folder: Path = Path()

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in merge order."""
        return [str(lora.adapter_name) for lora in self.loras]

    @property
    def weights(self) -> list[float]:
        """Their merge weights."""
        return [lora.adapter_weight for lora in self.loras]

    @property
    def on(self) -> list[int]:
        """Which adapters take part: those whose weight is not 0."""
        return [j for j, lora in enumerate(self.loras) if lora.adapter_weight != 0.0]

    def of_on(self, values: Sequence[Any]) -> list[Any]:
        """Of one value for each adapter, those of the adapters that take part."""
        return [values[j] for j in self.on]

    @property
    def p(self) -> list[float] | None:
        """Their dropout rates, or None where none is given."""
        given = [lora.dropout_rate for lora in self.loras]
        return None if None in given else [float(rate) for rate in given if rate is not None]

    def local(self, path: str) -> Path | None:
        """An existing path, from the file's folder or from the working directory; or None."""
        for candidate in (self.folder / path, Path(path)):
            if candidate.exists():
                return candidate
        return None

    def adapter_path(self, lora: Lora) -> Path:
        """Where an adapter lies; fetched from the hub if it is not here."""
        found = self.local(lora.file_path)
        if found is None:
            return _fetch(lora)
        path = found if lora.file_name is None else found / lora.file_name
        if path.name == TENSOR_FILE and (path.parent / CONFIG_FILE).exists():
            return path.parent
        if (path / DIFFUSERS_FILE).exists() and not (path / CONFIG_FILE).exists():
            return path / DIFFUSERS_FILE
        return path

    def load_adapters(self, model: Any = None) -> list[LoadedAdapter]:
        """Every adapter, checked against the base model where one is given."""
        return [
            load_adapter(self.adapter_path(lora), model, name=lora.adapter_name)
            for lora in self.loras
        ]


def read_config(path: Path) -> MergeConfig:
    """Reads and checks a TOML file.

    Raises:
        ConfigError: a key or a value that does not fit, by name, or no TOML at all.
        AdapterFileError: the file cannot be read, or is not a regular file.
    """
    with open_regular(path) as file:
        text = file.read(_MAX_CONFIG + 1)
    if len(text) > _MAX_CONFIG:
        raise ConfigError(f"{path}: larger than {_MAX_CONFIG} bytes")
    try:
        table = _parse(text.decode("utf-8"))
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    except ValueError as error:  # of the syntax or the encoding
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    try:
        return _config(table, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _parse(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError:
            raise ConfigError(
                "reading TOML needs tomli on Python 3.10: pip install tomli"
            ) from None
    found: dict[str, Any] = tomllib.loads(text)
    return found


def _config(table: Mapping[str, Any], folder: Path) -> MergeConfig:
    values = dict(table)
    loras = values.pop("loras", None)
    if not isinstance(loras, list) or not loras or not all(isinstance(x, dict) for x in loras):
        raise ConfigError("needs at least one [[loras]] table")
    checked = _values(MergeConfig, values, "", skip=("loras", "folder"))
    tables = _named([_lora(lora, j) for j, lora in enumerate(loras)])
    config = MergeConfig(tables, folder=folder, **checked)
    twice = {name for name in config.names if config.names.count(name) > 1}
    if twice:
        raise ConfigError(f"adapter_name {min(twice)!r} occurs twice")
    rates = [lora.dropout_rate for lora in config.loras]
    if None in rates and any(rate is not None for rate in rates):
        j = rates.index(None)
        raise ConfigError(f"loras[{j}] has no dropout_rate while others have one")
    return config


def _lora(table: Mapping[str, Any], j: int) -> Lora:
    where = f"loras[{j}]: "
    if "file_path" not in table:
        raise ConfigError(f"{where}file_path is missing")
    values = _values(Lora, table, where)
    rate = values.get("dropout_rate")
    if rate is not None and not 0.0 <= rate < 1.0:
        raise ConfigError(f"{where}dropout_rate must be in [0, 1), got {rate}")
    return Lora(**values)


def _named(loras: Sequence[Lora]) -> tuple[Lora, ...]:
    """The tables, each with a name: its own, or as much of its path as tells it from others."""
    nameless = [lora for lora in loras if lora.adapter_name is None]
    paths = [Path(lora.file_path, lora.file_name or "") for lora in nameless]
    names = iter(titles(paths))
    return tuple(
        replace(lora, adapter_name=next(names)) if lora.adapter_name is None else lora
        for lora in loras
    )


_TEXTS = "tuple[str, ...]"
_CLASSES: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (float, int)}


def _values(
    record: type, table: Mapping[str, Any], where: str, skip: Sequence[str] = ()
) -> dict[str, Any]:
    """A table's values, each of the type that the record's field has; no other key."""
    known = {field.name: field for field in fields(record) if field.name not in skip}
    found: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f"{where}unknown key {key!r}; known are {', '.join(known)}")
        kind = str(known[key].type).removesuffix(" | None")
        found[key] = _typed(f"{where}{key}", kind, value)
        _check_value(f"{where}{key}", key, found[key])
    missing = [
        name for name, field in known.items() if field.default is MISSING and name not in found
    ]
    if missing:
        raise ConfigError(f"{where}{missing[0]} is missing")
    return found


def _typed(where: str, kind: str, value: Any) -> Any:
    is_list = isinstance(value, list) and all(isinstance(item, str) for item in value)
    fits = is_list if kind == _TEXTS else isinstance(value, _CLASSES[kind])
    if isinstance(value, bool) or not fits:
        raise ConfigError(f"{where} must be {_NAMES[kind]}, got {value!r}")
    if kind == _TEXTS:
        return tuple(value)
    if kind == "float":
        value = float(value)
        if not math.isfinite(value):
            raise ConfigError(f"{where} must be finite, got {value}")
    return value


_NAMES = {
    "str": "text",
    "int": "an integer",
    "float": "a number",
    _TEXTS: "a list of texts",
}
_CHOICES = {"kind": KINDS, "dtype": DTYPES}
_AT_LEAST_ONE = (
    *("batch_size", "num_batches", "samples", "max_tokens", "max_new_tokens", "steps"),
    *("width", "height"),
)


def _check_value(where: str, key: str, value: Any) -> None:
    choices = _CHOICES.get(key)
    if choices and value not in choices:
        raise ConfigError(f"{where} must be one of {', '.join(choices)}, got {value!r}")
    if key in _AT_LEAST_ONE and value < 1:
        raise ConfigError(f"{where} must be at least 1, got {value}")
    if key == "strata" and not 1 <= value <= MOST_STRATA:
        raise ConfigError(f"{where} must be in [1, {MOST_STRATA}], got {value}")
    if key == "methods":
        wrong = [method for method in value if method not in METHODS]
        if wrong or not value or len(set(value)) < len(value):
            raise ConfigError(f"{where} must be some of {', '.join(METHODS)}, got {list(value)}")
    if key == "save_folder_name" and (Path(value).name != value or value in ("", ".", "..")):
        raise ConfigError(f"{where} must be the name of a folder, got {value!r}")


def _fetch(lora: Lora) -> Path:
    """A file or PEFT folder from the Hugging Face hub, through its own cache."""
    try:
        import huggingface_hub as hub
    except ImportError:
        raise ConfigError(
            f"{lora.file_path} is not here, and fetching it needs huggingface_hub "
            f"(pip install huggingface_hub)"
        ) from None
    try:
        if lora.file_name is not None:
            return Path(hub.hf_hub_download(lora.file_path, lora.file_name))
        files = ["adapter_config.json", "adapter_model.safetensors"]
        return Path(hub.snapshot_download(lora.file_path, allow_patterns=files))
    except Exception as error:  # the hub's own, requests', httpx's, OSError
        first = str(error).strip().split("\n")[0]
        raise ConfigError(f"{lora.file_path} is no file here, and the hub says: {first}") from error
