"""Draws a picture of a result into a file; what it shows is in pictures.py.

An SVG holds its text as text, and follows the reader's light or dark theme by a style sheet.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from . import pictures
from .cases import Case
from .pictures import Data, Lines, Ratios
from .record import Result

_INK, _FAINT = "#1f2328", "#d0d7de"
# Told apart by colour-blind readers too.
_CONTENDERS = {"ours": "#0072b2", "direct": "#6e7781", "paper": "#d55e00"}
_COLUMNS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
_DARK = {
    "#1f2328": "#e6edf3", "#d0d7de": "#3d444d", "#0072b2": "#56b4e9", "#6e7781": "#9198a1",
    "#d55e00": "#ff8c42", "#009e73": "#2fd3a5", "#cc79a7": "#e39cc4",
}  # fmt: skip
_MARKERS = "oDs^"
_LEAST_MIB = 0.1  # what the measurement of memory resolves
_LABEL = 0.075  # of the height of a panel, for a line of text
_STYLE: dict[str, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    "font.size": 10.0, "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.monospace": ["DejaVu Sans Mono", "Menlo", "Consolas"],
    "axes.edgecolor": _FAINT, "grid.color": _FAINT, "grid.linewidth": 0.6, "axes.grid": True,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlelocation": "left", "axes.titlesize": 11.0, "axes.titleweight": "bold",
    "axes.facecolor": "none", "legend.frameon": False, "xtick.minor.visible": False,
    "svg.fonttype": "none", "svg.hashsalt": "lora_ortho",  # the same data gives the same bytes
}  # fmt: skip


def _dark_rules() -> str:
    """A style sheet that exchanges every colour where the reader's theme is dark."""
    rules = (
        f'[style*="{what}: {light}"] {{{what}: {dark} !important}}'
        for light, dark in _DARK.items()
        for what in ("fill", "stroke")
    )
    return "\n@media (prefers-color-scheme: dark) {\n" + "\n".join(rules) + "\n}\n"


def _case(case: Case) -> str:
    """In columns; an SVG would show several plain spaces as one."""
    t, d_in, d_out, count, rank = case
    text = f"{t:>4} × {d_in:>4} × {d_out:>5}  K {count:>2} r {rank:>2}"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _plain(axis: Any, values: Sequence[float], text: str = "{:g}") -> None:
    """Ticks at these values and no others, as plain numbers."""
    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: text.format(v)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _ratio(data: Ratios) -> Figure:
    """A row for each case, a mark for each column, quartiles as a line."""
    columns = data.columns
    figure = Figure(figsize=(9.4, 0.37 * len(data.cases) + 1.5))
    panels = figure.subplots(1, 2, sharey=True)
    sections = [[column.forward for column in columns], [column.backward for column in columns]]
    found = [q for section in sections for values in section for q in values if q]
    low = min(0.5, 0.9 * min(q.q1 for q in found))
    high = max([2.0, *(1.1 * (q.q3 if q.q3 < 8 * q.median else q.median) for q in found)])
    for axes, section, title in zip(
        panels, sections, ("Forward", "Forward + backward"), strict=True
    ):
        axes.axvline(1, color=_INK, lw=1)
        for j, values in enumerate(section):
            shift = 0.3 * (j - (len(columns) - 1) / 2)
            for y, q in enumerate(values):
                if q is None:
                    continue
                look = {"color": _COLUMNS[j % len(_COLUMNS)], "zorder": 3}
                span = [max(q.q1, low), min(q.q3, high)]
                axes.plot(span, [y + shift] * 2, lw=2, alpha=0.55, **look)
                axes.plot(q.median, y + shift, marker=_MARKERS[j % 4], ms=6, ls="", **look)
        axes.set(xscale="log", xlim=(low, high), title=title, xlabel="time ÷ direct merge")
        ticks = [v for v in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 8) if low <= v <= high]
        _plain(axes.xaxis, ticks)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    labels = [_case(case) for case in data.cases]
    panels[0].set_yticks(range(len(labels)), labels, family="monospace", fontsize=9)
    panels[0].set_ylim(len(labels) - 0.4, -0.9)
    for x, side, words in ((0.985, "right", "slower →"), (0.015, "left", "← faster")):
        panels[0].text(x, -0.7, words, ha=side, va="center", fontsize=8.5,
                       transform=panels[0].get_yaxis_transform())  # fmt: skip
    handles = [
        Line2D([], [], color=_COLUMNS[j % len(_COLUMNS)], marker=_MARKERS[j % 4], ls="",
               label=column.title)
        for j, column in enumerate(columns)
    ]  # fmt: skip
    short = sum(len(column.title) for column in columns) < 20  # beside each other, or stacked
    figure.legend(handles=handles, ncol=len(columns) if short else 1, loc="upper left",
                  fontsize=9.5, columnspacing=1.0, handletextpad=0.1, labelspacing=0.2)  # fmt: skip
    figure.text(0.01, 0.01, data.kind, fontsize=8.5)
    return figure


def _lines(data: Lines, least: float, unit: float, ticks: str) -> tuple[Figure, Axes]:
    """A line for each contender, its name at its end; values in units, the least of which show."""
    figure = Figure(figsize=(6.4, 3.6))
    axes = figure.subplots()
    lines = {
        name: {size: max(least, value / unit) for size, value in points.items()}
        for name, points in data.lines.items()
    }
    ends: list[tuple[float, int, str]] = []
    values = [value for points in lines.values() for value in points.values()]
    for name, points in lines.items():
        colour, width = _CONTENDERS[name], 2.4 if name == "ours" else 1.8
        axes.plot([*points], [*points.values()], color=colour, marker="o", ms=5, lw=width, zorder=3)
        ends.append((list(points.values())[-1], list(points)[-1], name))
    gap, height = (max(values) / min(values)) ** _LABEL, 0.0
    for end, x_end, name in sorted(ends):  # from below, each at least one line above the last
        height = max(end, height * gap)
        weight = "bold" if name == "ours" else "normal"
        axes.annotate(name, (x_end, height), xytext=(8, 0), textcoords="offset points", va="center",
                      color=_CONTENDERS[name], weight=weight)  # fmt: skip
    sizes = sorted({size for points in lines.values() for size in points})
    axes.set(xscale="log", yscale="log", xlim=(sizes[0] / 1.15, sizes[-1] * 1.6))
    _plain(axes.xaxis, sizes, "{:.0f}")
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 100 else f"{v:.2g}")
    )
    axes.yaxis.set_minor_locator(NullLocator())
    figure.text(0.01, 0.01, f"{data.kind}: {data.title}{ticks}", fontsize=8.5)
    return figure, axes


def _adapters(data: Lines) -> Figure:
    figure, axes = _lines(data, 0.0, 1e-3, "")
    axes.set(xlabel="adapters (K)", ylabel="ms", title="One forward pass")
    return figure


def _memory(data: Lines) -> Figure:
    note = f"; {_LEAST_MIB} MiB or less is drawn at {_LEAST_MIB}"
    figure, axes = _lines(data, _LEAST_MIB, 1.0, note)
    axes.set(xlabel="tokens", ylabel="MiB", title="Memory of one forward pass, beyond its result")
    axes.set_ylim(bottom=0.7 * _LEAST_MIB)
    return figure


_DRAW: dict[str, Any] = {"ratio": _ratio, "adapters": _adapters, "memory": _memory}


def draw(name: str, data: Data, path: Path, ground: str = "none") -> None:
    """One picture into a file, by its suffix; whole or not at all.

    Args:
        ground: colour behind it, in every theme; none is transparent and follows the theme.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        matplotlib.rc_context(cast(Any, _STYLE)),
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".drawing-") as scratch,
    ):
        figure = _DRAW[name](data)
        figure.tight_layout(rect=(0, 0.04, 1, 1))
        note = {"Description": f"data {pictures.digest(data)}"}
        temporary = Path(scratch) / path.name
        metadata: dict[str, Any] = note | ({"Date": None} if path.suffix == ".svg" else {})
        figure.savefig(
            temporary, metadata=metadata if path.suffix in (".svg", ".png") else None,
            facecolor=ground, dpi=110,
        )  # fmt: skip
        if path.suffix == ".svg" and ground == "none":
            text = temporary.read_text(encoding="utf-8")
            text = text.replace("</style>", _dark_rules() + "</style>", 1)
            temporary.write_text(text, encoding="utf-8")
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
    draw("ratio", data, path, "white")
