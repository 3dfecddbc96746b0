"""Result files: what a run measured, as typed rows; JSON, one file for each kind of machine.

A file is read by the types below: what has another type, is missing or is not known is refused by
its place in the file. A field that has its default is not written.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from .cases import Case, Work

SCHEMA = 3
RESULTS = Path(__file__).resolve().parent / "results"


class ResultError(Exception):
    """A result file that cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of a number of measurements, to four significant digits."""

    median: float
    q1: float
    q3: float
    count: int

    @staticmethod
    def of(values: list[float]) -> Quartiles:
        """Of at least one value."""
        several = values if len(values) > 1 else values * 2
        q1, median, q3 = statistics.quantiles(several, n=4, method="inclusive")
        return Quartiles(rounded(median), rounded(q1), rounded(q3), len(values))


def rounded(value: float) -> float:
    """To four significant digits, as results hold numbers."""
    return float(f"{value:.4g}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured for one dtype of one backend.

    Attributes:
        refused: contenders without figures, and why: not installed, or a wrong result.
    """

    dtype: str
    backend: str
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CaseRow(Row):
    """What was measured on one case."""

    case: Case


@dataclass(frozen=True, kw_only=True)
class TimedRow(CaseRow):
    """Contenders timed side by side.

    Attributes:
        seconds: per call, by contender.
        ratios: of times, round by round, by names such as "ours/direct".
        others_cores: processor cores that other processes and virtual machines kept busy
            meanwhile; None where the system does not tell.
        floor: what the call cannot do without; None where nothing is reckoned with it.
        buffer_sets: how many copies of its buffers a contender goes through.
        launch: by contender, "graph" or why it was not captured in one; on a GPU only.
    """

    seconds: dict[str, Quartiles]
    ratios: dict[str, Quartiles] = field(default_factory=dict)
    others_cores: float | None = None
    floor: Work | None = None
    buffer_sets: int = 1
    launch: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CeilingsRow(TimedRow):
    """Rates of a large copy (bytes read plus bytes written) and of a large matrix product."""

    copy_bytes_per_second: float
    matmul_operations_per_second: float


@dataclass(frozen=True, kw_only=True)
class ScalingRow(TimedRow):
    """One point of an axis."""

    axis: str
    size: int


@dataclass(frozen=True, kw_only=True)
class SamplesRow(TimedRow):
    """Several Monte Carlo samples; seconds that one more costs, None where it was refused."""

    seconds_per_sample: float | None = None


@dataclass(frozen=True, kw_only=True)
class MemoryRow(CaseRow):
    """Peak bytes beyond inputs, output and s; None where that was not measured."""

    contender: str
    forward_bytes: int | None = None
    backward_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class ThreadsRow(CaseRow):
    """How many times faster so many threads are than one, by contender."""

    threads: int
    speedup: dict[str, Quartiles]


@dataclass(frozen=True)
class OpShare:
    """An op's share of the time of a pass."""

    name: str
    share: float


@dataclass(frozen=True, kw_only=True)
class ModelRow(Row):
    """A language model under each merge.

    Attributes:
        step: "forward" or "training".
        tokens: of one step.
        profile: the ops in which most of a pass with ours is spent, and ours_share that of ours.
    """

    model: str
    step: str
    tokens: int
    seconds: dict[str, Quartiles]
    ratios: dict[str, Quartiles] = field(default_factory=dict)
    others_cores: float | None = None
    profile: list[OpShare] = field(default_factory=list)
    ours_share: float | None = None


@dataclass(frozen=True)
class Unmeasured:
    """A row that there is not, and why.

    Attributes:
        extra: the contender of memory, the axis of scaling; empty elsewhere.
    """

    section: str
    case: Case
    dtype: str
    backend: str
    reason: str
    extra: str = ""


@dataclass(frozen=True)
class Judgement:
    """A figure beside its target, for programs.

    Attributes:
        dtype: the column's title, which on a GPU names the backend too.
        value: None where it was not measured.
        met: None there too, and in a rehearsal.
    """

    figure: str
    dtype: str
    value: float | None
    target: float
    met: bool | None


@dataclass(frozen=True)
class Stage:
    """How a stage of `make gpu` ended; status as in tools/gpu_run.py."""

    name: str
    status: str
    seconds: float
    note: str


@dataclass(frozen=True)
class Gpu:
    """A GPU; clock_mhz is its highest, None where nvidia-smi does not tell."""

    name: str
    capability: str
    multiprocessors: int
    memory_bytes: int
    cache_bytes: int
    cuda: str
    driver: str
    clock_mhz: int | None


@dataclass(frozen=True)
class Machine:
    """Where the figures come from; isa is the instruction set of the kernels."""

    processor: str
    architecture: str
    isa: str
    cores: int
    threads: int
    system: str
    gpu: Gpu | None = None


@dataclass(frozen=True)
class Result:
    """Everything that one file holds; a section is a list of rows.

    Attributes:
        kind: a name for machines of one kind, such as "cpu-x86_64-amx-2cores".
        unmeasured: rows that failed or cannot be measured here.
        interrupted: whether the user ended the run before its end.
    """

    kind: str
    machine: Machine
    versions: dict[str, str]
    forward: list[TimedRow] = field(default_factory=list)
    backward: list[TimedRow] = field(default_factory=list)
    peers: list[TimedRow] = field(default_factory=list)
    layer: list[TimedRow] = field(default_factory=list)
    memory: list[MemoryRow] = field(default_factory=list)
    threads: list[ThreadsRow] = field(default_factory=list)
    overhead: list[TimedRow] = field(default_factory=list)
    ceilings: list[CeilingsRow] = field(default_factory=list)
    expand: list[TimedRow] = field(default_factory=list)
    scaling: list[ScalingRow] = field(default_factory=list)
    samples: list[SamplesRow] = field(default_factory=list)
    model: list[ModelRow] = field(default_factory=list)
    unmeasured: list[Unmeasured] = field(default_factory=list)
    targets: list[Judgement] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    interrupted: bool = False

    def rows(self, section: str) -> list[Any]:
        """The rows of a section, by its name."""
        found: list[Any] = getattr(self, section)
        return found

    def every_row(self) -> Iterator[tuple[str, Row]]:
        """Section and row, through all sections."""
        return ((section, row) for section in SECTIONS for row in self.rows(section))


SECTIONS = (
    "forward", "backward", "peers", "layer", "memory", "threads", "overhead",
    "ceilings", "expand", "scaling", "samples", "model",
)  # fmt: skip
_KEY = ("section", "case", "model", "step", "tokens", "dtype", "backend", "contender", "axis",
        "size", "extra")  # fmt: skip


def key(row: Row | Unmeasured) -> tuple[str, ...]:
    """What tells the rows of a section apart."""
    return tuple(str(getattr(row, name)) for name in _KEY if getattr(row, name, "") != "")


def join(old: Result, new: Result) -> Result:
    """The rows of both; those of ``new`` replace the same ones of ``old``.

    Raises:
        ResultError: they are of different machines or versions.
    """
    for name in ("kind", "machine", "versions"):
        was, now = getattr(old, name), getattr(new, name)
        if was != now:
            raise ResultError(f"the results differ in {name}: {was} and {now}")
    joined: dict[str, Any] = {}
    for section in (*SECTIONS, "unmeasured"):
        fresh = {key(row): row for row in new.rows(section)}
        kept = [fresh.pop(key(row), row) for row in old.rows(section)]
        joined[section] = kept + list(fresh.values())
    return replace(new, **joined)


def load(path: Path) -> Result:
    """Read a result file.

    Raises:
        ResultError: it cannot be read, or is no result of this schema.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        hint = ""
        if path.resolve().parent == RESULTS:
            hint = "; on a machine of that kind, `python -m benchmarks --save` writes it"
        raise ResultError(f"{path}: there is no such file{hint}") from error
    except (OSError, ValueError) as error:
        raise ResultError(f"{path}: {error}") from error
    if not isinstance(found, dict) or found.pop("schema", None) != SCHEMA:
        raise ResultError(f"{path}: not a benchmark result of schema {SCHEMA}")
    result: Result = _decode(Result, found, f"{path}: ")
    return result


def save(result: Result, path: Path) -> None:
    """Write a result file, whole or not at all; a line for each row."""
    parts = []
    for name, value in encode(result).items():
        if isinstance(value, list):
            rows = ",\n".join("    " + json.dumps(row) for row in value)
            parts.append(f'  "{name}": [\n{rows}\n  ]')
        else:
            parts.append(f'  "{name}": {json.dumps(value)}')
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write("{\n" + ",\n".join(parts) + "\n}\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def encode(value: Any) -> Any:
    """As JSON has it; of a whole result with its schema."""
    if isinstance(value, Case):
        return str(value)
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {name: encode(item) for name, item in value.items()}
    if not is_dataclass(value):
        return value
    found = {"schema": SCHEMA} if isinstance(value, Result) else {}
    for one in fields(value):
        item = getattr(value, one.name)
        default = one.default if one.default_factory is MISSING else one.default_factory()
        if item != default:
            found[one.name] = encode(item)
    return found


def _decode(kind: Any, value: Any, where: str) -> Any:
    """The value of a type that JSON stands for; raises ResultError that begins with ``where``."""
    origin, parameters = get_origin(kind), get_args(kind)
    if origin is UnionType:
        if value is None:
            return None
        (kind,) = (one for one in parameters if one is not NoneType)
        return _decode(kind, value, where)
    if origin is list and isinstance(value, list):
        return [_decode(parameters[0], item, f"{where}[{j}]") for j, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {name: _decode(parameters[1], v, f"{where}.{name}") for name, v in value.items()}
    if is_dataclass(kind) and isinstance(value, dict):
        return _decode_fields(kind, value, where)
    if kind is Case and isinstance(value, str):
        try:
            return Case.parse(value)
        except ValueError as error:
            raise ResultError(f"{where} {error}") from error
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ResultError(f"{where} must be of type {getattr(kind, '__name__', kind)}: {value!r}")
    return value


def _decode_fields(kind: Any, value: dict[str, Any], where: str) -> Any:
    types = get_type_hints(kind)
    unknown = sorted(value.keys() - types.keys())
    if unknown:
        raise ResultError(f"{where} has what is not known: {', '.join(unknown)}")
    needed = {f.name for f in fields(kind) if f.default is f.default_factory is MISSING}
    if needed - value.keys():
        raise ResultError(f"{where} lacks {', '.join(sorted(needed - value.keys()))}")
    given = {name: _decode(types[name], item, f"{where}.{name}") for name, item in value.items()}
    return kind(**given)
