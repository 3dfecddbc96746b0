"""``lora-ortho doctor``: which backends work here, and what to do about those that do not."""

from __future__ import annotations

import argparse
from typing import Any

import lora_ortho
from lora_ortho.doctor import Diagnosis, diagnose

from .console import Progress, add_common, to_json


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="which backends work here, and what to do about those that do not",
        description="Versions, backends with a tiny self-check, instruction set, OpenMP. Exit "
        "status 1 where a backend gives wrong results.",
    )
    add_common(parser)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Exit status 0 if every backend that works here passed its check."""
    with Progress(args.quiet) as progress:
        progress("checking the backends")
        found = diagnose()
    print(
        to_json({"lora_ortho": lora_ortho.__version__, **vars(found)})
        if args.json
        else as_text(found)
    )
    return 0 if found.healthy else 1


def as_text(found: Diagnosis) -> str:
    """The diagnosis as aligned lines."""
    lines = [f"lora_ortho {lora_ortho.__version__}"]
    lines += [f"  {name:<13}{value}" for name, value in found.system.items()]
    lines += ["", "backends"]
    for backend in found.backends:
        if backend.reason is None:
            passed = backend.check == "ok"
            text = "works, self-check passed" if passed else f"BROKEN: {backend.check}"
            lines.append(f"  {backend.name:<13}{text}")
        else:
            lines.append(f"  {backend.name:<13}not here: {backend.reason}")
            lines.append(f"  {'':<13}to have it: {backend.advice}")
    if found.instruction_sets:
        sets = ", ".join(found.instruction_sets)
        lines.append(f"  {'kernels for':<13}{found.instruction_set} (this processor has {sets})")
    shared = ", ".join(found.openmp) or "none loaded, or this system does not say"
    lines += [f"  {'OpenMP':<13}{shared}", "", "packages"]
    for package in found.packages:
        version = package.version or "not installed"
        lines.append(f"  {package.name:<13}{version:<15}{package.purpose}")
    lines += ["", *(f"warning: {text}" for text in found.warnings)]
    lines.append("all well" if found.healthy else "something is broken: see above")
    return "\n".join(lines)
