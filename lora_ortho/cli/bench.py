"""``lora-ortho bench``: the microbenchmarks on this machine."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from .console import CliError

MODULE = "lora_ortho.benchmarks"


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="the microbenchmarks on this machine, as a table and a plot",
        description=f"Runs {MODULE}; `lora-ortho bench --help` shows its options.",
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """The exit status of the benchmarks."""
    try:
        module: Any = importlib.import_module(MODULE)
    except ModuleNotFoundError as error:
        if error.name != MODULE:
            raise
        raise CliError(
            "this installation has no benchmarks; `python -m benchmarks` runs them from the "
            "sources of lora_ortho"
        ) from None
    status: int = module.main(args.rest)
    return status
