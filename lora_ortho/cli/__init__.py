"""The command line: ``lora-ortho inspect | merge | methods | bench | doctor``.

Exit status 0 if all went well, 1 if something failed, 2 for wrong usage. Errors are one line on
standard error; results go to standard output, progress to standard error.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from lora_ortho import __version__
from lora_ortho.messages import one_line

from . import bench, doctor, inspect, merge, methods


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="lora-ortho",
        description="LoRA adapters merged at run time: look at them, merge them, measure, check.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (inspect, merge, methods, bench, doctor):
        own = module.add_parser(commands)
        own.set_defaults(parser=own)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # The benchmarks have a parser of their own.
    own, rest = (given[:1], given[1:]) if given[:1] == ["bench"] else (given, [])
    args, unknown = build_parser().parse_known_args(own)
    if unknown:  # the whole parser would show its own usage
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.rest = rest
    try:
        status: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of standard output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("lora-ortho: interrupted; nothing half-written was left", file=sys.stderr)
        return 1
    except (ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
        print(f"lora-ortho: error: {one_line(error)}", file=sys.stderr)
        return 1
    return status
