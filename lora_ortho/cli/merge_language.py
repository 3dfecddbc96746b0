"""``lora-ortho merge`` on a language model: losses on texts, and words after the prompt."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from lora_ortho.adapters import inject
from lora_ortho.adapters.models.inject import Injection
from lora_ortho.merge_config import MergeConfig
from lora_ortho.messages import one_line

from .console import CliError, Progress, quieten, table, weights_text
from .merge_checks import device_of, dtype_of, read_text
from .merge_results import Made, Unfinished

_WINDOW = 256  # tokens evaluated at once


def compare(config: MergeConfig, progress: Progress) -> Made:
    """Runs the bare model, each adapter alone, and every method.

    Raises:
        CliError, ValueError: what does not fit, before anything is run.
        Unfinished: a row failed after others were finished.
    """
    texts = [read_text(config, name) for name in config.texts]
    progress("loading the model")
    model, tokenizer = load(config)
    progress("loading the adapters")
    adapters = config.of_on(config.load_adapters(model))
    tokens = [_tokens(tokenizer, text, config) for text in texts]
    ids = None if config.prompt is None else _prompt(tokenizer, config.prompt)
    merges = {method: _settings(config, method) for method in config.methods}
    for settings in merges.values():  # every refusal comes before the first row
        inject(model, adapters, **settings).detach()
    losses: dict[str, list[list[float]]] = {}
    written: dict[str, str] = {}

    def row(key: str, handle: Injection | None = None, samples: int = 1) -> None:
        found = []
        for sample in range(samples):
            progress(key if samples == 1 else f"{key}, sample {sample + 1} of {samples}")
            if handle is not None:
                handle.set(sample=sample)
            found.append([loss(model, x) for x in tokens])
            if ids is not None and sample == 0:
                text = generate(model, tokenizer, ids, config)
        losses[key] = found
        if ids is not None:
            written[key] = text

    key = "bare model"
    try:
        row(key)
        for adapter, weight in zip(adapters, config.of_on(config.weights), strict=True):
            key = f"{adapter.name} alone"
            alone: Any = {"method": "direct", "backend": config.backend}
            with inject(model, [adapter], weights=[weight], **alone) as handle:
                row(key, handle)
        for key, settings in merges.items():
            with inject(model, adapters, **settings) as handle:
                row(key, handle, 1 if key == "direct" else config.samples)
    except (Exception, KeyboardInterrupt) as error:
        if not losses:
            raise
        raise Unfinished(_made(config, tokens, losses, written), key) from error
    return _made(config, tokens, losses, written)


def _settings(config: MergeConfig, method: str) -> dict[str, Any]:
    """What `inject` is given for a method."""
    return {
        "p": None if config.p is None else config.of_on(config.p),
        "weights": config.of_on(config.weights),
        "method": method,
        "seed": config.seed,
        "strata": config.strata,
        "backend": config.backend,
    }


def _made(
    config: MergeConfig,
    tokens: Sequence[Tensor],
    losses: dict[str, list[list[float]]],
    written: dict[str, str],
) -> Made:
    result = {
        "kind": "language",
        "model": config.pipe_id,
        "adapters": config.names,
        "weights": config.weights,
        "p": config.p,
        "seed": config.seed,
        "strata": config.strata,
        "texts": list(config.texts),
        "tokens": [x.numel() for x in tokens],
        "losses": losses,
        "prompt": config.prompt,
        "written": written,
    }
    return Made(result, as_text(result))


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
    dtype, device = dtype_of(config, "language"), device_of(config)
    quieten(transformers.logging)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        model = model.to(device)
    except Exception as error:  # whatever the library raises for a model it cannot load
        raise CliError(f"cannot load {source}: {one_line(error)}") from error
    return model.eval().requires_grad_(False), tokenizer


def _tokens(tokenizer: Any, text: str, config: MergeConfig) -> Tensor:
    found: list[int] = tokenizer(text, add_special_tokens=False).input_ids[: config.max_tokens]
    if len(found) < 2:
        raise CliError(f"texts: a text of {len(found)} tokens is too short to take a loss on")
    return torch.tensor(found)


def _prompt(tokenizer: Any, prompt: str) -> Tensor:
    """(1, tokens) of the prompt."""
    ids: Tensor = tokenizer(prompt, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        raise CliError("prompt: no token in it")
    return ids


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
def generate(model: Any, tokenizer: Any, ids: Tensor, config: MergeConfig) -> str:
    """What the model writes after the prompt's tokens, most probable token by token."""
    ids = ids.to(model.device)
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
    weights = weights_text(result["adapters"], result["weights"])
    strata = f", {result['strata']} strata" if result["strata"] != 1 else ""
    parts = [f"{result['model']} with {weights}; seed {result['seed']}{strata}"]
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
