"""Draws the pictures of result files: ``python -m benchmarks.figures README.md`` (`make figures`).

Renews the tables of a page and, of every result file that it names, the pictures in light and dark.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from . import pictures, record, table
from .pictures import Data
from .record import Result


@dataclass(frozen=True)
class Theme:
    """Colours on one ground; told apart by colour-blind readers too."""

    ink: str
    faint: str
    good: str
    colours: dict[str, str]
    columns: tuple[str, ...]


THEMES = {
    "light": Theme(
        "#1f2328", "#d0d7de", "#0072b2",
        {"ours": "#0072b2", "direct": "#6e7781", "paper": "#d55e00"},
        ("#0072b2", "#d55e00", "#009e73", "#cc79a7"),
    ),
    "dark": Theme(
        "#e6edf3", "#3d444d", "#56b4e9",
        {"ours": "#56b4e9", "direct": "#9198a1", "paper": "#ff8c42"},
        ("#56b4e9", "#ff8c42", "#2fd3a5", "#e39cc4"),
    ),
}  # fmt: skip
_MARKERS = "oDs^"
_LEAST_MIB = 0.1  # what the measurement of memory resolves
_LABEL = 0.075  # of the height of a panel, for a line of text
_SALT = "lora_ortho"  # of the ids in a file: the same data gives the same bytes


def _style(theme: Theme) -> dict[str, Any]:
    named = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    ink: dict[str, Any] = dict.fromkeys(named, theme.ink)
    return ink | {
        "font.size": 10.0, "font.family": "DejaVu Sans", "axes.edgecolor": theme.faint,
        "grid.color": theme.faint, "grid.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
        "axes.titlesize": 11.0, "axes.titleweight": "bold", "figure.facecolor": "none",
        "axes.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False,
        "svg.hashsalt": _SALT, "svg.fonttype": "path", "xtick.minor.visible": False,
    }  # fmt: skip


def _case(case: Sequence[int]) -> str:
    t, d_in, d_out, count, rank = case
    return f"{t:>4} × {d_in:>4} × {d_out:>5}  K {count:>2} r {rank:>2}"


def _number(value: float) -> str:
    """Without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _plain(axis: Any, values: Sequence[float], text: str = "{:g}") -> None:
    """Ticks at these values and no others, as plain numbers."""
    axis.set_major_locator(matplotlib.ticker.FixedLocator(list(values)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: text.format(v)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def ratio(data: Data, theme: Theme) -> Figure:
    """A row for each case, a mark for each column, quartiles as a line."""
    cases, columns = data["cases"], data["columns"]
    figure, panels = plt.subplots(1, 2, figsize=(9.4, 0.37 * len(cases) + 1.35), sharey=True)
    found = [q for c in columns for s in ("forward", "backward") for q in c[s] if q]
    low = min(0.5, 0.9 * min(q[1] for q in found))
    high = max([2.0, *(1.1 * (q[2] if q[2] < 8 * q[0] else q[0]) for q in found)])
    for axes, section, title in zip(
        panels, ("forward", "backward"), ("Forward", "Forward + backward"), strict=True
    ):
        axes.axvline(1, color=theme.ink, lw=1)
        for j, column in enumerate(columns):
            shift = 0.3 * (j - (len(columns) - 1) / 2)
            for y, q in enumerate(column[section]):
                if q is None:
                    continue
                look = {"color": theme.columns[j % len(theme.columns)], "zorder": 3}
                span = [max(q[1], low), min(q[2], high)]
                axes.plot(span, [y + shift] * 2, lw=2, alpha=0.55, **look)
                axes.plot(q[0], y + shift, marker=_MARKERS[j % 4], ms=6, ls="", **look)
        axes.set(xscale="log", xlim=(low, high), title=title, xlabel="time ÷ direct merge")
        ticks = [v for v in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 8) if low <= v <= high]
        _plain(axes.xaxis, ticks)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    labels = [_case(case) for case in cases]
    panels[0].set_yticks(range(len(cases)), labels, family="DejaVu Sans Mono", fontsize=9)
    panels[0].set_ylim(len(cases) - 0.4, -0.9)
    panels[0].text(0.985, -0.7, "slower →", ha="right", va="center", fontsize=8.5,
                   transform=panels[0].get_yaxis_transform())  # fmt: skip
    panels[0].text(0.015, -0.7, "← faster", ha="left", va="center", fontsize=8.5,
                   transform=panels[0].get_yaxis_transform())  # fmt: skip
    handles = [
        Line2D([], [], color=theme.columns[j % len(theme.columns)], marker=_MARKERS[j % 4],
                   ls="", label=column["title"])
        for j, column in enumerate(columns)
    ]  # fmt: skip
    short = sum(len(column["title"]) for column in columns) < 20  # beside each other, or stacked
    figure.legend(handles=handles, ncol=len(columns) if short else 1, loc="upper left",
                  fontsize=9.5, columnspacing=1.0, handletextpad=0.1, labelspacing=0.2)  # fmt: skip
    return figure


def _lines(axes: Axes, lines: dict[str, dict[str, float]], theme: Theme, least: float) -> None:
    """A line for each contender, its name at its end."""
    ends: list[tuple[float, int, str]] = []
    values = [max(least, v) for points in lines.values() for v in points.values()]
    for name, points in lines.items():
        x, y = [int(n) for n in points], [max(least, v) for v in points.values()]
        colour = theme.colours.get(name, theme.ink)
        axes.plot(x, y, color=colour, marker="o", ms=5, lw=2.4 if name == "ours" else 1.8, zorder=3)
        ends.append((y[-1], x[-1], name))
    gap, height = (max(values) / min(values)) ** _LABEL, 0.0
    for end, x_end, name in sorted(ends):  # from below, each at least one line above the last
        height = max(end, height * gap)
        axes.annotate(name, (x_end, height), xytext=(8, 0), textcoords="offset points", va="center",
                      color=theme.colours.get(name, theme.ink),
                      weight="bold" if name == "ours" else "normal")  # fmt: skip
    sizes = sorted({int(n) for points in lines.values() for n in points})
    axes.set(xscale="log", yscale="log", xlim=(sizes[0] / 1.15, sizes[-1] * 1.6))
    _plain(axes.xaxis, sizes, "{:.0f}")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _number(v)))
    axes.yaxis.set_minor_locator(NullLocator())


def adapters(data: Data, theme: Theme) -> Figure:
    """Milliseconds against K."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    lines = {
        name: {n: 1e3 * s for n, s in points.items()} for name, points in data["lines"].items()
    }
    _lines(axes, lines, theme, 0.0)
    size = data["title"].replace("x", " × ")
    axes.set(xlabel="adapters (K)", ylabel="ms", title=f"One forward pass: {size}")
    return figure


def memory(data: Data, theme: Theme) -> Figure:
    """MiB against tokens; the least that can be told apart is the floor."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    _lines(axes, data["lines"], theme, _LEAST_MIB)
    axes.set(xlabel="tokens", ylabel="MiB", title="Memory of one forward pass, beyond its result")
    axes.set_ylim(bottom=0.7 * _LEAST_MIB)
    axes.text(0.0, -0.25, f"{data['title']}; {_LEAST_MIB} MiB or less is drawn at {_LEAST_MIB}",
              transform=axes.transAxes, fontsize=8.5)  # fmt: skip
    return figure


def roofline(data: Data, theme: Theme) -> Figure:
    """A panel for each column: ours solid, direct hollow, on the same useful work."""
    columns = data["columns"]
    figure, panels = plt.subplots(
        1, len(columns), figsize=(4.7 * len(columns), 3.8), sharey=True, squeeze=False
    )
    for axes, column in zip(panels[0], columns, strict=True):
        copy, matmul = column["ceilings"]
        x = [p["operations"] / p["bytes"] for p in column["points"]]
        low, high = min(x) / 1.7, max(*x, matmul / copy) * 2.5
        knee = matmul / copy
        axes.plot([low, knee, high], [low * copy / 1e9, matmul / 1e9, matmul / 1e9],
                  color=theme.ink, lw=1.4)  # fmt: skip
        for name, fill in (("direct", "none"), ("ours", theme.colours["ours"])):
            y = [p["operations"] / p["seconds"][name] / 1e9 for p in column["points"]
                 if name in p["seconds"]]  # fmt: skip
            at = [v for v, p in zip(x, column["points"], strict=True) if name in p["seconds"]]
            axes.plot(at, y, marker="o", ms=6.5, ls="", mfc=fill, mec=theme.colours[name], mew=1.4,
                      label=name, zorder=3)  # fmt: skip
        axes.set(xscale="log", yscale="log", xlim=(low, high), title=column["title"],
                 xlabel="operations per byte that must move")  # fmt: skip
        rates = f"copy {_number(copy / 1e9)} GB/s, matrix product {_number(matmul / 1e12)} TFLOP/s"
        axes.text(0.02, 0.95, rates, transform=axes.transAxes, fontsize=8.5)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _number(v)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _number(v)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
    panels[0][0].set_ylim(top=1.8 * max(c["ceilings"][1] for c in columns) / 1e9)
    panels[0][0].set_ylabel("GFLOP/s (of the least that must be done)")
    figure.text(0.01, 0.005, "above the slope: what it reads was still in a cache", fontsize=8.5)
    panels[0][-1].legend(loc="lower right", fontsize=9.5)
    return figure


_DRAW = {"ratio": ratio, "adapters": adapters, "roofline": roofline, "memory": memory}


def draw(name: str, data: Data, theme: str, path: Path, ground: str | None = None) -> None:
    """One picture into a file, by its suffix; whole or not at all.

    Args:
        ground: colour behind it; transparent unless given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        plt.rc_context(cast(Any, _style(THEMES[theme]))),
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".drawing-") as scratch,
    ):
        figure = _DRAW[name](data, THEMES[theme])
        figure.tight_layout(rect=(0, 0.03, 1, 1) if name == "roofline" else None)
        note = {"Description": f"data {pictures.digest(data)}"}
        metadata: dict[str, Any] = note | ({"Date": None} if path.suffix == ".svg" else {})
        temporary = Path(scratch) / path.name
        figure.savefig(
            temporary, metadata=metadata if path.suffix in (".svg", ".png") else None,
            facecolor=ground or "none", dpi=110,
        )  # fmt: skip
        plt.close(figure)
        temporary.chmod(0o644)
        os.replace(temporary, path)


def plot(result: Result, path: Path) -> None:
    """The ratios of a result, on white.

    Raises:
        ValueError: it has none.
    """
    data = pictures.ratio(result)
    if data is None:
        raise ValueError("nothing to plot: no forward pass was measured beside direct")
    draw("ratio", data, "light", path, "white")


def update(page: Path, root: Path) -> list[Path]:
    """Renew a page's tables and the pictures of the results it names; the pictures' paths."""
    paths, _ = table.blocks(page.read_text(encoding="utf-8"))
    drawn = []
    for path in paths:
        result = record.load(root / path)
        for name, data in pictures.present(result).items():
            for theme in pictures.THEMES:
                drawn.append(pictures.path_of(result, name, theme))
                draw(name, data, theme, root / drawn[-1])
    table.update(page)
    return drawn


def main(argv: Sequence[str] | None = None) -> int:
    """Renew. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    parser.add_argument("page", type=Path, help="page with tables, such as README.md")
    arguments = parser.parse_args(argv)
    try:
        drawn = update(arguments.page, record.RESULTS.parent.parent)
    except (record.ResultError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.page}: tables renewed; {len(drawn)} pictures drawn")
    shown = table.blocks(arguments.page.read_text(encoding="utf-8"))[0]
    for path in sorted(record.RESULTS.glob("*.json")):
        if Path("benchmarks/results") / path.name not in shown:
            print(f"not on that page: {path.name}; it takes the two lines that mark a table")
    return 0


if __name__ == "__main__":
    sys.exit(main())
