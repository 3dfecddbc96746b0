"""Renews what the pages show of the recorded benchmarks: `make figures`.

All of docs/benchmarks.md, which has every result file whole; the headline figures in README.md,
between two lines that name the result files they are of, separated by spaces; and the pictures of
the page. Run from the root of the sources: ``python -m tools.figures``.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import drawing, pictures, record, report
from benchmarks.record import Result
from benchmarks.targets import View, is_cpu, targets_of, verdict, views

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path("docs/benchmarks.md")
_BLOCK = re.compile(
    r"(<!-- benchmark table: (?P<paths>[^>]+) -->\n).*?(<!-- end of benchmark table -->)", re.DOTALL
)
_INTRODUCTION = """\
# Benchmarks: every figure

Written by `make figures` from the files in [benchmarks/results](../benchmarks/results). What is
compared, and how, is in [benchmarks](../benchmarks/README.md). Direct is torch's own `addmm` with
joined factors, which has no masks. Every result was checked against float64 before it was timed,
and cases that lose stay in."""


def page(results: Sequence[Result]) -> str:
    """The text of docs/benchmarks.md."""
    parts = [_INTRODUCTION]
    for result in results:
        parts.append(f"## {result.kind}")
        if result in _pictured(results):
            parts += [_picture(result, name) for name in pictures.present(result)]
        parts.append(report.report(result))
    return "\n\n".join(parts) + "\n"


def with_headlines(text: str, root: Path) -> tuple[list[Path], str]:
    """Of a README: the result files that it names, relative to the root; the text as it should be.

    Raises:
        record.ResultError: nothing marks where the table goes, or a result file cannot be used.
    """
    found = _BLOCK.search(text)
    if found is None:
        raise record.ResultError("README.md: no lines mark where the benchmark table goes")
    paths = [Path(name) for name in found["paths"].split()]
    results = [record.load(root / path) for path in paths]
    parts = [report.machine_line(result) for result in results]
    for group in ([r for r in results if is_cpu(r)], [r for r in results if not is_cpu(r)]):
        if group:
            parts.append(_headlines(group))
    block = "\n\n".join(parts)
    return paths, _BLOCK.sub(lambda _: f"{found[1]}\n{block}\n\n{found[3]}", text, count=1)


def _headlines(results: Sequence[Result]) -> str:
    """The headline figures, a column for each dtype of each kind of machine."""
    columns = [view for result in results for view in views(result)]
    rows = [
        [target.figure, target.goal(), *(verdict(target, view) for view in columns)]
        for target in targets_of(results[0])
        if target.headline
    ]
    return report.table(["figure", "target", *map(_title, columns)], rows)


def _title(view: View) -> str:
    machine = view.result.machine
    return f"{machine.isa if machine.gpu is None else machine.gpu.name}, {view.title}"


def _pictured(results: Sequence[Result]) -> list[Result]:
    """Those of which there are pictures: the first of processors and the first of GPUs."""
    return list({result.kind.split("-")[0]: result for result in reversed(results)}.values())


def _picture(result: Result, name: str) -> str:
    """A picture as the page shows it."""
    path = pictures.path_of(result, name).relative_to(PAGE.parent)
    return f"![{pictures.DESCRIPTIONS[name]}]({path.as_posix()})"


def _write(path: Path, text: str) -> None:
    """The file appears whole or stays as it was."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def recorded(root: Path) -> list[Path]:
    """The result files of a checkout, relative to it."""
    return [path.relative_to(root) for path in sorted((root / "benchmarks/results").glob("*.json"))]


def wanted_pictures(results: Sequence[Result]) -> dict[Path, tuple[str, pictures.Data]]:
    """By path, the name and the data of every picture that the page shows."""
    return {
        pictures.path_of(result, name): (name, data)
        for result in _pictured(results)
        for name, data in pictures.present(result).items()
    }


def main() -> int:
    """Renew. Returns the exit status."""
    try:
        results = [record.load(ROOT / path) for path in recorded(ROOT)]
        shown, readme = with_headlines((ROOT / "README.md").read_text(encoding="utf-8"), ROOT)
        drawn = wanted_pictures(results)
        for path, (name, data) in drawn.items():
            drawing.draw(name, data, ROOT / path)
        _write(ROOT / PAGE, page(results))
        _write(ROOT / "README.md", readme)
    except (record.ResultError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"README.md, {PAGE}: renewed; {len(drawn)} pictures drawn")
    for path in recorded(ROOT):
        if path not in shown:
            print(f"not in the README's table: {path}; add it to the line that marks the table")
    return 0


if __name__ == "__main__":
    sys.exit(main())
