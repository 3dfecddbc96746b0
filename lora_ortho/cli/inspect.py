"""``lora-ortho inspect``: what is in adapters, do they fit each other, how much do they overlap."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from lora_ortho.adapters import AdapterFileError, LoadedAdapter, load_adapter
from lora_ortho.adapters.files.names import titles
from lora_ortho.adapters.files.tensor_file import TensorFile
from lora_ortho.diagnostics import Pair, Report, by_pair, inspect
from lora_ortho.merge_config import MergeConfig

from .console import (
    CliError,
    Progress,
    add_common,
    check_free,
    in_words_of,
    number,
    span,
    table,
    to_json,
    write_whole,
)
from .merge import load_base

_SHOWN_LAYERS = 5  # of the layers with the most overlap, without --layers


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="what is in these adapters, do they fit each other, how much do they overlap",
        description="Compares adapters layer by layer from their factors; no model is needed. "
        "Exit status 1 where they cannot be merged.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="adapter: what load_adapter reads")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="base model, a folder or a repository of the hub, to look layers up in: kohya's files "
        "need it",
    )
    parser.add_argument(
        "--p", nargs="+", type=float, metavar="RATE", help="dropout rates to check, one an adapter"
    )
    parser.add_argument(
        "--inputs",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="inputs of adapter NAME's own task: safetensors with a tensor (samples, d_in) for "
        "each layer, by the layer's name; may be given for each adapter",
    )
    parser.add_argument("--layers", action="store_true", help="a line for every layer and pair")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a heat map (.png, .svg)")
    parser.add_argument("--force", action="store_true", help="replace an existing --plot file")
    add_common(parser)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Exit status 0 if the adapters can be merged, 1 if not."""
    if args.plot is not None:
        check_free(args.plot, args.force)
        from .overlap import draw  # an error about matplotlib comes before the work
    with Progress(args.quiet) as progress:
        adapters = _load(args.paths, args.model, progress)
        inputs = dict(_read_inputs(text) for text in args.inputs)
        report = inspect(adapters, p=args.p, inputs=inputs, step=progress)
        if args.plot is not None:
            progress("drawing")
            write_whole(args.plot, lambda path: draw(report, path))
    print(to_json(report) if args.json else as_text(report, args.layers))
    return 1 if report.problems else 0


def _load(paths: Sequence[str], base: str | None, progress: Progress) -> list[LoadedAdapter]:
    """The adapters, each with a name of its own: as much of its path as that takes."""
    names = titles(paths)
    if len(set(names)) < len(names):
        twice = next(path for path, name in zip(paths, names, strict=True) if names.count(name) > 1)
        raise CliError(f"{twice} is given twice")
    config = MergeConfig((), pipe_id=base, device="cpu")
    model = None if base is None else load_base(config, progress)
    adapters = []
    for path, name in zip(paths, names, strict=True):
        progress(f"reading {path}")
        try:
            adapters.append(load_adapter(path, model, name=name))
        except AdapterFileError as error:
            raise CliError(in_words_of(error, "--model")) from error
    return adapters


def _read_inputs(text: str) -> tuple[str, dict[str, Tensor]]:
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise CliError(f"--inputs must be NAME=FILE, got {text!r}")
    with TensorFile(Path(file)) as opened:
        return name, opened.read().tensors


def as_text(report: Report, every_layer: bool = False) -> str:
    """The report as tables and sentences."""
    parts = [_adapters(report)]
    if report.pairs:
        parts.append(_overlaps(report))
        parts.append(_layers(report, every_layer))
    if report.interference:
        parts.append(_interference(report, every_layer))
    parts.append(_verdict(report))
    return "\n\n".join(parts)


def _adapters(report: Report) -> str:
    rows = [
        [
            a.name,
            str(a.layers),
            span(*a.ranks),
            span(*a.scalings),
            f"{a.parameters:,}",
            number(a.norm),
            "+".join(a.dtypes) + (f", {a.biased} biases" if a.biased else ""),
            a.base_model or "not said",
        ]
        for a in report.adapters
    ]
    header = ["adapter", "layers", "rank", "scaling", "parameters", "norm", "dtype", "base model"]
    return table(header, rows)


def _cells(pairs: Sequence[Pair]) -> list[str]:
    """Means over layers, the chance level in brackets, and the largest cosine."""
    return [
        f"{fmean(p.outputs.share for p in pairs):.3f} "
        f"({fmean(p.outputs.chance for p in pairs):.3f})",
        f"{max((c for p in pairs for c in p.outputs.cosines), default=0.0):.3f}",
        f"{fmean(p.inputs.share for p in pairs):.3f} ({fmean(p.inputs.chance for p in pairs):.3f})",
        f"{fmean(p.alignment for p in pairs):+.3f}",
    ]


_OVERLAP_HEADER = ["outputs shared (chance)", "largest cosine", "inputs shared", "alignment"]


def _overlaps(report: Report) -> str:
    rows = []
    for (one, two), pairs in by_pair(report.pairs).items():
        rows.append([f"{one} & {two}", str(len(pairs)), *_cells(pairs)])
    title = (
        "overlap, mean over common layers: share of one update's output (input) space that lies "
        "in the other's"
    )
    return f"{title}\n{table(['pair', 'layers', *_OVERLAP_HEADER], rows, '  ')}"


def _layers(report: Report, every: bool) -> str:
    pairs = list(report.pairs)
    if not every:
        pairs.sort(key=lambda p: p.outputs.share, reverse=True)
        pairs = pairs[:_SHOWN_LAYERS]
    norms = {
        layer.name: dict(zip(layer.adapters, layer.norms, strict=True)) for layer in report.layers
    }
    rows = [
        [
            p.layer,
            f"{p.first} & {p.second}",
            *_cells([p]),
            f"{number(norms[p.layer][p.first])}, {number(norms[p.layer][p.second])}",
        ]
        for p in pairs
    ]
    title = "every layer" if every else "where outputs overlap most (--layers shows all)"
    return f"{title}\n{table(['layer', 'pair', *_OVERLAP_HEADER, 'norms'], rows, '  ')}"


def _interference(report: Report, every: bool) -> str:
    found = report.interference
    keys = list(dict.fromkeys((i.adapter, i.task) for i in found))
    rows = []
    for adapter, task in keys:
        some = [i for i in found if (i.adapter, i.task) == (adapter, task)]
        worst = max(some, key=lambda i: i.ratio)
        mean = fmean(i.ratio for i in some)
        rows.append(
            [f"{adapter} on {task}", str(len(some)), number(mean), number(worst.ratio), worst.layer]
        )
    text = table(["adapter on inputs of", "layers", "mean", "largest", "in layer"], rows, "  ")
    if every:
        lines = [[i.layer, f"{i.adapter} on {i.task}", number(i.ratio)] for i in found]
        text += "\n" + table(["layer", "adapter on inputs of", "ratio"], lines, "  ")
    return (
        f"interference: size of one adapter's output on another's inputs ÷ the other's own\n{text}"
    )


def _verdict(report: Report) -> str:
    lines = [f"note: {remark}" for remark in report.remarks]
    lines += [f"problem: {problem}" for problem in report.problems]
    if len([a for a in report.adapters if a.shared_layers]) > 1:
        lines.append(_balance_sentence(report))
    if not report.problems:
        lines.append(_rates_sentence(report))
    return "\n".join(lines)


def _balance_sentence(report: Report) -> str:
    order = sorted((a for a in report.adapters if a.shared_layers), key=lambda a: -a.shared_norm)
    first, second = order[:2]
    who = "no adapter dominates" if report.dominant is None else f"{report.dominant} dominates"
    if not second.shared_norm:
        return f"{who}: over layers that adapters share, the updates of {second.name} are 0"
    by = f" {number(first.shared_norm / second.shared_norm)} times"
    return (
        f"{who}: over layers that adapters share, the updates of {first.name} are{by} as large as "
        f"those of {second.name} (norms {number(first.shared_norm)} and "
        f"{number(second.shared_norm)}), and the largest in {first.strongest_in} of "
        f"{first.shared_layers}; merge weights multiply them"
    )


def _rates_sentence(report: Report) -> str:
    most = max(len(layer.adapters) for layer in report.layers)
    if most == 1:
        where = "no layer has two adapters" if len(report.adapters) > 1 else "one adapter"
        return f"{where}: any dropout rate in [0, 1) works"
    return (
        f"they can be merged: up to {most} adapters meet in a layer, where the orthogonal merge "
        f"needs dropout rates with Σ(1 - p) ≤ 1, so {report.smallest_p:.6g} each or more"
    )
