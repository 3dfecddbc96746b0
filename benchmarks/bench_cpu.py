"""The CPU benchmarks: ``python -m benchmarks.bench_cpu``. Progress on stderr, tables on stdout."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import record, sections
from benchmarks.cases import CPU_CASES, DTYPES, LARGE, ONE_TOKEN, Case
from benchmarks.harness import Effort
from benchmarks.record import Result, Row
from benchmarks.table import report
from lora_ortho import backends

_MEMORY_PEERS = ("direct", "paper", "categorical")  # beside ours, at the largest case


class Task(NamedTuple):
    """One row to measure; ``contender`` for memory alone."""

    section: str
    case: Case
    dtype: str
    contender: str = ""


def tasks(chosen: Sequence[str], cases: Sequence[Case], dtypes: Sequence[str]) -> Iterator[Task]:
    """Everything that the sections measure at these cases; what belongs to one case only there."""
    for case in cases:
        for dtype in dtypes:
            for section in chosen:
                if section == "memory":
                    peers = _MEMORY_PEERS if case == LARGE else ()
                    for contender in ("ours", *peers):
                        yield Task(section, case, dtype, contender)
                elif case == {"threads": LARGE, "overhead": ONE_TOKEN}.get(section, case):
                    yield Task(section, case, dtype)


def perform(task: Task, quick: bool) -> Row:
    """Measure one row."""
    section, case, dtype, contender = task
    scale = 0.25 if quick else 1.0
    few = Effort(2.0 * scale, least=3 if quick else 15)
    if section == "memory":
        return sections.extra_memory(case, dtype, contender)
    if section == "peers":
        return sections.slow_peers(case, dtype, few, compiled=not quick)
    if section == "layer":
        return sections.layer(case, dtype, few)
    measure = getattr(sections, section)
    seconds = {"forward": 1.5, "backward": 2.0, "threads": 4.0, "overhead": 1.0}[section]
    row: Row = measure(case, dtype, Effort(seconds * scale))
    return row


def run(todo: Sequence[Task], quick: bool) -> Result:
    """Measure rows one after the other, with progress."""
    result, start = record.empty(), time.perf_counter()
    for number, task in enumerate(todo, 1):
        words = " ".join(str(part) for part in task if part)
        print(f"[{number}/{len(todo)}] {words}", end=" ", file=sys.stderr, flush=True)
        row = perform(task, quick)
        result[task.section].append(row)
        print(f"{_short(row)} ({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
    return result


def _short(row: Row) -> str:
    """A row's ratios, or what else it found."""
    found = [f"{name} {q['median']:.3g}" for name, q in row.get("ratios", {}).items()]
    found += [f"{name} x{q['median']:.3g}" for name, q in row.get("speedup", {}).items()]
    found += [f"{k} {row[k] / 2**20:.2f} MiB" for k in ("forward", "backward") if k in row]
    refused = row.get("refused") or {}
    found += [f"{k}: {v}" for k, v in (refused if isinstance(refused, dict) else {}).items()]
    return ", ".join(found)


def _names(known: Sequence[str], what: str) -> str:
    return f"{what}; may be repeated; all of {', '.join(known)} unless given"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_cpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter, without torch.compile")
    parser.add_argument(
        "--case", type=_case, action="append", metavar="CASE",
        help=_names([str(case) for case in CPU_CASES], "tokens x d_in x d_out - K x rank"),
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=DTYPES, action="append", help=_names(list(DTYPES), "dtype")
    )
    parser.add_argument(
        "--only", choices=record.SECTIONS, action="append", help=_names(record.SECTIONS, "section")
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result to this file")
    parser.add_argument(
        "--append", action="store_true", help="add to the rows of the file, replacing the same ones"
    )
    return parser


def _case(text: str) -> Case:
    try:
        return Case.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save. Returns the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    path: Path | None = arguments.json
    if arguments.append and path is None:
        parser.error("--append needs --json")
    if path is not None and path.exists() and not arguments.append:
        parser.error(f"{path} exists; --append adds to it")
    missing = backends.available()["cpu"]
    if missing is not None:
        print(f"nothing to measure: {missing}", file=sys.stderr)
        return 1
    todo = list(
        tasks(
            arguments.only or record.SECTIONS, arguments.case or CPU_CASES,
            arguments.dtype or list(DTYPES),
        )
    )  # fmt: skip
    print(f"{len(todo)} rows on {torch.get_num_threads()} threads", file=sys.stderr)
    try:
        result = run(todo, arguments.quick)
        if path is not None and path.exists():
            result = record.join(record.load(path), result)
        if path is not None:
            record.save(result, path)
    except record.ResultError as error:
        print(error, file=sys.stderr)
        return 1
    print(report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
