"""Tables of a result file: ``python -m benchmarks.table [PATH]``, or ``--update README.md``.

The file that is updated says between which lines, and from which result file, once or more often:

    <!-- benchmark table: benchmarks/results/NAME.json -->
    <!-- end of benchmark table -->
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import pictures, record
from .cases import LARGE, ONE_TOKEN, Case
from .harness import DISTURBED
from .instructions import bound, per_element
from .record import Result
from .scaling import AXES, MEMORY_TOKENS, fit
from .targets import (
    EXPANDED,
    NotMeasured,
    View,
    cases_of,
    is_cpu,
    shown_cases,
    targets_of,
    verdict,
    views,
)

_BLOCK = re.compile(
    r"(<!-- benchmark table: (?P<path>\S+) -->\n).*?(<!-- end of benchmark table -->)", re.DOTALL
)
_COLUMNS: tuple[tuple[str, str, str, int], ...] = (
    ("forward ÷ direct", "forward", "ours/direct", 2),
    ("forward + backward ÷ direct", "backward", "ours/direct", 2),
    ("paper ÷ ours", "peers", "paper/ours", 1),
    ("compiled ÷ ours", "peers", "compiled/ours", 1),
    ("stored mask ÷ ours", "peers", "stored mask/ours", 1),
    ("vLLM ÷ ours", "peers", "vllm/ours", 2),
    ("PEFT layer ÷ our layer", "layer", "peft/ours", 2),
    ("our layer ÷ nn.Linear", "layer", "ours/linear", 2),
)
_MIB = 2**20


def report(result: Result) -> str:
    """Everything about a result, in Markdown."""
    parts = [_machine(result), targets(result), _cases(result), _details(result)]
    return "\n\n".join(part for part in parts if part)


def _machine(result: Result) -> str:
    machine, versions = result["machine"], result["versions"]
    timed = [row for section in record.SECTIONS for row in result[section] if "seconds" in row]
    disturbed = [row for row in timed if (row["others"] or 0.0) > DISTURBED]
    note = ""
    if disturbed and is_cpu(result):
        most = max(row["others"] for row in disturbed)
        note = (
            f" In {len(disturbed)} of {len(timed)} rows other processes kept up to {most:.1f} "
            "cores busy."
        )
    where = (
        f"{machine['gpu']}, CUDA {machine['cuda']}, driver {machine['driver']}"
        if "gpu" in machine
        else f"{machine['processor']}; {machine['cores']} cores, {machine['threads']} threads; "
        f"kernels for {machine['isa']}"
    )
    head = ""
    if result["kind"].startswith("rehearsal"):
        head = "REHEARSAL on a processor in the place of a GPU: none of this is a GPU's figure. "
    triton = f", Triton {versions['triton']}" if "gpu" in machine else ""
    return f"{head}{where}; torch {versions['torch']}{triton}, Python {versions['python']}.{note}"


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def targets(result: Result) -> str:
    """The table of targets, each met, missed or not measured."""
    columns = views(result)
    rows = [
        [target.figure, target.goal(), *(verdict(target, view) for view in columns)]
        for target in targets_of(result)
    ]
    return _rows(["figure", "target", *(view.title for view in columns)], rows)


def _cases(result: Result) -> str:
    """A row for each case and dtype; figures that no row has stay out."""
    names = ["share of floor", *(name for name, *_ in _COLUMNS)]
    rows = []
    for case in shown_cases(result):
        for view in views(result):
            cells = [_share(view, case), *(_cell(view, case, *column[1:]) for column in _COLUMNS)]
            if any(cells):
                rows.append([", ".join(map(str, case)), view.title, *cells])
    used = [j for j in range(len(names)) if any(row[2 + j] for row in rows)]
    head = ["tokens, d_in, d_out, K, r", "dtype", *(names[j] for j in used)]
    return _rows(head, [[*row[:2], *(row[2 + j] for j in used)] for row in rows]) if rows else ""


def _cell(view: View, case: Case, section: str, name: str, digits: int) -> str:
    try:
        return f"{view.ratio(section, case, name):.{digits}f}"
    except NotMeasured:
        return ""


def _share(view: View, case: Case) -> str:
    try:
        return f"{100 * view.share('forward', case):.0f} %"
    except NotMeasured:
        return ""


def _details(result: Result) -> str:
    """What fits in no table: ceilings, overhead, memory, samples, growth, models; a line each."""
    lines: list[str] = []
    for view in views(result):
        parts = (_ceilings, _issue, _overhead, _peers_memory, _tokens_memory, _samples, _growth)
        for part in parts:
            try:
                lines += part(view)
            except NotMeasured:
                continue
    lines += _models(result)
    return "\n".join(f"- {line}" for line in lines)


def _ceilings(view: View) -> list[str]:
    rates = view.ceilings()
    return [
        f"Ceilings, {view.title}: copy {rates['copy_bytes_per_second'] / 1e9:.1f} GB/s, matrix "
        f"product {rates['matmul_operations_per_second'] / 1e12:.2f} TFLOP/s. The floor of a case "
        "is the longer of its bytes and its operations at these rates; where it fits in a cache, "
        "more than 100 % is possible."
    ]


def _issue(view: View) -> list[str]:
    machine = view.result["machine"]
    count = per_element(view.backend, str(machine.get("capability", "")), view.dtype)
    rate = None if count is None else bound(machine, count)
    if count is None or rate is None:
        return []
    text = (
        f"Draw + expand + add, K = 3, r = 16, {view.title}: {count:.1f} instructions an element by "
        f"the compiler's output, so {rate / 1e12:.2f}e12 elements a second at most"
    )
    case = EXPANDED[0]
    seconds = view.find("expand", case).get("seconds", {})
    if "ours" in seconds:
        measured = case.tokens * case.d_out / seconds["ours"]["median"]
        text += f"; measured {measured / 1e12:.2f}e12 ({100 * measured / rate:.0f} %)"
    return [text + "."]


def _overhead(view: View) -> list[str]:
    case = cases_of(view.result)[0] if ONE_TOKEN not in cases_of(view.result) else ONE_TOKEN
    seconds = view.find("overhead", case).get("seconds", {})
    if "kernels" not in seconds:
        raise NotMeasured("")
    micro = {name: 1e6 * times["median"] for name, times in seconds.items()}
    return [
        f"One token, {case.d_in} × {case.d_out}, {view.title}: kernels {micro['kernels']:.0f} µs; "
        f"Python adds {micro['prepared'] - micro['kernels']:.0f} µs in the prepared call and "
        f"{micro['public'] - micro['kernels']:.0f} µs in the public op; direct takes "
        f"{micro['direct']:.0f} µs in all."
    ]


def _peers_memory(view: View) -> list[str]:
    found = []
    for contender in ("ours", "direct", "paper", "categorical"):
        row = view.find("memory", LARGE, contender)
        if "forward" in row:
            found.append(f"{contender} {max(0.0, row['forward'] / _MIB):.1f} MiB")
    size = " × ".join(map(str, LARGE[:3]))
    return [f"Memory of one forward beyond output and s, {size}, {view.title}: {', '.join(found)}."]


def _tokens_memory(view: View) -> list[str]:
    """Ours against tokens, in both directions: what grows with them would show here."""
    rows = [view.find("memory", case, "ours") for case in MEMORY_TOKENS]
    if any(name not in row for row in rows for name in ("forward", "backward")):
        raise NotMeasured("")
    spans = {
        name: ", ".join(f"{max(0, row[name]) / _MIB:.1f}" for row in rows)
        for name in ("forward", "backward")
    }
    case, tokens = MEMORY_TOKENS[0], ", ".join(str(case.tokens) for case in MEMORY_TOKENS)
    return [
        f"Memory of ours beyond inputs and results, {case.d_in} × {case.d_out}, K = "
        f"{case.adapters}, r = {case.rank}, {view.title}, at {tokens} tokens: forward "
        f"{spans['forward']} MiB; backward {spans['backward']} MiB."
    ]


def _samples(view: View) -> list[str]:
    rows = [
        row for row in view.result["samples"]
        if (row["dtype"], row["backend"]) == (view.dtype, view.backend)
        and "seconds_per_sample" in row
    ]  # fmt: skip
    found = []
    for row in rows:
        seconds = {name: 1e3 * times["median"] for name, times in row["seconds"].items()}
        more = 1e3 * row["seconds_per_sample"]
        found.append(
            f"One Monte Carlo sample more, {row['case']}, {view.title}: {more:.2f} ms, "
            f"{more / seconds['linear']:.2f} of the layer's own product; of the paper's "
            f"construction {seconds['paper']:.1f} ms."
        )
    return found


def growth(view: View) -> Iterable[tuple[str, str, str, dict[int, float]]]:
    """Axis, contender, range and seconds by size, for every line of points there is."""
    for axis in AXES:
        points: dict[str, dict[int, float]] = {}
        for row in view.result["scaling"]:
            if (row.get("axis"), row["dtype"], row["backend"]) == (axis, view.dtype, view.backend):
                for name, times in row.get("seconds", {}).items():
                    points.setdefault(name, {})[row["at"]] = times["median"]
        for name, seconds in points.items():
            if len(seconds) > 1:
                yield axis, name, f"{min(seconds)} … {max(seconds)}", seconds


def _growth(view: View) -> list[str]:
    lines: dict[str, list[str]] = {}
    for axis, name, span, seconds in growth(view):
        found = fit(seconds)
        text = f"{name} {found.exponent:.2f}"
        if name == "ours" and found.above(AXES[axis].bound):
            text += (
                f" (**WARNING: above {AXES[axis].bound}**, {found.last:.2f} between the last two)"
            )
        lines.setdefault(f"{axis} {span}", []).append(text)
    if not lines:
        return []
    words = "; ".join(f"{axis}: {', '.join(texts)}" for axis, texts in lines.items())
    return [f"Time grows as size to the power of, {view.title}: {words}."]


def _models(result: Result) -> list[str]:
    lines = []
    for row in result["model"]:
        if "seconds" not in row:
            continue
        unit = "tokens/s" if row["step"] == "forward" else "steps/s"
        many = row["tokens"] if row["step"] == "forward" else 1
        rates = ", ".join(
            f"{name} {many / times['median']:.3g}" for name, times in row["seconds"].items()
        )
        lines.append(f"{row['case']}, {row['dtype']}, {row['step']}, {unit}: {rates}.")
        if "profile" in row:
            top = ", ".join(f"{p['name']} {100 * p['share']:.0f} %" for p in row["profile"])
            share = f"our kernels take {100 * row['share']:.0f} % of its time"
            lines.append(f"Of that with ours, {share}; most of it: {top}.")
    return lines


def blocks(text: str) -> tuple[list[Path], str]:
    """Of a page with tables: their result files, relative; the page as it should be.

    Raises:
        record.ResultError: no markers in the page, or a result file cannot be used.
    """
    root, paths = record.RESULTS.parent.parent, []

    def renewed(found: re.Match[str]) -> str:
        path = Path(found["path"])
        paths.append(path)
        result = record.load(root / path)
        parts = [pictures.markup(result), report(result)]
        body = "\n\n".join(part for part in parts if part)
        return f"{found[1]}\n{body}\n\n{found[3]}"

    wanted = _BLOCK.sub(renewed, text)
    if not paths:
        raise record.ResultError("no lines that mark where the benchmark table goes")
    return paths, wanted


def update(page: Path) -> None:
    """Write a page's tables anew; the page appears whole or stays as it was."""
    _, wanted = blocks(page.read_text(encoding="utf-8"))
    temporary = page.with_name(f".{page.name}.new")
    temporary.write_text(wanted, encoding="utf-8")
    os.replace(temporary, page)


def main(argv: Sequence[str] | None = None) -> int:
    """Print or update. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("path", type=Path, nargs="?", help="result file to print")
    parser.add_argument("--targets", action="store_true", help="print only the targets")
    parser.add_argument("--update", type=Path, metavar="PAGE", help="page whose table to renew")
    arguments = parser.parse_args(argv)
    if (arguments.path is None) == (arguments.update is None):
        parser.error("give a result file or --update, not both")
    try:
        if arguments.update is not None:
            update(arguments.update)
        else:
            result = record.load(arguments.path)
            print(targets(result) if arguments.targets else report(result))
    except (record.ResultError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
