"""Tables of a result file: ``python -m benchmarks.table [PATH]``, or ``--update README.md``.

The file that is updated says between which lines, and from which result file:

    <!-- benchmark table: benchmarks/results/NAME.json -->
    <!-- end of benchmark table -->
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import record
from benchmarks.cases import CPU_CASES, DTYPES, LARGE, ONE_TOKEN, Case
from benchmarks.harness import DISTURBED
from benchmarks.record import Result
from benchmarks.targets import TARGETS, NotMeasured, Target, find, ratio

_BLOCK = re.compile(
    r"(<!-- benchmark table: (?P<path>\S+) -->\n).*?(<!-- end of benchmark table -->)", re.DOTALL
)
_COLUMNS: tuple[tuple[str, str, str, int], ...] = (
    ("forward ÷ direct", "forward", "ours/direct", 2),
    ("forward + backward ÷ direct", "backward", "ours/direct", 2),
    ("paper ÷ ours", "peers", "paper/ours", 1),
    ("compiled ÷ ours", "peers", "compiled/ours", 1),
    ("PEFT layer ÷ our layer", "layer", "peft/ours", 2),
)


def report(result: Result) -> str:
    """Everything about a result, in Markdown."""
    parts = [_machine(result), _targets(result), _cases(result), _details(result)]
    return "\n\n".join(part for part in parts if part)


def _machine(result: Result) -> str:
    machine, versions = result["machine"], result["versions"]
    timed = [row for section in record.SECTIONS for row in result[section] if "seconds" in row]
    disturbed = [row for row in timed if (row["others"] or 0.0) > DISTURBED]
    note = ""
    if disturbed:
        most = max(row["others"] for row in disturbed)
        note = (
            f" In {len(disturbed)} of {len(timed)} rows other processes kept up to {most:.1f} "
            "cores busy."
        )
    return (
        f"{machine['processor']}; {machine['cores']} cores, {machine['threads']} threads; kernels "
        f"for {machine['isa']}; torch {versions['torch']}, Python {versions['python']}.{note}"
    )


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _targets(result: Result) -> str:
    rows = []
    for target in TARGETS:
        verdicts = [_verdict(target, result, dtype) for dtype in DTYPES]
        rows.append([target.figure, target.goal(), *verdicts])
    return _rows(["figure", "target", *DTYPES], rows)


def _verdict(target: Target, result: Result, dtype: str) -> str:
    if dtype not in target.dtypes:
        return ""
    try:
        value = target.value(result, dtype)
    except NotMeasured as reason:
        return f"not measured: {reason}" if str(reason) else "not measured"
    text = f"{value:.{target.digits}f}{target.unit}"
    return f"{text} met" if target.met(value) else f"**{text} missed**"


def _cases(result: Result) -> str:
    head = ["tokens, d_in, d_out, K, r", "dtype", *(name for name, *_ in _COLUMNS)]
    rows = []
    for case in CPU_CASES:
        for dtype in DTYPES:
            cells = [_cell(result, case, dtype, *column[1:]) for column in _COLUMNS]
            if any(cells):
                rows.append([", ".join(map(str, case)), dtype, *cells])
    return _rows(head, rows) if rows else ""


def _cell(result: Result, case: Case, dtype: str, section: str, name: str, digits: int) -> str:
    try:
        return f"{ratio(result, section, case, dtype, name):.{digits}f}"
    except NotMeasured:
        return ""


def _details(result: Result) -> str:
    """Call overhead and memory of the peers, a line each."""
    lines = []
    for dtype in DTYPES:
        lines += _overhead(result, ONE_TOKEN, dtype) + _peers_memory(result, LARGE, dtype)
    return "\n".join(f"- {line}" for line in lines)


def _overhead(result: Result, case: Case, dtype: str) -> list[str]:
    try:
        seconds = find(result, "overhead", case, dtype)["seconds"]
    except NotMeasured:
        return []
    micro = {name: 1e6 * times["median"] for name, times in seconds.items()}
    return [
        f"One token, {case.d_in} × {case.d_out}, {dtype}: kernels {micro['kernels']:.0f} µs; "
        f"Python adds {micro['prepared'] - micro['kernels']:.0f} µs in the prepared call and "
        f"{micro['public'] - micro['kernels']:.0f} µs in the public op; direct takes "
        f"{micro['direct']:.0f} µs in all."
    ]


def _peers_memory(result: Result, case: Case, dtype: str) -> list[str]:
    found = []
    for contender in ("ours", "direct", "paper", "categorical"):
        try:
            row = find(result, "memory", case, dtype, contender)
        except NotMeasured:
            continue
        if "forward" in row:
            found.append(f"{contender} {max(0.0, row['forward'] / 2**20):.1f} MiB")
    if len(found) < 2:
        return []
    size = " × ".join(map(str, case[:3]))
    return [f"Memory of one forward beyond output and s, {size}, {dtype}: {', '.join(found)}."]


def block(text: str) -> tuple[Path, str, str]:
    """Of a page with a table: its result file, relative; the page as it should be; as it is.

    Raises:
        record.ResultError: no markers in the page, or the result file cannot be used.
    """
    found = _BLOCK.search(text)
    if found is None:
        raise record.ResultError("no lines that mark where the benchmark table goes")
    path = Path(found["path"])
    table = report(record.load(record.RESULTS.parent.parent / path))
    return path, _BLOCK.sub(lambda m: f"{m[1]}\n{table}\n\n{m[3]}", text, count=1), text


def update(page: Path) -> None:
    """Write a page's table anew; the page appears whole or stays as it was."""
    _, wanted, _ = block(page.read_text(encoding="utf-8"))
    temporary = page.with_name(f".{page.name}.new")
    temporary.write_text(wanted, encoding="utf-8")
    os.replace(temporary, page)


def main(argv: Sequence[str] | None = None) -> int:
    """Print or update. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("path", type=Path, nargs="?", help="result file to print")
    parser.add_argument("--update", type=Path, metavar="PAGE", help="page whose table to renew")
    arguments = parser.parse_args(argv)
    if (arguments.path is None) == (arguments.update is None):
        parser.error("give a result file or --update, not both")
    try:
        if arguments.update is not None:
            update(arguments.update)
        else:
            print(report(record.load(arguments.path)))
    except (record.ResultError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
