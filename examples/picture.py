"""The demo's picture: what each merge does to the losses, the masks themselves, and the times.

    python examples/picture.py demo_output/demo.json demo.svg

draws a result of demo.py again. The picture is one SVG for light and dark pages, its text is text.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any, cast

import matplotlib

matplotlib.use("svg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

# Each colour on a light page, and what a dark page has in its place; told apart by colour-blind
# readers too. The ground is opaque, so that the picture reads on a page of either kind.
DARK = {
    "#0072b2": "#4aa3df", "#d55e00": "#ff8c42", "#009e73": "#2fd3a5", "#cc79a7": "#e39cc4",
    "#56b4e9": "#8fd0f5", "#e69f00": "#ffbe3d", "#f0e442": "#f5ee7d", "#7f7f7f": "#a0a0a0",
    "#22262b": "#e6edf3", "#d5d9de": "#3d444d", "#fbfaf7": "#0d1117", "#e9eaec": "#21262d",
    "#8a9099": "#7d8590", "#ffffff": "#010409",
}  # fmt: skip
PALETTE = list(DARK)[:8]
INK, FAINT, GROUND, NOBODY, GREY, HOLLOW = list(DARK)[8:]
MARKERS = {"direct": ("s", 7.5), "dropout": ("o", 7.5), "orthogonal": ("D", 7.0)}
COLOURS = {"direct": GREY, "dropout": HOLLOW, "orthogonal": INK}
STRENGTHS = {"sum": 0.28, "mean": 1.0}  # opacity
CELL = 0.9  # of the room that a mask's element has
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lora_ortho",  # of the ids: the same result gives the same bytes
    "font.size": 9.5,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": GROUND,
    "figure.facecolor": GROUND,
    "savefig.facecolor": GROUND,
}


def _bare(axes: Axes, *sides: str) -> None:
    for side in ("top", "right", *sides):
        axes.spines[side].set_visible(False)


def _change(result: dict[str, Any], key: str, column: int) -> tuple[float, float]:
    """Loss change against the bare model, and its standard deviation; column -1 is the mean."""
    loss, *deviation = result["summary"][key][column]
    return loss - result["summary"]["bare"][column][0], sum(deviation)


def draw_losses(axes: Axes, result: dict[str, Any]) -> None:
    """One band for each text: every adapter alone above, the three merges below."""
    names = result["adapters"]
    bands = [*((name, j) for j, name in enumerate(names)), ("mean of all", -1)]
    for y, (label, column) in enumerate(bands):
        colour = INK if column < 0 else PALETTE[column % len(PALETTE)]
        axes.axhspan(y - 0.42, y + 0.42, color=colour, alpha=0.07, lw=0)
        axes.text(-0.015, y, label, color=colour, ha="right", va="center", weight="bold",
                  transform=axes.get_yaxis_transform())  # fmt: skip
        for j, name in enumerate(names):
            value, _ = _change(result, name, column)
            size = 11 if column == j else 6.5
            axes.plot(value, y - 0.27, marker="v", ms=size, color=PALETTE[j % len(PALETTE)],
                      mec=GROUND, mew=0.7, zorder=3, ls="")  # fmt: skip
        for method, lift in (("direct", -0.04), ("dropout", 0.12), ("orthogonal", 0.28)):
            marker, size = MARKERS[method]
            for merge, alpha in STRENGTHS.items():
                value, deviation = _change(result, f"{method} {merge}", column)
                if deviation:
                    span = [value - deviation, value + deviation]
                    axes.plot(span, [y + lift] * 2, color=INK, lw=2.2, zorder=3, alpha=alpha)
                axes.plot(value, y + lift, marker=marker, ms=size, ls="", mec=INK, mew=1.2,
                          mfc=COLOURS[method], zorder=4, alpha=alpha)  # fmt: skip
    axes.axvline(0, color=INK, lw=1)
    axes.text(0.012, -0.58, "bare model", va="center", fontsize=8.5)
    axes.set_ylim(len(bands) - 0.5, -0.72)
    axes.set_yticks([])
    axes.grid(axis="x", color=FAINT, lw=0.7)
    axes.set_axisbelow(True)
    _bare(axes, "left")
    axes.set_xlabel("change of held-out loss, nats per token (left is better; lines: ± one "
                    f"standard deviation of {result['samples']} samples)")  # fmt: skip
    axes.set_title("Text by text: adapters alone and merged", loc="left", weight="bold", pad=22)
    note = f"solid: merge weight 1/{len(names)} for each adapter; pale: merge weight 1"
    axes.text(0, 1.025, note, fontsize=8.5, transform=axes.transAxes)
    looks: list[dict[str, Any]] = [
        {"marker": "v", "ms": 10, "color": GREY, "label": "own adapter alone"},
        {"marker": "v", "ms": 6, "color": GREY, "label": "another alone"},
    ]
    for method, (marker, size) in MARKERS.items():
        look = {"marker": marker, "ms": size, "mfc": COLOURS[method]}
        looks.append({**look, "mec": INK, "label": f"{method} merge"})
    handles = [Line2D([], [], ls="", **look) for look in looks]
    axes.legend(handles=handles, ncol=5, loc="upper center", bbox_to_anchor=(0.44, -0.095),
                frameon=False, fontsize=8.5, handletextpad=0.1, columnspacing=1.0)  # fmt: skip


def draw_masks(axes: Axes, result: dict[str, Any], method: str) -> None:
    """A corner of one layer's output: tokens down, features across, the owner's colour."""
    masks = np.array(result["strip"][method])
    rows, cols = masks.shape
    axes.set(xlim=(0, cols), ylim=(rows, 0), aspect="equal", xticks=[], yticks=[])
    axes.apply_aspect()
    corners = axes.transData.transform([(0, 0), (0, 1)])
    width = CELL * abs(corners[0, 1] - corners[1, 1]) * 72 / axes.figure.dpi  # points
    several = (masks & (masks - 1)) != 0
    owners = [(NOBODY, masks == 0), (INK, several)]
    owners += [(PALETTE[j % len(PALETTE)], masks == 1 << j) for j in range(len(result["adapters"]))]
    for colour, owned in owners:  # one path a colour: a thick dash for each element
        y, x = np.nonzero(owned)
        across = np.stack([x + 0.5 - CELL / 2, x + 0.5 + CELL / 2, np.full(len(x), np.nan)], 1)
        down = np.repeat(y + 0.5, 3)
        axes.plot(across.ravel(), down, color=colour, lw=width, solid_capstyle="butt")
    _bare(axes, "left", "bottom")
    axes.set_xlabel("output features", fontsize=8.5, labelpad=3)
    axes.set_ylabel("tokens", fontsize=8.5, labelpad=3)
    overlap = next(o for o in result["overlaps"] if o["method"] == method)
    share = overlap["overlapping"] / overlap["elements"]
    count = "none" if overlap["overlapping"] == 0 else f"{100 * share:.1f} %"
    axes.set_title(f"{method}: {count} of {overlap['elements']:,} elements shared",
                   loc="left", fontsize=9.5, pad=4)  # fmt: skip


def draw_times(axes: Axes, result: dict[str, Any]) -> None:
    """Times per token over many tokens at once, relative to the bare model."""
    tokens, times = next(iter(result["seconds_per_token"].items()))
    colours = {"bare": FAINT, **COLOURS}
    for y, (name, value) in enumerate(times.items()):
        ratio = value / times["bare"]
        axes.barh(y, ratio, height=0.62, color=colours[name], edgecolor=INK, lw=0.8)
        axes.text(
            ratio + 0.02, y, f"{ratio:.2f} \u00d7, {1e3 * value:.2f} ms", va="center", fontsize=8.5
        )
    labels = {"bare": "bare model", "direct": "direct (plain torch)"}
    axes.set_yticks(range(len(times)), [labels.get(name, name) for name in times], fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xticks([])
    axes.set_xlim(0, 1.35 * max(times.values()) / times["bare"])
    axes.invert_yaxis()
    _bare(axes, "bottom")
    axes.set_xlabel("time ÷ bare model", fontsize=8.5, labelpad=3)
    place = axes.get_position()
    axes.set_position((place.x0 + 0.085, place.y0, place.width - 0.085, place.height))
    axes.set_title(f"Time per token, {tokens} tokens at once", x=-0.085 / (place.width - 0.085),
                   loc="left", ha="left", weight="bold")  # fmt: skip


def figure_of(result: dict[str, Any]) -> Figure:
    """The whole picture: losses on the left, masks and times on the right."""
    figure = plt.figure(figsize=(12.4, 6.5))
    grid = figure.add_gridspec(
        3, 2, width_ratios=[1.16, 1], height_ratios=[1, 1, 0.66], hspace=0.5, wspace=0.11,
        left=0.085, right=0.985, top=0.82, bottom=0.115,
    )  # fmt: skip
    figure.suptitle(
        f"{len(result['adapters'])} LoRA adapters merged at run time on {result['model']}",
        x=0.02, y=0.975, ha="left", fontsize=14, weight="bold",
    )  # fmt: skip
    draw_losses(figure.add_subplot(grid[:, 0]), result)
    masks = figure.add_subplot(grid[0, 1])
    draw_masks(masks, result, "orthogonal")
    patches = [Patch(color=PALETTE[j % len(PALETTE)], label=name)
               for j, name in enumerate(result["adapters"])]  # fmt: skip
    patches.append(Patch(color=INK, label="several"))
    masks.legend(handles=patches, ncol=len(patches), loc="lower left", frameon=False,
                 bbox_to_anchor=(-0.01, 1.13), handlelength=1, columnspacing=1.0,
                 handletextpad=0.4, fontsize=8.5)  # fmt: skip
    left = masks.get_position().x0
    figure.text(left, 0.91, "Who acts on which output element", weight="bold", fontsize=11.4)
    draw_masks(figure.add_subplot(grid[1, 1]), result, "dropout")
    draw_times(figure.add_subplot(grid[2, 1]), result)
    return figure


def themed(svg: str) -> str:
    """An SVG in light colours that shows the dark ones where the reader prefers them.

    Colours leave the style attributes, which no rule overrides, for attributes of their own.
    """

    def with_attributes(style: re.Match[str]) -> str:
        kept, colours = [], ""
        for entry in style[1].split("; "):
            name, _, value = entry.partition(": ")
            if name in ("fill", "stroke") and value in DARK:
                colours += f' {name}="{value}"'
            else:
                kept.append(entry)
        return (f' style="{"; ".join(kept)}"' if kept else "") + colours

    svg = re.sub(r' style="([^"]*)"', with_attributes, svg)
    rules = [
        f'[{name}="{light}"] {{ {name}: {dark}; }}'
        for light, dark in DARK.items()
        for name in ("fill", "stroke")
        if f'{name}="{light}"' in svg
    ]
    style = "@media (prefers-color-scheme: dark) {\n" + "\n".join(rules) + "\n}"
    head, end, rest = svg.partition("<defs>")
    return f"{head}<style>\n{style}\n</style>\n {end}{rest}"


def digest(result: dict[str, Any]) -> str:
    """A hash of a result, which the picture's file holds too."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws the picture into an SVG file."""
    with plt.rc_context(cast(Any, STYLE)):
        figure = figure_of(result)
        text = io.StringIO()
        figure.savefig(text, metadata={"Date": None, "Description": f"data {digest(result)}"})
        plt.close(figure)
    lines = (line.rstrip() for line in themed(text.getvalue()).splitlines())
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
