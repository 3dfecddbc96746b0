"""What the demo measures: losses, mask overlaps, times. Nothing here prints or draws."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from smollm import ExampleError
from torch import Tensor, nn

from lora_ortho import fused_ortho_lora, mask_stream
from lora_ortho.adapters import Injection, LoadedAdapter

WINDOW = 256  # tokens


def read_texts(folder: Path, names: Sequence[str]) -> list[str]:
    """The held-out text for each adapter."""
    missing = [folder / f"{name}.txt" for name in names if not (folder / f"{name}.txt").is_file()]
    if missing:
        raise ExampleError(f"there is no held-out text {missing[0]}")
    return [(folder / f"{name}.txt").read_text(encoding="utf-8") for name in names]


def windows(tokenizer: Any, text: str, count: int) -> Tensor:
    """The first `count` windows of a text: int64 (count, WINDOW)."""
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    if len(tokens) < count * WINDOW:
        raise ExampleError(f"a text has {len(tokens)} tokens, {count * WINDOW} are needed")
    return torch.tensor(tokens[: count * WINDOW]).view(count, WINDOW)


@torch.inference_mode()
def loss(model: nn.Module, tokens: Tensor) -> float:
    """Mean cross-entropy in nats of each token given those before it in its window."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).item()


@dataclass(frozen=True)
class Overlap:
    """Masks of one method, counted on what the kernels themselves drew.

    Attributes:
        elements: output elements looked at, over all layers.
        share: of them, the share each adapter acts on.
        overlapping: elements on which two or more adapters act.
        expected: the share of overlapping elements that theory gives.
    """

    method: str
    elements: int
    share: tuple[float, ...]
    overlapping: int
    expected: float


def masks_drawn(layer: Any, p: Sequence[float], method: str, rows: int, seed: int) -> Tensor:
    """Which adapters act where, as bits: int64 (rows, d_out), bit j for adapter j.

    Goes through the kernels: with x = 1, A_j = 1, B_j = 2^j and gains of 1 the output is the sum of
    2^j over the adapters that act, exact in float32 for up to 24 adapters.
    """
    _, keep = mask_stream.thresholds(list(p), method)
    ones = torch.ones(1, 1)
    return fused_ortho_lora(
        torch.ones(rows, 1),
        [ones] * len(p),
        [torch.full((layer.out_features, 1), 2.0**j) for j in range(len(p))],
        p=list(p),
        scaling=keep,
        method=method,
        seed=seed,
        stream=layer.stream,
        backend=layer.backend,
    ).to(torch.int64)


def count_overlap(handle: Injection, method: str, rows: int, seed: int) -> Overlap:
    """Counts over every layer of the model, `rows` tokens of each."""
    count = max(len(report.p) for report in handle.report)
    acting = torch.zeros(count, dtype=torch.int64)
    elements = overlapping = 0
    expected = 0.0
    for report in handle.report:
        drawn = masks_drawn(handle.layers[report.name], report.p, method, rows, seed)
        bits = (drawn[..., None] >> torch.arange(count)) & 1
        acting += bits.sum((0, 1))
        overlapping += int((bits.sum(-1) > 1).sum())
        elements += drawn.numel()
        expected += drawn.numel() * _expected_overlap(report.p, method)
    share = tuple((acting / elements).tolist())
    return Overlap(method, elements, share, overlapping, expected / elements)


def _expected_overlap(p: Sequence[float], method: str) -> float:
    """Probability that two or more adapters act on an element."""
    if method == "orthogonal":
        return 0.0
    _, keep = mask_stream.thresholds(list(p), method)
    none, one = 1.0, 0.0  # probabilities that no adapter, that exactly one acts
    for q in keep:
        none, one = none * (1 - q), one * (1 - q) + none * q
    return 1.0 - none - one


class TorchDirect(nn.Module):
    """The direct merge as plain torch does it best: factors joined once, one addmm."""

    def __init__(self, base: nn.Linear, parts: Sequence[Any]) -> None:
        super().__init__()
        self.base = base
        dtype = base.weight.dtype
        self.a = torch.cat([part.lora_A.to(dtype) for part in parts]).t()
        self.b = torch.cat([part.scaling * part.lora_B.to(dtype) for part in parts], dim=1).t()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        flat = x.reshape(-1, x.shape[-1])
        return torch.addmm(y.view(-1, y.shape[-1]), flat @ self.a, self.b).view(y.shape)


def shared_copy(model: nn.Module) -> nn.Module:
    """A second tree of modules on the same tensors, so that both can be adapted and timed."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def put_torch_direct(model: nn.Module, adapters: Sequence[LoadedAdapter]) -> nn.Module:
    """Replaces the adapted layers of a model by the direct merge in plain torch."""
    for name in sorted({name for adapter in adapters for name in adapter.layers}):
        parts = [adapter.layers[name] for adapter in adapters if name in adapter.layers]
        parent, _, child = name.rpartition(".")
        layer = TorchDirect(cast(nn.Linear, model.get_submodule(name)), parts)
        setattr(model.get_submodule(parent), child, layer)
    return model


@torch.inference_mode()
def time_forward(models: Mapping[str, nn.Module], tokens: int, rounds: int) -> dict[str, float]:
    """Median seconds of a forward pass over `tokens` tokens, divided by them, for each.

    Models take turns, after one round that is not counted.
    """
    ids = torch.arange(1000, 1000 + tokens)[None]
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model(input_ids=ids, use_cache=False)
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) / tokens for name, values in times.items()}
