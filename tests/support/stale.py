"""Factors written in ways that version counters do not show, and what must come of it."""

from __future__ import annotations

from typing import Any

import torch
from servers import Server
from torch import Tensor, nn

from lora_ortho import Adapter, FusedOrthoLoRALinear, fused_ortho_lora

D_IN, D_OUT, RANK = 10, 14, 4


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape)


def layer_of(backend: str | None = None, **settings: Any) -> FusedOrthoLoRALinear:
    """One adapter, so that no element is masked: plain torch gives the right value."""
    adapter = Adapter(normal(RANK, D_IN), normal(D_OUT, RANK))
    base = nn.Linear(D_IN, D_OUT).requires_grad_(False)
    return FusedOrthoLoRALinear(base, [adapter], seed=0, backend=backend, **settings)


def by_torch(layer: FusedOrthoLoRALinear, x: Tensor) -> Tensor:
    factors: Any = layer.adapters[0]
    return layer.base(x) + x @ factors.lora_A.T @ factors.lora_B.T


def by_data(factor: Tensor, value: Tensor) -> None:
    factor.data.copy_(value)


def by_numpy(factor: Tensor, value: Tensor) -> None:
    factor.detach().numpy()[...] = value.numpy()


def by_storage(factor: Tensor, value: Tensor) -> None:
    factor.untyped_storage().copy_(value.contiguous().untyped_storage())


def by_kept_version(factor: Tensor, value: Tensor) -> None:
    """As FSDP2's all-gather writes."""
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(factor):
        factor.copy_(value)


def by_average(factor: Tensor, value: Tensor) -> None:
    """As an exponential moving average is copied into a model and out again."""
    torch._foreach_lerp_([factor.data], [value], 1.0)


WRITERS = [by_data, by_numpy, by_storage, by_kept_version, by_average]


def check_module(server: Server, trainable: bool, which: str, write: Any) -> None:
    layer, x = layer_of(server.backend, trainable=trainable), normal(5, D_IN)
    factor = getattr(layer.adapters[0], which)
    for grad in (False, True, False):
        with torch.set_grad_enabled(grad):
            layer(x)
            version = factor._version
            write(factor, normal(*factor.shape))
            assert factor._version == version, "the counter shows it: nothing is tested"
            torch.testing.assert_close(layer(x), by_torch(layer, x), rtol=1e-4, atol=1e-4)


def check_op(server: Server, needs_grad: bool, write: Any) -> None:
    A, B, x = normal(RANK, D_IN), normal(D_OUT, RANK), normal(5, D_IN).requires_grad_()
    B.requires_grad_(needs_grad)
    for _ in range(2):
        fused_ortho_lora(x, [A], [B], seed=0, backend=server.backend)
        write(A, normal(RANK, D_IN))
        write(B, normal(D_OUT, RANK))
        y = fused_ortho_lora(x, [A], [B], seed=0, backend=server.backend)
        torch.testing.assert_close(y, x @ A.T @ B.T, rtol=1e-4, atol=1e-4)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        expected = torch.ones(5, D_OUT) @ B.detach() @ A
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def check_backward_of_its_forward(server: Server) -> None:
    """A factor that is written in between by .data: gradients are those of what was computed."""
    A, B, x = normal(RANK, D_IN), normal(D_OUT, RANK), normal(5, D_IN).requires_grad_()
    B.requires_grad_()
    y, old = fused_ortho_lora(x, [A], [B], seed=0, backend=server.backend), B.detach().clone()
    if server.backend != "reference":  # which, as torch's own products, keeps no copy
        B.data.zero_()
    y.sum().backward()
    expected = torch.ones(5, D_OUT) @ old @ A
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)
