"""The contenders, each written as its users would write it.

A contender is a function from the inputs of a case to a call without arguments, with everything
done before that can be done once. A forward call returns y (tokens, d_out); a training call
returns y and its gradients in x, base, lora_A and lora_B (for direct: in the joined factors).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import lora_ortho
from lora_ortho.packing import PackedAdapters
from lora_ortho.problem import Place

from .cases import SEED, Inputs

Forward = Callable[[], Tensor]
Training = Callable[[], tuple[Tensor, ...]]


def ours(inputs: Inputs, backend: str, samples: int = 1) -> Forward:
    """The prepared orthogonal merge, factors packed once; the last of so many samples."""
    prepared = PackedAdapters(inputs.lora_A, inputs.lora_B, inputs.dtype, backend=backend)
    x, base, seed = inputs.x, inputs.base, inputs.seed
    if samples == 1:
        return lambda: prepared.apply(x, base, seed)
    places = [Place(sample=sample) for sample in reversed(range(samples))]
    return lambda: [prepared.apply(x, base, seed, place) for place in places][-1]


def direct(inputs: Inputs) -> Forward:
    """torch's own best direct merge: factors joined once."""
    A = torch.cat(inputs.lora_A)  # (sum r, d_in)
    B = torch.cat(inputs.lora_B, 1)  # (d_out, sum r)
    x, base = inputs.x, inputs.base
    return lambda: _direct(x, base, A, B)


def _chances(adapters: int) -> list[float]:
    """Keep probabilities 1/K, each relative to what the adapters before it leave."""
    return [1.0 / (adapters - j) for j in range(adapters)]


def paper_merge(
    x: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], base: Tensor
) -> Tensor:
    """The construction of arXiv 2510.03262: m_j = z_j prod_{i<j} (1 - z_i), z_j Bernoulli."""
    adapters = len(lora_A)
    y, free = base, torch.ones_like(base)
    for A, B, chance in zip(lora_A, lora_B, _chances(adapters), strict=True):
        z = torch.bernoulli(torch.full_like(base, chance))
        mask = z * free
        free = free * (1 - z)
        y = y + adapters * mask * (x @ A.T @ B.T)
    return y


def paper(inputs: Inputs) -> Forward:
    """The paper's construction in eager torch: per adapter a Bernoulli tensor, stick-breaking."""
    return functools.partial(paper_merge, inputs.x, inputs.lora_A, inputs.lora_B, inputs.base)


def categorical_merge(
    x: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], base: Tensor
) -> Tensor:
    """One uniform number per element picks its adapter."""
    adapters = len(lora_A)
    u = torch.rand(base.shape, device=base.device)
    y = base
    for j, (A, B) in enumerate(zip(lora_A, lora_B, strict=True)):
        delta = adapters * (x @ A.T @ B.T)
        mine = (u >= j / adapters) & (u < (j + 1) / adapters)
        y = torch.where(mine, base + delta, y)
    return y


def categorical(inputs: Inputs) -> Forward:
    """One torch.rand, K matmuls, torch.where, eager."""
    return functools.partial(categorical_merge, inputs.x, inputs.lora_A, inputs.lora_B, inputs.base)


def compiled(inputs: Inputs) -> Forward:
    """The same under torch.compile; one compiled function serves all inputs of a shape."""
    function = _compiled_merge()
    return functools.partial(function, inputs.x, inputs.lora_A, inputs.lora_B, inputs.base)


@functools.cache
def _compiled_merge() -> Callable[..., Tensor]:
    return torch.compile(categorical_merge, fullgraph=True, dynamic=False)


def forget_compiled() -> None:
    """Before inputs of another shape, so that shapes do not add up to torch's limit."""
    torch._dynamo.reset()
    _compiled_merge.cache_clear()


def plain_linear(inputs: Inputs) -> torch.nn.Linear:
    """The layer that both modules below adapt."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        layer = torch.nn.Linear(inputs.case.d_in, inputs.case.d_out, bias=False)
    return layer.to(inputs.dtype).to(inputs.x.device).requires_grad_(False)


def linear(inputs: Inputs) -> Forward:
    """The layer that is adapted, without any adapter."""
    return functools.partial(plain_linear(inputs), inputs.x)


def our_layer(inputs: Inputs, backend: str) -> Forward:
    """FusedOrthoLoRALinear with K adapters, the base layer included."""
    adapters = [lora_ortho.Adapter(A, B) for A, B in zip(inputs.lora_A, inputs.lora_B, strict=True)]
    layer = lora_ortho.FusedOrthoLoRALinear(
        plain_linear(inputs), adapters, seed=SEED, backend=backend
    )
    return functools.partial(layer, inputs.x)


def missing(package: str) -> str | None:
    """Why contenders of a package cannot run; None where it is installed."""
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def peft_layer(inputs: Inputs) -> Forward:
    """PEFT's lora.Linear with K active adapters (a direct merge), the base layer included."""
    import peft

    case = inputs.case
    names = [f"adapter{j}" for j in range(case.adapters)]
    config = peft.LoraConfig(r=case.rank, lora_alpha=case.rank)
    from peft.tuners.lora import Linear

    layer = Linear(plain_linear(inputs), names[0], config, r=case.rank, lora_alpha=case.rank)
    for name in names[1:]:
        layer.update_layer(name, case.rank, lora_alpha=case.rank, config=config)
    for name, A, B in zip(names, inputs.lora_A, inputs.lora_B, strict=True):
        layer.lora_A[name].weight.data = A
        layer.lora_B[name].weight.data = B
    layer.set_adapter(names)
    layer.eval()
    return functools.partial(layer, inputs.x)


def recorded(inputs: Inputs, contender: str, backend: str) -> tuple[Tensor, list[Tensor]]:
    """y of ours or of direct with its graph, and what it can be differentiated in.

    That is x, base, and the factors one by one (ours) or joined (direct).
    """
    if contender == "direct":
        joined = torch.cat(inputs.lora_A), torch.cat(inputs.lora_B, 1)
        leaves = _leaves(inputs.x, inputs.base, *joined)
        return _direct(*leaves), leaves
    leaves = _leaves(inputs.x, inputs.base, *inputs.lora_A, *inputs.lora_B)
    return _merged(inputs, leaves, backend), leaves


def _merged(inputs: Inputs, leaves: Sequence[Tensor], backend: str) -> Tensor:
    x, base, *factors = leaves
    half = len(factors) // 2
    return lora_ortho.fused_ortho_lora(
        x, factors[:half], factors[half:], base=base, seed=inputs.seed, backend=backend
    )


def _direct(x: Tensor, base: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return torch.addmm(base, x @ A.T, B.T)


def ours_training(inputs: Inputs, backend: str) -> Training:
    """The public op and its gradients; factors unchanged since the last call."""
    leaves = _leaves(inputs.x, inputs.base, *inputs.lora_A, *inputs.lora_B)

    def call() -> tuple[Tensor, ...]:
        y = _merged(inputs, leaves, backend)
        return y, *torch.autograd.grad(y, leaves, inputs.grad)

    return call


def direct_training(inputs: Inputs) -> Training:
    """torch's direct merge and its gradients in the joined factors."""
    leaves = _leaves(inputs.x, inputs.base, torch.cat(inputs.lora_A), torch.cat(inputs.lora_B, 1))

    def call() -> tuple[Tensor, ...]:
        y = _direct(*leaves)
        return y, *torch.autograd.grad(y, leaves, inputs.grad)

    return call


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def vllm(inputs: Inputs) -> Forward:
    """vLLM's LoRA kernels: shrink, then expand added to the base; one adapter of rank K r.

    They give each token one adapter, so K on every token are one adapter of joined factors: a
    direct merge. Adding in place, expand writes over its output; the base is copied for it.
    """
    ops: Any = importlib.import_module("vllm.lora.ops.triton_ops")
    A, B = torch.cat(inputs.lora_A)[None], torch.cat(inputs.lora_B, 1)[None]
    x, base, tokens = inputs.x, inputs.base, inputs.case.tokens
    meta = ops.LoRAKernelMeta.make(1, tokens, device=x.device)
    meta.prepare_tensors(torch.zeros(tokens, dtype=torch.int32, device=x.device))
    wants = inspect.signature(meta.meta_args).parameters  # newer versions ask one thing more
    arguments = meta.meta_args(tokens, *[False] * (len(wants) - 1))

    def call() -> Tensor:
        s = torch.empty(1, tokens, A.shape[1], dtype=torch.float32, device=x.device)
        y = base.clone()
        ops.lora_shrink(x, [A], s, *arguments, 1.0)
        ops.lora_expand(s, [B], y, *arguments, offset_start=0, add_inputs=True)
        return y

    return call
