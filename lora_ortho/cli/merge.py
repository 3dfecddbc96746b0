"""``lora-ortho merge``: load a model and adapters, run the merges side by side, or export one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_ortho.adapters import AdapterFileError
from lora_ortho.merge_config import MergeConfig, read_config
from lora_ortho.merges import METHODS, Gives

from .console import CliError, Progress, add_common, in_words_of, to_json
from .merge_checks import check_config, check_export
from .merge_results import Made, Unfinished, check_results, keep, write_results


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "merge",
        help="load, merge, evaluate or export; reads the paper's [[loras]] tables as they are",
        description="Runs the direct, the dropout and the orthogonal merge of a TOML file's "
        "adapters side by side on a language model or an image pipeline, or exports a merge.",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="for the comparison; save_folder_name if not given",
    )
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FOLDER",
        help="save the merge as an adapter for PEFT, of a pipeline for diffusers; run nothing",
    )
    parser.add_argument(
        "--method",
        metavar="METHOD",
        help=f"of --export: {_exportable()}; direct if not given (`lora-ortho methods`)",
    )
    parser.add_argument("--rank", type=int, help="of --export: reduce to this rank")
    parser.add_argument(
        "--mixed-ranks",
        action="store_true",
        help="of --export: every layer its own rank, not all the largest one by rows of zeros",
    )
    parser.add_argument("--force", action="store_true", help="replace results that exist")
    add_common(parser)
    parser.set_defaults(run=run)
    return parser


def _exportable() -> str:
    names = [name for name, method in METHODS.items() if method.gives is Gives.FACTORS]
    return " or ".join([", ".join(names[:-1]), names[-1]])


def run(args: argparse.Namespace) -> int:
    """Exit status 0; failures are exceptions."""
    if args.export is None and (args.method or args.rank is not None or args.mixed_ranks):
        args.parser.error(
            "--method, --rank and --mixed-ranks need --export; `methods` in the file says what to "
            "compare"
        )
    config = read_config(args.config)
    with Progress(args.quiet) as progress:
        if args.export is not None:
            return _export(args, config, progress)
        made = _compare(args, config, progress)
    print(to_json(made.result) if args.json else made.text)
    return 0


def _compare(args: argparse.Namespace, config: MergeConfig, progress: Progress) -> Made:
    """The comparison, which is in its folder then."""
    kind = model_kind(config)
    name = config.save_folder_name or args.config.stem
    out = args.out if args.out is not None else None if kind == "language" else Path(name)
    if out is not None:
        check_results(out, args.force)
    check_config(config, kind, progress)
    if kind == "image":
        from .merge_image import compare
    else:
        from .merge_language import compare
    try:
        made = compare(config, progress)
    except Unfinished as stop:
        line = keep(stop, out)
        if out is None:
            print(to_json(stop.made.result) if args.json else stop.made.text)
        raise CliError(line) from stop
    if out is not None:
        write_results(out, made)
    return made


def model_kind(config: MergeConfig) -> str:
    """ "language" or "image": as configured, else by the files of the base model."""
    if config.pipe_id is None:
        raise CliError("the configuration has no pipe_id, the base model to run")
    if config.kind is not None:
        return config.kind
    folder = config.local(config.pipe_id)
    if folder is None or (folder / "model_index.json").exists():
        return "image"
    if (folder / "config.json").exists():
        return "language"
    raise CliError(f"{folder} has neither model_index.json nor config.json: set kind")


def load_base(config: MergeConfig, progress: Progress) -> Any:
    """The base model: a language model, or an image pipeline."""
    progress(f"loading {config.pipe_id}")
    if model_kind(config) == "image":
        from . import merge_image

        return merge_image.load(config)
    from . import merge_language

    return merge_language.load(config)[0]


def _export(args: argparse.Namespace, config: MergeConfig, progress: Progress) -> int:
    from lora_ortho.adapters import export

    if args.export.exists() and not args.force:
        raise CliError(f"{args.export} exists; --force replaces it")
    method = args.method or "direct"
    check_export(config, method)
    # Single files may have names that only the model resolves; a PEFT folder has the layers' own.
    single = not all(config.adapter_path(lora).is_dir() for lora in config.loras)
    model = load_base(config, progress) if single and config.pipe_id is not None else None
    progress("reading the adapters")
    try:
        adapters = config.load_adapters(model)
    except AdapterFileError as error:
        raise CliError(in_words_of(error, "pipe_id")) from error
    progress(f"exporting to {args.export}")
    written = export(
        adapters,
        args.export,
        method,
        p=config.p,
        weights=config.weights,
        seed=config.seed,
        strata=config.strata,
        rank=args.rank,
        equal_ranks=not args.mixed_ranks,
        model=model,
        force=args.force,
    )
    print(to_json(written) if args.json else str(written))
    return 0
