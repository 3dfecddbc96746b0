"""Four LoRA adapters merged at run time on a real language model, on the CPU.

    python examples/demo.py            about three minutes on two cores; a table and a picture
    python examples/demo.py --quick    less text and fewer samples, the same steps

Loads SmolLM2-135M and the adapters of examples/adapters, evaluates the bare model, each adapter
alone and the three merges on held-out text, counts how masks overlap, and times a forward pass.
Losses and overlaps repeat to the bit for one seed; times are this machine's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from smollm import ExampleError, load_model
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
ORDER = ["python", "cpp", "docs", "scripture"]
METHODS = ["direct", "dropout", "orthogonal"]
MERGES = ["sum", "mean"]  # a merge weight of 1 for each of K adapters, and of 1/K


class Progress:
    """One line on standard error per step, with the seconds since the start."""

    def __init__(self, steps: int, quiet: bool) -> None:
        self.steps, self.quiet, self.done, self.start = steps, quiet, 0, time.monotonic()

    def __call__(self, text: str) -> None:
        self.done += 1
        if not self.quiet:
            elapsed = time.monotonic() - self.start
            print(
                f"[{self.done:2}/{self.steps} {elapsed:4.0f} s] {text}", file=sys.stderr, flush=True
            )


def find_adapters(folder: Path) -> list[Path]:
    """The adapter folders, in a fixed order; an error that says what to do if there are none."""
    if not folder.is_dir():
        raise ExampleError(f"there is no folder {folder}; train_adapters.py makes the adapters")
    names = {path.name for path in folder.iterdir() if (path / "adapter_config.json").is_file()}
    if not names:
        raise ExampleError(f"no adapter in {folder}; train_adapters.py makes them")
    ordered = [name for name in ORDER if name in names] + sorted(names - set(ORDER))
    return [folder / name for name in ordered]


def evaluate(
    model: nn.Module,
    adapters: list[Any],
    texts: list[Tensor],
    args: argparse.Namespace,
    say: Progress,
) -> dict[str, list[list[float]]]:
    """Losses, a row for each Monte Carlo sample and a column for each text, by what was run."""
    from evaluation import loss

    from lora_ortho.adapters import inject

    def row() -> list[float]:
        return [loss(model, tokens) for tokens in texts]

    say("bare model")
    losses = {"bare": [row()]}
    for adapter in adapters:
        say(f"{adapter.name} alone")
        with inject(model, [adapter], method="direct", backend=args.backend):
            losses[adapter.name] = [row()]
    with inject(model, adapters, seed=args.seed, backend=args.backend) as handle:
        for merge, method in itertools.product(MERGES, METHODS):
            weight = 1.0 if merge == "sum" else 1.0 / len(adapters)
            handle.set(method=method, weights=[weight] * len(adapters))
            key = f"{method} {merge}"
            losses[key] = []
            for sample in range(1 if method == "direct" else args.samples):
                say(f"{key}, sample {sample}")
                handle.set(sample=sample)
                losses[key].append(row())
    return losses


def measure_masks(
    model: nn.Module, adapters: list[Any], args: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Overlap counts by method, and a strip of real masks of one layer for the picture."""
    from evaluation import count_overlap, masks_drawn

    from lora_ortho.adapters import inject

    with inject(model, adapters, seed=args.seed, backend=args.backend) as handle:
        methods = ["orthogonal", "dropout"]
        overlaps = [vars(count_overlap(handle, m, args.rows, args.seed)) for m in methods]
        report = max(handle.report, key=lambda report: len(report.p))
        layer = handle.layers[report.name]
        strip: dict[str, Any] = {"layer": report.name, "adapters": list(report.adapters)}
        for method in methods:
            drawn = masks_drawn(layer, report.p, method, 18, args.seed)
            strip[method] = drawn[:, :64].tolist()
    return overlaps, strip


def measure_time(
    model: nn.Module, adapters: list[Any], args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Seconds per token of a forward pass over many tokens and over one, by what was run."""
    from evaluation import WINDOW, put_torch_direct, shared_copy, time_forward

    from lora_ortho.adapters import inject

    merged = put_torch_direct(shared_copy(model), adapters)
    models = {"bare": model, "direct": merged}
    for method in ("dropout", "orthogonal"):
        models[method] = inject(
            shared_copy(model), adapters, method=method, seed=args.seed, backend=args.backend
        ).model
    return {
        str(tokens): time_forward(models, tokens, rounds)
        for tokens, rounds in ((WINDOW, args.rounds), (1, 4 * args.rounds))
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything the table and the picture show."""
    from evaluation import WINDOW, read_texts, windows

    from lora_ortho import backends
    from lora_ortho.adapters import load_adapter

    backends.check_name(args.backend)
    paths = find_adapters(args.adapters)
    texts = read_texts(args.texts, [path.name for path in paths])
    say = Progress(7 + len(paths) + 4 * args.samples, args.quiet)
    torch.set_num_threads(args.threads)
    say("loading the model")
    model, tokenizer = load_model(torch.float32)
    say(f"loading the adapters: {', '.join(path.name for path in paths)}")
    adapters = [load_adapter(path, model) for path in paths]
    names = [adapter.name for adapter in adapters]
    tokens = [windows(tokenizer, text, args.windows) for text in texts]
    losses = evaluate(model, adapters, tokens, args, say)
    say("counting overlaps")
    overlaps, strip = measure_masks(model, adapters, args)
    say("timing")
    times = measure_time(model, adapters, args)
    return {
        "model": "SmolLM2-135M-Instruct",
        "adapters": names,
        "layers": len({name for adapter in adapters for name in adapter.layers}),
        "seed": args.seed,
        "threads": args.threads,
        "samples": args.samples,
        "tokens_per_text": args.windows * WINDOW,
        "losses": losses,
        "summary": summary(losses),
        "overlaps": overlaps,
        "seconds_per_token": times,
        "strip": strip,
    }


def summary(losses: dict[str, list[list[float]]]) -> dict[str, list[list[float]]]:
    """Of each text, then of the mean over texts: the loss, and its deviation if it was sampled."""
    found = {}
    for key, rows in losses.items():
        columns = [*(list(column) for column in zip(*rows, strict=True)), [fmean(r) for r in rows]]
        found[key] = [[fmean(c), stdev(c)] if len(c) > 1 else c for c in columns]
    return found


def cell(loss: list[float]) -> str:
    return f"{loss[0]:.4f} " + (f"± {loss[1]:.4f}" if len(loss) > 1 else " " * 8)


def table(result: dict[str, Any]) -> str:
    """The result as text: losses, overlaps, times."""
    names = result["adapters"]
    lines = [
        f"{result['model']}, {len(names)} adapters on {result['layers']} layers, float32, "
        f"{result['threads']} threads, seed {result['seed']}",
        f"loss in nats per token on {result['tokens_per_text']} held-out tokens of each text; "
        f"± is the standard deviation over {result['samples']} Monte Carlo samples",
        f"sum: merge weight 1 for each adapter; mean: 1/{len(names)}",
        "",
        " " * 18 + "".join(f"{name:<17}" for name in [*names, "mean"]).rstrip(),
    ]
    labels = {"bare": "bare model"} | {n: f"{n} alone" for n in names}
    labels |= {f"{m} {merge}": f"{m} {merge}" for merge in MERGES for m in METHODS}
    for key, label in labels.items():
        lines.append(f"{label:<18}" + "  ".join(map(cell, result["summary"][key])).rstrip())
    lines += ["", "masks, as the kernels drew them"]
    for o in result["overlaps"]:
        shares = ", ".join(f"{name} {s:.4f}" for name, s in zip(names, o["share"], strict=True))
        share = o["overlapping"] / o["elements"]
        lines.append(
            f"{o['method']:<12} {o['overlapping']:>9,} of {o['elements']:,} elements overlap "
            f"({share:.4f}, expected {o['expected']:.4f}); share of {shares}"
        )
    lines += ["", "time per token (median; ÷ bare, ÷ direct merge in plain torch)"]
    for tokens, times in result["seconds_per_token"].items():
        cells = (
            f"{name} {1e3 * t:.3f} ms ({t / times['bare']:.2f}, {t / times['direct']:.2f})"
            for name, t in times.items()
        )
        lines.append(f"{tokens:>4} at once   " + "   ".join(cells))
    return "\n".join(lines)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Calls write with a temporary path beside `path` and renames it: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as scratch:
        temporary = Path(scratch) / path.name
        write(temporary)
        os.replace(temporary, path)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="less text, fewer samples")
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--backend", default=None, help="of lora_ortho; the best if not given")
    parser.add_argument("--adapters", type=Path, default=HERE / "adapters")
    parser.add_argument("--texts", type=Path, default=HERE / "texts")
    parser.add_argument("--out", type=Path, default=HERE.parent / "demo_output", help="folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    args = parser.parse_args(arguments)
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    sizes = (1, 2, 16, 2) if args.quick else (3, 6, 64, 7)
    args.windows, args.samples, args.rows, args.rounds = sizes
    return args


def run(args: argparse.Namespace) -> None:
    try:
        from picture import draw
    except ImportError as error:
        raise ExampleError(f"{error}: run `make demo` or `pip install matplotlib`") from error
    result = measure(args)
    write_whole(args.out / "demo.json", lambda p: p.write_text(json.dumps(result) + "\n"))
    write_whole(args.out / "demo.svg", lambda p: draw(result, p))
    shown = {key: value for key, value in result.items() if key != "strip"}
    print(json.dumps(shown) if args.json else table(result))
    if not args.quiet:
        print(f"picture: {args.out / 'demo.svg'}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        run(args)
    except (ExampleError, ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
