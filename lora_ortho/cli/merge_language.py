"""``lora-ortho merge`` on a language model: losses on texts, and words after the prompt."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from lora_ortho.adapters import inject

from .console import CliError, Progress, one_line, quieten, table
from .merge_config import MergeConfig

_WINDOW = 256  # tokens evaluated at once


def compare(
    config: MergeConfig, progress: Progress
) -> tuple[dict[str, Any], str, Callable[[Path], object]]:
    """Runs the bare model, each adapter alone, and every method.

    Returns:
        The result as plain data and as text; there are no further files to write.
    """
    if not config.texts and config.prompt is None:
        raise CliError("nothing to run: give a prompt, or texts to take the loss on")
    texts = [_read(config, name) for name in config.texts]
    progress("loading the model")
    model, tokenizer = load(config)
    progress("loading the adapters")
    adapters = config.load_adapters(model)
    tokens = [_tokens(tokenizer, text, config) for text in texts]
    losses: dict[str, list[list[float]]] = {}
    written: dict[str, str] = {}

    def evaluate(key: str) -> None:
        progress(key)
        losses.setdefault(key, []).append([loss(model, x) for x in tokens])
        if config.prompt is not None and key not in written:
            written[key] = generate(model, tokenizer, config)

    evaluate("bare model")
    for adapter, weight in zip(adapters, config.weights, strict=True):
        with inject(model, [adapter], weights=[weight], method="direct", backend=config.backend):
            evaluate(f"{adapter.name} alone")
    for method in config.methods:
        with inject(
            model,
            adapters,
            p=config.p,
            weights=config.weights,
            method=method,
            seed=config.seed,
            backend=config.backend,
        ) as handle:
            for sample in range(1 if method == "direct" else config.samples):
                handle.set(sample=sample)
                evaluate(method)
    result = {
        "kind": "language",
        "model": config.pipe_id,
        "adapters": config.names,
        "weights": config.weights,
        "p": config.p,
        "seed": config.seed,
        "texts": list(config.texts),
        "tokens": [x.numel() for x in tokens],
        "losses": losses,
        "prompt": config.prompt,
        "written": written,
    }
    return result, as_text(result), lambda folder: None


def load(config: MergeConfig) -> tuple[Any, Any]:
    """Model, in evaluation mode, and tokenizer."""
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise CliError(
            f"a language model needs transformers (pip install transformers): {error}"
        ) from error
    pipe_id = str(config.pipe_id)
    source = str(config.local(pipe_id) or pipe_id)
    dtype = getattr(torch, config.dtype or "float32")
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    quieten(transformers.logging)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        model = model.to(device)
    except Exception as error:  # whatever the library raises for a model it cannot load
        raise CliError(f"cannot load {source}: {one_line(error)}") from error
    return model.eval().requires_grad_(False), tokenizer


def _read(config: MergeConfig, name: str) -> str:
    path = config.local(name)
    if path is None:
        raise CliError(f"texts: there is no file {name}")
    return path.read_text(encoding="utf-8")


def _tokens(tokenizer: Any, text: str, config: MergeConfig) -> Tensor:
    found: list[int] = tokenizer(text, add_special_tokens=False).input_ids[: config.max_tokens]
    if len(found) < 2:
        raise CliError(f"texts: a text of {len(found)} tokens is too short to take a loss on")
    return torch.tensor(found)


@torch.inference_mode()
def loss(model: Any, tokens: Tensor) -> float:
    """Mean cross-entropy in nats of each token given those before it in its window."""
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, _WINDOW):
        window = tokens[None, start : start + _WINDOW].to(model.device)
        logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
        count += window.shape[1] - 1
    return total / count


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, config: MergeConfig) -> str:
    """What the model writes after the prompt, most probable token by token."""
    ids = tokenizer(config.prompt, return_tensors="pt").input_ids.to(model.device)
    if ids.shape[1] == 0:
        raise CliError("prompt: no token in it")
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=config.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id or 0,
    )
    text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def as_text(result: dict[str, Any]) -> str:
    """The comparison as a table, and the continuations below it."""
    weights = ", ".join(
        f"{name} {weight:g}"
        for name, weight in zip(result["adapters"], result["weights"], strict=True)
    )
    parts = [f"{result['model']} with {weights}; seed {result['seed']}"]
    if result["texts"]:
        names = [Path(name).name for name in result["texts"]]
        rows = [[key, *_cells(rows)] for key, rows in result["losses"].items()]
        title = "loss in nats per token; ± is the standard deviation over Monte Carlo samples"
        parts.append(f"{title}\n{table(['', *names, 'mean'], rows, '  ')}")
    if result["prompt"] is not None:
        lines = [f"after {result['prompt']!r}"]
        lines += [f"  {key}: {' '.join(text.split())}" for key, text in result["written"].items()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cells(rows: Sequence[Sequence[float]]) -> list[str]:
    """Mean and deviation over samples, text by text and over all texts."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    columns.append([fmean(row) for row in rows])
    return [
        f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "         ")
        for values in columns
    ]
