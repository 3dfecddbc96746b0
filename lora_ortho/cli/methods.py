"""``lora-ortho methods``: the merges that are weights, and when to use each."""

from __future__ import annotations

import argparse
from typing import Any

from lora_ortho.merges import METHODS, Gives, Method

from .console import add_common, to_json

_GIVES = {
    Gives.FACTORS: "exact on factors",
    Gives.WEIGHT: "a dense weight, layer by layer",
}


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "methods",
        help="the merges that are weights: what each needs and gives, and when to use it",
        description="Lists what lora_ortho.merges.METHODS holds. merge --export --method takes "
        "those that stay factors; the plug-ins take all.",
    )
    add_common(parser)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Exit status 0."""
    if args.json:
        print(to_json({name: _facts(method) for name, method in METHODS.items()}))
    else:
        print("\n".join(_line(name, method) for name, method in METHODS.items()))
    return 0


def _facts(method: Method) -> dict[str, Any]:
    return {
        "gives": method.gives.value,
        "draws": method.draws,
        "needs": method.needs,
        "parameters": method.parameters,
        "when": method.when,
        "source": method.source,
    }


def _line(name: str, method: Method) -> str:
    """One line: the name, what it needs and gives, whether it draws, when to use it."""
    found = [f"needs {method.needs}", _GIVES[method.gives]]
    if method.draws:
        found.append("drawn by seed, sample and strata")
    if method.parameters:
        found.append(", ".join(f"{key}={value!r}" for key, value in method.parameters.items()))
    return f"{name:<17} {'; '.join(found)}; when {method.when}"
