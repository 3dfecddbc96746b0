"""The torch.library ops: opcheck, torch.compile, checkpointing, fake and meta tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import make, same_rank
from numerics import run
from op_checks import check_compiled_op, check_ops
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_ortho import Adapter, FusedOrthoLoRALinear, fused_ortho_lora
from lora_ortho.backends import cpu
from lora_ortho.call import Constants
from lora_ortho.problem import METHODS, Draw, Place

CASE = same_rank(10, 12, 34, 3, 4)
BACKENDS = ["reference", *(["cpu"] if cpu.unavailable() is None else [])]


@pytest.fixture(autouse=True)
def _fresh_compiler(_poisoned: None) -> Iterator[None]:
    torch.use_deterministic_algorithms(False)  # compiled graphs guard on it
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    """Schema, fakes, autograd registration and dynamic shapes, of both ops."""
    check_ops(backend, dtype)


@pytest.mark.parametrize("draw", Draw)
def test_constants_come_back_from_the_schema(draw: Draw) -> None:
    constants = Constants(draw, ((0, 7), (8, 65535)), Place(1, 2, 3, 4, 5), "cpu", True)
    assert Constants.of(*constants.flat()) == constants
    assert Constants.of(*constants.flat()).draw is draw


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_op(backend: str, method: str) -> None:
    """fullgraph, forward and backward, bits as in eager; another seed is another draw."""
    check_compiled_op(backend, method)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_op_on_mixed_dtypes(backend: str) -> None:
    """float32 factors beside bfloat16 inputs, and gradients in float32."""
    tensors = make(CASE, torch.bfloat16, factor_dtype=torch.float32)
    compiled = torch.compile(fused_ortho_lora, fullgraph=True, backend="aot_eager")
    found, eager = (
        run(f, tensors, seed=torch.tensor(5), backend=backend) for f in (compiled, fused_ortho_lora)
    )
    for a, b in zip((found.y, *found.lora_A), (eager.y, *eager.lora_A), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_compiled_op_without_gradients() -> None:
    tensors = make(CASE, torch.float32)
    compiled = torch.compile(fused_ortho_lora, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(*tensors[:3], seed=5), fused_ortho_lora(*tensors[:3], seed=5))


def test_other_numbers_of_tokens_do_not_recompile_forever() -> None:
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(fused_ortho_lora, fullgraph=True, backend=counter, dynamic=True)
    tensors = make(CASE, torch.float32)
    for tokens in (3, 5, 7, 8):
        x = torch.ones(2, tokens, 12)
        assert torch.equal(
            compiled(x, *tensors[1:3], seed=torch.tensor(5)),
            fused_ortho_lora(x, *tensors[1:3], seed=5),
        )
    assert counter.frame_count == 1


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_module(compiler: str) -> None:
    """In a model, with a fixed seed as in eager; without one, anew at every call."""
    tensors = make(CASE, torch.float32)
    adapters = [Adapter(A, B) for A, B in zip(*tensors[1:3], strict=True)]
    layer = FusedOrthoLoRALinear(nn.Linear(12, 34), adapters, seed=5, trainable=True)
    model = nn.Sequential(nn.Linear(12, 12), layer, nn.Tanh())
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    compiled(tensors.x).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(tensors.x).sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tensors.x), model(tensors.x), rtol=1e-5, atol=1e-6)
        layer.seed = None
        torch.manual_seed(3)
        first, second = compiled(tensors.x), compiled(tensors.x)
        assert not torch.equal(first, second)
        torch.manual_seed(3)
        assert torch.equal(compiled(tensors.x), first)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("seed", [None, 4])
def test_checkpointing(seed: int | None, reentrant: bool) -> None:
    """What is computed again in backward has the masks of the first time."""
    tensors = make(CASE, torch.float32)
    adapters = [Adapter(A, B) for A, B in zip(*tensors[1:3], strict=True)]
    layer = FusedOrthoLoRALinear(nn.Linear(12, 34), adapters, seed=seed, trainable=True)
    gradients = []
    for wrapped in (False, True):
        torch.manual_seed(8)
        layer.zero_grad()
        x = tensors.x.clone().requires_grad_()
        y = checkpoint(layer, x, use_reentrant=reentrant) if wrapped else layer(x)
        y.backward(tensors.grad)
        gradients.append([x.grad, *(p.grad.clone() for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_meta_and_fake_tensors() -> None:
    tensors = make(CASE, torch.bfloat16)
    meta = [t.to("meta") for t in (tensors.x, *tensors.lora_A, *tensors.lora_B)]
    y = fused_ortho_lora(meta[0], meta[1:4], meta[4:], seed=1)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (10, 34), torch.bfloat16)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (tensors.x, *tensors.lora_A, *tensors.lora_B)]
        y = fused_ortho_lora(fakes[0], fakes[1:4], fakes[4:], seed=1)
    assert isinstance(y, torch._subclasses.FakeTensor)
    assert y.shape == (10, 34)


def test_modes_see_the_op() -> None:
    """Under a dispatch mode the call goes through the op, with the result of the direct way."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    tensors = make(CASE, torch.float32)
    with Watch():
        watched = fused_ortho_lora(*tensors[:3], seed=5)
    assert "lora_ortho.forward.default" in seen
    assert torch.equal(watched, fused_ortho_lora(*tensors[:3], seed=5))


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated, and warns of checks
def test_jit_trace_records_the_op() -> None:
    tensors = make(CASE, torch.float32)

    def call(x: Tensor) -> Tensor:
        return fused_ortho_lora(x, *tensors[1:3], seed=5)

    traced = torch.jit.trace(call, tensors.x)
    assert "lora_ortho::forward" in str(traced.graph)
    other = make(CASE, torch.float32, seed=1).x
    assert torch.equal(traced(other), call(other))
