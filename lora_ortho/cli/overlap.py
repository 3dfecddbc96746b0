"""The picture of `lora-ortho inspect --plot`: how much adapters overlap, layer by layer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

from lora_ortho.diagnostics import Pair, Report, by_pair

from .console import CliError

try:
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt
except ImportError as error:
    raise CliError(f"--plot needs matplotlib (pip install matplotlib): {error}") from error
if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABEL = 16  # characters below which a block keeps its whole name
_PANELS = 6  # pairs drawn layer by layer; the rest is in the matrix
_COLOURS = "magma_r"
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}


def place(layer: str) -> tuple[str, str]:
    """A layer's block and its part in it: "h.3.mlp.up" is ("h.3", "mlp.up")."""
    match = re.fullmatch(r"(?:(.*\.)?(\d+)\.)?(.*?)", layer)
    assert match is not None
    head, index, rest = match.groups()
    return ("" if index is None else f"{head or ''}{index}"), rest


def _natural(name: str) -> list[Any]:
    """For sorting: numbers in names by value, and so blocks in the model's order."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)
    ]


def draw(report: Report, path: Path) -> None:
    """Draws a report with at least one pair into an image file."""
    groups = by_pair(report.pairs)
    if not groups:
        raise CliError("--plot: there is nothing to draw, no layer has two adapters")
    chosen = sorted(groups, key=lambda key: -fmean(p.outputs.share for p in groups[key]))[:_PANELS]
    shown = [key for key in groups if key in chosen]
    blocks = sorted({place(p.layer)[0] for p in report.pairs}, key=_natural)
    parts = sorted({place(p.layer)[1] for p in report.pairs}, key=_natural)
    top = max(max(p.outputs.share for p in report.pairs), 1e-3)
    panel = 0.19 * len(parts) + 0.75
    width = min(max(0.16 * len(blocks), 3.5), 11.0)
    height = max(panel * len(shown) + 0.9, 5.6)
    with plt.rc_context(cast(Any, _STYLE)), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of letters that the font does not have
        figure = plt.figure(figsize=(6.2 + width, height), dpi=120, layout="constrained")
        figure.suptitle(
            "Overlap of output spaces: 0 orthogonal, 1 one inside the other",
            x=0.01, ha="left", weight="bold",
        )  # fmt: skip
        grid = figure.add_gridspec(len(shown), 2, width_ratios=[4.6, width + 1.6])
        side = grid[:, 0].subgridspec(3, 1, height_ratios=[4.4, 0.2, max(height - 5.6, 0.01)])
        left = figure.add_subplot(side[0])
        _matrix(left, report, groups, top)
        image = None
        axes = None
        for row, key in enumerate(shown):
            axes = figure.add_subplot(grid[row, 1])
            image = _layers(axes, groups[key], blocks, parts, top)
            axes.set_title(_literal(f"{key[0]} & {key[1]}"))
            if row < len(shown) - 1:
                axes.set_xticklabels([])
        if axes is not None and blocks != [""]:
            axes.set_xlabel("block")
        if len(groups) > len(shown):
            left.set_xlabel(f"right: the {len(shown)} of {len(groups)} pairs that overlap most")
        scale = figure.add_subplot(side[1])
        bar = figure.colorbar(cast(Any, image), cax=scale, orientation="horizontal")
        bar.set_label("mean squared cosine of the principal angles")
        figure.savefig(path, metadata={"Software": None} if path.suffix == ".png" else None)
        plt.close(figure)


def _matrix(
    axes: Axes, report: Report, groups: dict[tuple[str, str], list[Pair]], top: float
) -> None:
    """Adapter by adapter, the mean over the layers they share."""
    names = [adapter.name for adapter in report.adapters]
    labels = [_literal(name) for name in names]
    values = [[float("nan")] * len(names) for _ in names]
    for (one, two), pairs in groups.items():
        mean = fmean(p.outputs.share for p in pairs)
        chance = fmean(p.outputs.chance for p in pairs)
        for a, b in ((one, two), (two, one)):
            i, j = names.index(a), names.index(b)
            values[i][j] = mean
            colour = "white" if mean > 0.45 * top else "black"
            axes.text(j, i, f"{mean:.3f}\n({chance:.3f})", ha="center", va="center", fontsize=8.5,
                      color=colour)  # fmt: skip
    axes.imshow(values, cmap=_COLOURS, vmin=0, vmax=top)
    axes.set_xticks(range(len(names)), labels, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), labels)
    axes.set_title("mean over layers (chance)")


def _layers(
    axes: Axes, pairs: Sequence[Pair], blocks: Sequence[str], parts: Sequence[str], top: float
) -> Any:
    """One pair: blocks of the model across, the layers in a block down."""
    values = [[float("nan")] * len(blocks) for _ in parts]
    for pair in pairs:
        block, part = place(pair.layer)
        values[parts.index(part)][blocks.index(block)] = pair.outputs.share
    image = axes.imshow(values, cmap=_COLOURS, vmin=0, vmax=top, aspect="auto")
    axes.set_facecolor("#e9eaec")  # no such layer, or not shared
    axes.set_yticks(range(len(parts)), map(_literal, parts), fontsize=8)
    step = max(1, len(blocks) // 12)
    labels = _short(blocks)
    tilt = {"rotation": 45, "ha": "right"} if max(map(len, labels)) > 4 else {}
    axes.set_xticks(range(0, len(blocks), step), labels[::step], fontsize=8, **cast(Any, tilt))
    return image


def _literal(name: str) -> str:
    """A name as it is: a dollar sign would begin a formula."""
    return name.replace("$", r"\$")


def _short(blocks: Sequence[str]) -> list[str]:
    """Block names without what all begin with, and of long ones the first word and the numbers."""
    split = [block.split(".") for block in blocks]
    shared = 0
    while all(len(parts) > shared + 1 for parts in split) and len({p[shared] for p in split}) == 1:
        shared += 1
    rests = [parts[shared:] for parts in split]
    return [
        ".".join(
            part
            for place, part in enumerate(parts)
            if place == 0 or part.isdigit() or len(".".join(parts)) <= _LABEL
        )
        for parts in rests
    ]
