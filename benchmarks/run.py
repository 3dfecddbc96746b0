"""The benchmarks of the merge of one layer, beside their peers, each result checked first.

Progress on standard error, tables on standard output. Everything takes about ten minutes on two
quiet cores, --quick about four. The exit status is 1 if a result was wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lora_ortho import backends

from . import record, tasks
from .cases import DTYPES, Case
from .harness import Bench
from .machine import empty_result
from .record import (
    CeilingsRow,
    MemoryRow,
    ModelRow,
    Result,
    Row,
    ThreadsRow,
    TimedRow,
    Unmeasured,
)
from .report import report
from .targets import judged
from .tasks import Task


def run(
    todo: Sequence[Task],
    bench: Bench,
    quick: bool,
    quiet: bool = False,
    budget: float = math.inf,
) -> Result:
    """Measure rows one after the other, with progress; a row that fails does not end the run.

    An interrupt does; the rows before it are in the result, which then says "interrupted".

    Args:
        budget: seconds after which no further row is begun.
    """
    result, start = empty_result(bench.device), time.perf_counter()
    done = 0
    try:
        for number, task in enumerate(todo, 1):
            if time.perf_counter() - start > budget:
                left = len(todo) - number + 1
                print(f"{budget:.0f} s are over: {left} rows were not measured", file=sys.stderr)
                break
            if not quiet:
                print(f"[{number}/{len(todo)}] {task}", end=" ", file=sys.stderr, flush=True)
            rows, reason = _rows(task, bench, quick)
            if reason is None:
                result.rows(task.section).extend(rows)
            else:
                result.unmeasured.append(_unmeasured(task, bench, reason))
            done = number
            if not quiet:
                seconds = time.perf_counter() - start
                words = reason or "; ".join(filter(None, map(short, rows)))
                print(f"{words} ({seconds:.0f} s)", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        left = len(todo) - done
        end = "" if quiet else "\n"  # of the line of progress
        print(f"{end}error: interrupted: {left} rows were not measured", file=sys.stderr)
        return replace(result, interrupted=True)
    return result


def _rows(task: Task, bench: Bench, quick: bool) -> tuple[Sequence[Row], str | None]:
    """The rows of a task, or why there are none."""
    reason = tasks.impossible(task, bench)
    if reason is not None:
        return [], reason
    try:
        return tasks.perform(task, bench, quick), None
    except Exception as error:
        first = (str(error).strip() or "no reason given").splitlines()[0]
        return [], f"failed: {type(error).__name__}: {first}"


def _unmeasured(task: Task, bench: Bench, reason: str) -> Unmeasured:
    section, case, dtype, extra = task
    return Unmeasured(section, case, dtype, bench.backend, reason, extra)


def short(row: Row) -> str:
    """A row's ratios, or what else it found."""
    found = []
    if isinstance(row, TimedRow | ModelRow):
        found += [f"{name} {q.median:.3g}" for name, q in row.ratios.items()]
    if isinstance(row, ThreadsRow):
        found += [f"{name} x{q.median:.3g}" for name, q in row.speedup.items()]
    if isinstance(row, MemoryRow):
        sizes = (("forward", row.forward_bytes), ("backward", row.backward_bytes))
        found += [f"{name} {size / 2**20:.2f} MiB" for name, size in sizes if size is not None]
    if isinstance(row, CeilingsRow):
        found.append(f"copy {row.copy_bytes_per_second / 1e9:.1f} GB/s")
        found.append(f"matmul {row.matmul_operations_per_second / 1e9:.0f} GFLOP/s")
    found += [f"{name}: {reason}" for name, reason in row.refused.items()]
    return ", ".join(found)


def failures(result: Result) -> list[str]:
    """What failed or was wrong, in words; what cannot be measured here is neither."""
    found = [
        f"{' '.join((section, *record.key(row)))}: {name}: {reason}"
        for section, row in result.every_row()
        for name, reason in row.refused.items()
        if reason.startswith("wrong result")
    ]
    return found + [
        f"{' '.join(record.key(row))}: {row.reason}"
        for row in result.unmeasured
        if row.reason.startswith("failed")
    ]


def _names(known: Sequence[str], what: str) -> str:
    return f"{what}; may be repeated; all of {', '.join(known)} unless given"


def _parser() -> argparse.ArgumentParser:
    installed = (__package__ or "").startswith("lora_ortho.")
    program = "lora-ortho bench" if installed else "python -m benchmarks"
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="short rounds; no torch.compile, no scaling, no language model",
    )
    parser.add_argument(
        "--backend",
        choices=backends.names(),
        help="whose kernels; the best that works unless given",
    )
    parser.add_argument(
        "--case",
        type=_case,
        action="append",
        metavar="CASE",
        help="tokens x d_in x d_out - K x rank, such as 512x2048x2048-3x16; may be repeated; all "
        "of the targets' unless given",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, action="append", help=_names(list(DTYPES), "dtype")
    )
    parser.add_argument(
        "--only", choices=record.SECTIONS, action="append", help=_names(record.SECTIONS, "section")
    )
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=Path("-"),
        metavar="PATH",
        help="write the result to this file; without PATH to standard output instead of the tables",
    )
    parser.add_argument(
        "--save",
        action="store_true",
        help=f"write the result of this kind of machine into {record.RESULTS.name}/, replacing it",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing --json file")
    parser.add_argument(
        "--append", action="store_true", help="add to the rows of the file, replacing the same ones"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="PATH", help="draw the ratios to direct (.svg, .png, .pdf)"
    )
    parser.add_argument(
        "--budget",
        type=_seconds,
        default=math.inf,
        metavar="SECONDS",
        help="begin no further row after so long",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    return parser


def _case(text: str) -> Case:
    try:
        return Case.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return value


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    path: Path | None = arguments.json
    on_disk = path is not None and path != Path("-")
    if arguments.append and not on_disk:
        parser.error("--append needs --json PATH")
    if arguments.save and (arguments.json or arguments.append):
        parser.error("--save chooses its own file: no --json and no --append with it")
    if arguments.save and not record.RESULTS.is_dir():
        parser.error(f"--save is for a source checkout: there is no folder {record.RESULTS}")
    plot: Path | None = arguments.plot
    if plot is not None and plot.suffix not in (".svg", ".png", ".pdf"):
        parser.error(f"--plot must end in .svg, .png or .pdf, got {plot}")


def _check_outputs(arguments: argparse.Namespace, todo: Sequence[Task], bench: Bench) -> None:
    """Raises ValueError or ResultError for what could not be written after all the work."""
    path: Path | None = arguments.json
    if path is not None and path.exists():
        if arguments.append:
            record.join(record.load(path), empty_result(bench.device))
        elif not arguments.force:
            raise ValueError(f"{path} exists; --append adds to it, --force replaces it")
    plot: Path | None = arguments.plot
    if plot is None:
        return
    if plot.exists() and not arguments.force:
        raise ValueError(f"{plot} exists; --force replaces it")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib (pip install matplotlib)")
    if not any(task.section in ("forward", "backward") for task in todo):
        raise ValueError("--plot shows the sections forward and backward: neither is measured")


def _backend(name: str | None) -> str:
    """The backend to measure; raises ValueError with its reason where it does not work."""
    reasons = backends.available()
    order = ["cuda", "triton"] if torch.cuda.is_available() else []
    if name is None:
        return next((n for n in [*order, "cpu"] if reasons[n] is None), "reference")
    if reasons[name] is not None:
        raise ValueError(f"backend {name} does not work here: {reasons[name]}")
    return name


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save.

    Args:
        argv: the command line's words; those of this process unless given.
    Returns:
        0; 1 if a backend does not work, a file cannot be used, a result was wrong or the run was
        interrupted; its rows are then printed and saved, but for --save. Raises
        SystemExit with 2 on wrong usage.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    _check(parser, arguments)
    try:
        backend = _backend(arguments.backend)
        bench = Bench.of(backend, compiled=not arguments.quick)
        path: Path | None = arguments.json
        if arguments.save:
            path = record.RESULTS / f"{empty_result(bench.device).kind}.json"
        todo = list(
            tasks.choose(bench, arguments.quick, arguments.only, arguments.case, arguments.dtype)
        )
        _check_outputs(arguments, todo, bench)
        if not arguments.quiet:
            words = f"{len(todo)} rows, backend {backend}, {torch.get_num_threads()} threads"
            print(words, file=sys.stderr)
        result = run(todo, bench, arguments.quick, arguments.quiet, arguments.budget)
        if result.interrupted and arguments.save:
            path = None  # what was recorded before is whole
        result = _write(result, path, arguments.append)
        print(json.dumps(record.encode(result)) if path == Path("-") else report(result))
        if arguments.plot is not None:
            _plot(result, arguments.plot)
    except (record.ResultError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    hint = None if arguments.quiet or result.interrupted else how_to_contribute(result.kind)
    if hint is not None:
        print(hint, file=sys.stderr)
    wrong = failures(result)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong or result.interrupted else 0


def how_to_contribute(kind: str) -> str | None:
    """What to do where this kind of machine has no result file yet; else None."""
    name = f"{kind}.json"
    if kind.startswith("rehearsal") or (record.RESULTS / name).exists():
        return None
    if record.RESULTS.is_dir():
        file = f"benchmarks/results/{name}"
        how = f"`python -m benchmarks --save` writes {file}; add it to the project"
    else:
        command = f"`lora-ortho bench --json {name}`"
        how = f"run {command} and add the file to benchmarks/results/ of the project"
    return f"no figures of this kind of machine are recorded yet ({kind}): {how}"


def _write(result: Result, path: Path | None, append: bool) -> Result:
    """Save what was asked for; the result with its targets and the rows that an old file had."""
    file = None if path == Path("-") else path
    if file is not None and append and file.exists():
        result = record.join(record.load(file), result)
    result = replace(result, targets=judged(result))
    if file is not None:
        record.save(result, file)
    return result


def _plot(result: Result, path: Path) -> None:
    from .drawing import plot

    plot(result, path)


if __name__ == "__main__":
    sys.exit(main())
