"""Result files: JSON, one for each kind of machine."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from . import machine
from .device import Device

SCHEMA = 2
RESULTS = Path(__file__).resolve().parent / "results"
# The first seven are all that schema 1 had; its rows name no backend and are of "cpu".
SECTIONS = (
    "forward", "backward", "peers", "layer", "memory", "threads", "overhead",
    "ceilings", "expand", "scaling", "samples", "model",
)  # fmt: skip
_OLD_SECTIONS = SECTIONS[:7]
_KEY = ("case", "dtype", "backend", "contender", "axis", "at")

Row = dict[str, Any]
Result = dict[str, Any]


class ResultError(Exception):
    """A result file that cannot be used; the message names it and says why."""


def empty(device: Device | None = None) -> Result:
    """A result of this machine without rows."""
    return {
        "schema": SCHEMA,
        "kind": machine.kind(device),
        "machine": machine.machine(device),
        "versions": machine.versions(),
        **{section: [] for section in SECTIONS},
    }


def load(path: Path) -> Result:
    """Read a result file.

    Raises:
        ResultError: it cannot be read, is no such file, or has another schema.
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
    if not isinstance(found, dict) or found.get("schema") not in (1, SCHEMA):
        raise ResultError(f"{path}: not a benchmark result of schema 1 or {SCHEMA}")
    wanted = _OLD_SECTIONS if found["schema"] == 1 else SECTIONS
    missing = [name for name in ("kind", "machine", "versions", *wanted) if name not in found]
    if missing:
        raise ResultError(f"{path}: lacks {', '.join(missing)}")
    if found["schema"] == 1:
        return _from_schema_1(found)
    return dict(found)


def _from_schema_1(found: Result) -> Result:
    rows = {name: [{"backend": "cpu", **row} for row in found[name]] for name in _OLD_SECTIONS}
    return {**found, "schema": SCHEMA, **{name: [] for name in SECTIONS}, **rows}


def save(result: Result, path: Path) -> None:
    """Write a result file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(_text(result))
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def join(old: Result, new: Result) -> Result:
    """The rows of both; those of ``new`` replace the same ones of ``old``.

    Raises:
        ResultError: they are of different machines or versions.
    """
    for name in ("kind", "machine", "versions"):
        if old[name] != new[name]:
            raise ResultError(f"the results differ in {name}: {old[name]} and {new[name]}")
    joined = dict(new)
    for section in SECTIONS:
        fresh = {key(row): row for row in new[section]}
        kept = [fresh.pop(key(row), row) for row in old[section]]
        joined[section] = kept + list(fresh.values())
    return joined


def key(row: Row) -> tuple[str, ...]:
    """What tells the rows of a section apart."""
    return tuple(str(row.get(name)) for name in _KEY)


def _text(result: Result) -> str:
    """JSON with one line for each row."""
    parts = []
    for name, value in result.items():
        if name in SECTIONS:
            rows = ",\n".join("    " + json.dumps(row) for row in value)
            parts.append(f'  "{name}": [\n{rows}\n  ]' if rows else f'  "{name}": []')
        else:
            parts.append(f'  "{name}": {json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"
