"""The demo's picture: what each merge does to the losses, the masks themselves, and the times."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any, cast

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

# Told apart by colour-blind readers too; opaque light ground, so it reads on dark pages.
PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#f0e442", "#7f7f7f"]
INK, FAINT, GROUND, SHARED = "#22262b", "#d5d9de", "#fbfaf7", "#22262b"
MARKERS = {"direct": ("s", 7.5), "dropout": ("o", 7.5), "orthogonal": ("D", 7.0)}
COLOURS = {"direct": "#8a9099", "dropout": "#ffffff", "orthogonal": INK}
STRENGTHS = {"sum": 0.28, "mean": 1.0}  # opacity
STYLE: dict[str, Any] = {
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
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


def _changes(result: dict[str, Any], key: str, column: int | None) -> list[float]:
    """Loss change against the bare model, for every sample; column None is the mean."""
    rows, bare = result["losses"][key], result["losses"]["bare"][0]
    if column is None:
        return [fmean(row) - fmean(bare) for row in rows]
    return [row[column] - bare[column] for row in rows]


def draw_losses(axes: Axes, result: dict[str, Any]) -> None:
    """One band for each text: every adapter alone above, the three merges below."""
    names = result["adapters"]
    bands: list[tuple[str, int | None]] = [(name, j) for j, name in enumerate(names)]
    bands.append(("mean of all", None))
    for y, (label, column) in enumerate(bands):
        colour = INK if column is None else PALETTE[column % len(PALETTE)]
        axes.axhspan(y - 0.42, y + 0.42, color=colour, alpha=0.07, lw=0)
        axes.text(-0.015, y, label, color=colour, ha="right", va="center", weight="bold",
                  transform=axes.get_yaxis_transform())  # fmt: skip
        for j, name in enumerate(names):
            value = fmean(_changes(result, name, column))
            size = 11 if column == j else 6.5
            axes.plot(value, y - 0.27, marker="v", ms=size, color=PALETTE[j % len(PALETTE)],
                      mec=GROUND, mew=0.7, zorder=3, ls="")  # fmt: skip
        for method, lift in (("direct", -0.04), ("dropout", 0.12), ("orthogonal", 0.28)):
            marker, size = MARKERS[method]
            for merge, alpha in STRENGTHS.items():
                values = _changes(result, f"{method} {merge}", column)
                span = [min(values), max(values)]
                axes.plot(span, [y + lift] * 2, color=INK, lw=2.2, zorder=3, alpha=alpha)
                axes.plot(fmean(values), y + lift, marker=marker, ms=size, ls="", mec=INK, mew=1.2,
                          mfc=COLOURS[method], zorder=4, alpha=alpha)  # fmt: skip
    axes.axvline(0, color=INK, lw=1)
    axes.text(0.012, -0.58, "bare model", va="center", fontsize=8.5)
    axes.set_ylim(len(bands) - 0.5, -0.72)
    axes.set_yticks([])
    axes.grid(axis="x", color=FAINT, lw=0.7)
    axes.set_axisbelow(True)
    _bare(axes, "left")
    axes.set_xlabel("change of held-out loss, nats per token (left is better; "
                    f"lines span all {result['samples']} Monte Carlo samples)")  # fmt: skip
    axes.set_title("Text by text: adapters alone and merged", loc="left", weight="bold", pad=22)
    note = f"solid: merge weight 1/{len(names)} for each adapter      pale: merge weight 1"
    axes.text(0, 1.025, note, fontsize=8.5, transform=axes.transAxes)
    looks: list[dict[str, Any]] = [
        {"marker": "v", "ms": 10, "color": "#666", "label": "own adapter alone"},
        {"marker": "v", "ms": 6, "color": "#666", "label": "another alone"},
    ]
    for method, (marker, size) in MARKERS.items():
        look = {"marker": marker, "ms": size, "mfc": COLOURS[method]}
        looks.append({**look, "mec": INK, "label": f"{method} merge"})
    handles = [Line2D([], [], ls="", **look) for look in looks]
    axes.legend(handles=handles, ncol=5, loc="upper center", bbox_to_anchor=(0.44, -0.095),
                frameon=False, fontsize=8.5, handletextpad=0.1, columnspacing=1.0)  # fmt: skip


def mask_image(masks: np.ndarray, adapters: int) -> np.ndarray:
    """Colours (rows, cols, 3): the owner's, ground where nobody acts, dark where several do."""
    image = np.empty((*masks.shape, 3))
    image[:] = to_rgb("#e9eaec")
    for j in range(adapters):
        image[masks == 1 << j] = to_rgb(PALETTE[j % len(PALETTE)])
    image[(masks & (masks - 1)) != 0] = to_rgb(SHARED)
    return image


def draw_masks(axes: Axes, result: dict[str, Any], method: str) -> None:
    """A corner of one layer's output: tokens down, features across."""
    masks = np.array(result["strip"][method])
    overlap = next(o for o in result["overlaps"] if o["method"] == method)
    axes.pcolormesh(mask_image(masks, len(result["adapters"])), edgecolors=GROUND, linewidth=0.5)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    _bare(axes, "left", "bottom")
    axes.set_ylabel("tokens", fontsize=8.5)
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
            ratio + 0.02, y, f"{ratio:.2f} \u00d7   {1e3 * value:.2f} ms", va="center", fontsize=8.5
        )
    labels = {"bare": "bare model", "direct": "direct (plain torch)"}
    axes.set_yticks(range(len(times)), [labels.get(name, name) for name in times], fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xticks([])
    axes.set_xlim(0, 1.35 * max(times.values()) / times["bare"])
    axes.invert_yaxis()
    _bare(axes, "bottom")
    place = axes.get_position()
    axes.set_position((place.x0 + 0.085, place.y0, place.width - 0.085, place.height))
    axes.set_title(f"Time per token, {tokens} tokens at once", x=-0.085 / (place.width - 0.085),
                   loc="left", ha="left", weight="bold")  # fmt: skip


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws the whole picture into a PNG file."""
    with plt.rc_context(cast(Any, STYLE)):
        figure = plt.figure(figsize=(12.4, 6.3), dpi=120)
        grid = figure.add_gridspec(
            3, 2, width_ratios=[1.16, 1], height_ratios=[1, 1, 0.72], hspace=0.42, wspace=0.09,
            left=0.085, right=0.985, top=0.85, bottom=0.115,
        )  # fmt: skip
        figure.suptitle(
            f"{len(result['adapters'])} LoRA adapters merged at run time on {result['model']}",
            x=0.02, ha="left", fontsize=14, weight="bold",
        )  # fmt: skip
        draw_losses(figure.add_subplot(grid[:, 0]), result)
        masks = figure.add_subplot(grid[0, 1])
        draw_masks(masks, result, "orthogonal")
        patches = [Patch(color=PALETTE[j % len(PALETTE)], label=name)
                   for j, name in enumerate(result["adapters"])]  # fmt: skip
        patches.append(Patch(color=SHARED, label="several"))
        masks.legend(handles=patches, ncol=len(patches), loc="lower left", frameon=False,
                     bbox_to_anchor=(-0.01, 1.13), handlelength=1, columnspacing=1.0,
                     handletextpad=0.4, fontsize=8.5)  # fmt: skip
        left = masks.get_position().x0
        figure.text(left, 0.945, "Who acts on which output element", weight="bold", fontsize=11.4)
        draw_masks(figure.add_subplot(grid[1, 1]), result, "dropout")
        draw_times(figure.add_subplot(grid[2, 1]), result)
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)
