"""Results as tables: ``python -m benchmarks.report PATH``."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import record
from .cases import AXES, EXPANDED, LARGE, MEMORY_TOKENS, ONE_TOKEN, Case
from .harness import DISTURBED_CORES
from .record import ModelRow, Result, TimedRow
from .targets import (
    NotMeasured,
    View,
    cases_of,
    is_cpu,
    shown_cases,
    targets_of,
    verdict,
    views,
)

FACTS = Path(__file__).resolve().parent.parent / "docs" / "facts"
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
# The exponent of growth of ours above which the report warns: 1 is in proportion to a size.
_BOUNDS = {"tokens": 1.2, "d_out": 1.2, "K": 1.1, "rank": 1.1, "threads": 0.1}
_ISSUE_LANES = 4 * 32  # threads for which a multiprocessor issues an instruction in one cycle


def report(result: Result) -> str:
    """Everything about a result, in Markdown."""
    parts = [machine_line(result), targets(result), _cases(result), _details(result)]
    return "\n\n".join(part for part in parts if part)


def machine_line(result: Result) -> str:
    """Where a result comes from, in one line."""
    machine, versions = result.machine, result.versions
    rows = [row for _, row in result.every_row()]
    timed = [row.others_cores or 0.0 for row in rows if isinstance(row, TimedRow | ModelRow)]
    disturbed = [cores for cores in timed if cores > DISTURBED_CORES]
    note = ""
    if disturbed and is_cpu(result):
        most = f"up to {max(disturbed):.1f} cores busy."
        note = f" In {len(disturbed)} of {len(timed)} rows other processes kept {most}"
    gpu = machine.gpu
    where = (
        f"{machine.processor}; {machine.cores} cores, {machine.threads} threads; kernels for "
        f"{machine.isa}"
        if gpu is None
        else f"{gpu.name}, CUDA {gpu.cuda}, driver {gpu.driver}"
    )
    head = ""
    if result.kind.startswith("rehearsal"):
        head = "REHEARSAL on a processor in the place of a GPU: none of this is a GPU's figure. "
    triton = f", Triton {versions['triton']}" if gpu is not None else ""
    return f"{head}{where}; torch {versions['torch']}{triton}, Python {versions['python']}.{note}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown; all columns but the first are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def targets(result: Result) -> str:
    """The table of targets, each met, missed or not measured."""
    columns = views(result)
    rows = [
        [target.figure, target.goal(), *(verdict(target, view) for view in columns)]
        for target in targets_of(result)
    ]
    return table(["figure", "target", *(view.title for view in columns)], rows)


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
    return table(head, [[*row[:2], *(row[2 + j] for j in used)] for row in rows]) if rows else ""


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
    for row in result.model:
        lines += _model(row)
    return "\n".join(f"- {line}" for line in lines)


def _ceilings(view: View) -> list[str]:
    rates = view.ceilings()
    return [
        f"Ceilings, {view.title}: copy {rates.copy_bytes_per_second / 1e9:.1f} GB/s, matrix "
        f"product {rates.matmul_operations_per_second / 1e12:.2f} TFLOP/s. The floor of a case "
        "is the longer of its bytes and its operations at these rates; where it fits in a cache, "
        "more than 100 % is possible."
    ]


def _issue(view: View) -> list[str]:
    """The bound that the instructions of the expand step set, counted by compilers."""
    gpu = view.result.machine.gpu
    if gpu is None or gpu.clock_mhz is None:
        return []
    count = instructions_per_element(view.backend, gpu.capability, view.dtype)
    if count is None:
        return []
    rate = gpu.multiprocessors * _ISSUE_LANES * gpu.clock_mhz * 1e6 / count
    text = (
        f"Draw + expand + add, K = 3, r = 16, {view.title}: {count:.1f} instructions an element by "
        f"the compiler's output, so {rate / 1e12:.2f}e12 elements a second at most"
    )
    case = EXPANDED[0]
    seconds = view.timed("expand", case).seconds
    if "ours" in seconds:
        measured = case.tokens * case.d_out / seconds["ours"].median
        text += f"; measured {measured / 1e12:.2f}e12 ({100 * measured / rate:.0f} %)"
    return [text + "."]


def instructions_per_element(backend: str, capability: str, dtype: str) -> float | None:
    """Those that expand issues for each element at K = 3, r = 16 under disjoint masks.

    From the compiled facts of docs/facts/, for a GPU of a capability such as "9.0"; None where they
    do not say, and where there are no sources.
    """
    path = FACTS / f"{backend}.json"
    if not path.is_file():
        return None
    arch = "sm_" + capability.replace(".", "")
    wanted = {"kernel": "expand", "draw": "shared", "adapters": 3, "rank": 16, "dtype": dtype}
    kernels: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["kernels"]
    for fact in kernels:
        count = fact["instructions_per_element"]
        right = wanted.items() <= fact.items() and fact["arch"] in (arch, f"{arch}a")
        if right and count is not None:
            return float(count)
    return None


def _overhead(view: View) -> list[str]:
    own = cases_of(view.result)
    case = ONE_TOKEN if ONE_TOKEN in own else own[0]
    seconds = view.timed("overhead", case).seconds
    if "kernels" not in seconds:
        return []
    micro = {name: 1e6 * times.median for name, times in seconds.items()}
    return [
        f"One token, {case.d_in} × {case.d_out}, {view.title}: kernels {micro['kernels']:.0f} µs; "
        f"Python adds {micro['prepared'] - micro['kernels']:.0f} µs in the prepared call and "
        f"{micro['public'] - micro['kernels']:.0f} µs in the public op; direct takes "
        f"{micro['direct']:.0f} µs in all."
    ]


def _peers_memory(view: View) -> list[str]:
    found = []
    for contender in ("ours", "direct", "paper", "categorical"):
        size = view.memory(LARGE, contender).forward_bytes
        if size is not None:
            found.append(f"{contender} {max(0.0, size / _MIB):.1f} MiB")
    sizes, words = " × ".join(map(str, LARGE[:3])), ", ".join(found)
    return [f"Memory of one forward beyond output and s, {sizes}, {view.title}: {words}."]


def _tokens_memory(view: View) -> list[str]:
    """Ours against tokens, in both directions: what grows with them would show here."""
    rows = [view.memory(case, "ours") for case in MEMORY_TOKENS]
    forward, backward = (
        ", ".join(f"{max(0, size) / _MIB:.1f}" for size in sizes if size is not None)
        for sizes in ([r.forward_bytes for r in rows], [r.backward_bytes for r in rows])
    )
    case, tokens = MEMORY_TOKENS[0], ", ".join(str(case.tokens) for case in MEMORY_TOKENS)
    return [
        f"Memory of ours beyond inputs and results, {case.d_in} × {case.d_out}, K = "
        f"{case.adapters}, r = {case.rank}, {view.title}, at {tokens} tokens: forward "
        f"{forward} MiB; backward {backward} MiB."
    ]


def _samples(view: View) -> list[str]:
    found = []
    for row in view.of(view.result.samples):
        if row.seconds_per_sample is None or not {"linear", "paper"} <= row.seconds.keys():
            continue
        more, linear = row.seconds_per_sample, row.seconds["linear"].median
        found.append(
            f"One Monte Carlo sample more, {row.case}, {view.title}: {1e3 * more:.2f} ms, "
            f"{more / linear:.2f} of the layer's own product; of the paper's "
            f"construction {1e3 * row.seconds['paper'].median:.1f} ms."
        )
    return found


class Growth(NamedTuple):
    """A fit of log time against log size.

    Attributes:
        exponent: slope of the least-squares line.
        last: slope between the two largest sizes, where a late surprise shows first.
    """

    exponent: float
    last: float

    def above(self, bound: float) -> bool:
        """Whether either slope is more than the bound."""
        return max(self.exponent, self.last) > bound


def fit(seconds: Mapping[int, float]) -> Growth:
    """From seconds by size, two sizes or more."""
    sizes = sorted(seconds)
    x, y = [math.log(n) for n in sizes], [math.log(seconds[n]) for n in sizes]
    slope = statistics.linear_regression(x, y).slope
    return Growth(slope, (y[-1] - y[-2]) / (x[-1] - x[-2]))


def _growth(view: View) -> list[str]:
    """Every axis, of which two points or more were measured, in one line."""
    lines = []
    for axis in AXES:
        points: dict[str, dict[int, float]] = {}
        for row in view.of(view.result.scaling):
            if row.axis == axis:
                for name, times in row.seconds.items():
                    points.setdefault(name, {})[row.size] = times.median
        sizes = {size for seconds in points.values() for size in seconds}
        texts = [
            _exponent(axis, name, fit(seconds))
            for name, seconds in points.items()
            if len(seconds) > 1
        ]
        if texts:
            lines.append(f"{axis} {min(sizes)} … {max(sizes)}: {', '.join(texts)}")
    if not lines:
        return []
    return [f"Time grows as size to the power of, {view.title}: {'; '.join(lines)}."]


def _exponent(axis: str, name: str, found: Growth) -> str:
    text, bound = f"{name} {found.exponent:.2f}", _BOUNDS[axis]
    if name == "ours" and found.above(bound):
        text += f" (**WARNING: above {bound}**, {found.last:.2f} between the last two)"
    return text


def _model(row: ModelRow) -> Iterator[str]:
    forward = row.step == "forward"
    unit, many = ("tokens/s", row.tokens) if forward else ("steps/s", 1)
    rates = ", ".join(f"{name} {many / times.median:.3g}" for name, times in row.seconds.items())
    size = f"{row.tokens} at once" if forward else f"{row.tokens} tokens a step"
    yield f"{row.model}, {size}, {row.dtype}, {row.step}, {unit}: {rates}."
    if row.ours_share is not None:
        top = ", ".join(f"{op.name} {100 * op.share:.0f} %" for op in row.profile)
        share = f"our kernels take {100 * row.ours_share:.0f} % of its time"
        yield f"Of that with ours, {share}; most of it: {top}."


def main(argv: Sequence[str] | None = None) -> int:
    """Print. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("path", type=Path, help="result file")
    parser.add_argument("--targets", action="store_true", help="print only the targets")
    arguments = parser.parse_args(argv)
    try:
        result = record.load(arguments.path)
    except record.ResultError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(targets(result) if arguments.targets else report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
