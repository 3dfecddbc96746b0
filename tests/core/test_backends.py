"""The registry of backends, shown with one that is written here."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import make, same_rank
from torch import Tensor, nn

from lora_ortho import Adapter, FusedOrthoLoRALinear, backends, fused_ortho_lora
from lora_ortho.backends import cpu, cuda, reference, triton
from lora_ortho.backends.base import Backend, Gradients, Needs
from lora_ortho.packing import PackedAdapters
from lora_ortho.problem import Place, Problem

CASE = same_rank(5, 12, 34, 3, 4)
# Checked by mypy: every file of the folder keeps to the protocol.
FILES: tuple[Backend[Any], ...] = (reference, cpu, triton, cuda)


class Counting:
    """The reference on small CPU problems, which counts its calls: all that a backend needs."""

    name = "counting"
    devices: tuple[str, ...] | None = ("cpu",)
    preference = 50
    copies = True

    def __init__(self) -> None:
        self.calls: list[str] = []

    def unavailable(self) -> str | None:
        return None

    def supports(self, problem: Problem) -> str | None:
        return None if problem.d_out < 100 else f"d_out is {problem.d_out}, above 99"

    def pack(
        self, problem: Problem, lora_A: Any, lora_B: Any, out: reference.Packed | None = None
    ) -> reference.Packed:
        self.calls.append("pack")
        return reference.pack(problem, [A.clone() for A in lora_A], [B.clone() for B in lora_B])

    def forward(
        self, packed: reference.Packed, x: Tensor, base: Tensor | None, gains: Tensor,
        seed: int | Tensor, place: Place, out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        self.calls.append("forward")
        return reference.forward(packed, x, base, gains, seed, place, out)

    def backward(
        self, packed: reference.Packed, grad: Tensor, x: Tensor, s: Tensor, gains: Tensor,
        seed: int | Tensor, place: Place, needs: Needs, factor_dtype: torch.dtype,
    ) -> Gradients:  # fmt: skip
        self.calls.append("backward")
        return reference.backward(packed, grad, x, s, gains, seed, place, needs, factor_dtype)


@pytest.fixture
def counting() -> Iterator[Counting]:
    backend: Backend[reference.Packed] = Counting()
    backends.register(backend)
    assert isinstance(backend, Counting)
    yield backend
    backends.unregister("counting")


def test_the_op_takes_it_unless_another_is_named(counting: Counting) -> None:
    tensors = make(CASE, torch.float32)
    assert torch.equal(
        fused_ortho_lora(*tensors[:3], seed=1),
        fused_ortho_lora(*tensors[:3], seed=1, backend="reference"),
    )
    assert counting.calls == ["pack", "forward"]
    fused_ortho_lora(*tensors[:3], seed=2)  # frozen factors are packed once
    assert counting.calls == ["pack", "forward", "forward"]


def test_the_op_and_its_gradients(counting: Counting) -> None:
    found = []
    for name in (None, "counting", "reference"):
        tensors = make(CASE, torch.float32)
        x = tensors.x.requires_grad_()
        y = fused_ortho_lora(x, *tensors[1:3], seed=1, backend=name)
        found.append((y.detach(), *torch.autograd.grad(y, [x], tensors.grad)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert counting.calls == ["pack", "forward", "backward"] * 2


@pytest.mark.parametrize("compiled", [False, True])
def test_the_module(counting: Counting, compiled: bool) -> None:
    tensors = make(CASE, torch.float32)
    adapters = [Adapter(A, B) for A, B in zip(*tensors[1:3], strict=True)]
    base, found = nn.Linear(12, 34), []
    for name in (None, "reference"):
        layer = FusedOrthoLoRALinear(base, adapters, seed=5, trainable=True, backend=name)
        run: Any = layer
        if compiled:
            torch.use_deterministic_algorithms(False)  # compiled graphs guard on it
            torch._dynamo.reset()
            run = torch.compile(layer, fullgraph=True, backend="aot_eager")
        y = run(tensors.x)
        gradients = torch.autograd.grad(y, list(layer.adapters.parameters()), tensors.grad)
        with torch.no_grad():
            found.append((y.detach(), *gradients, run(tensors.x)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert counting.calls.count("forward") == 2
    assert counting.calls.count("backward") == 1


def test_it_is_named_where_names_are(counting: Counting) -> None:
    wide = make(same_rank(2, 12, 128, 3, 4), torch.float32)
    with pytest.raises(ValueError, match=r"'counting' cannot serve this call: d_out is 128"):
        fused_ortho_lora(*wide[:3], seed=1, backend="counting")
    fused_ortho_lora(*wide[:3], seed=1)  # the next best serves it
    assert counting.calls == []
    with pytest.raises(ValueError, match=r"one of .*, counting, got 'none'"):
        fused_ortho_lora(*wide[:3], seed=1, backend="none")
    assert backends.available()["counting"] is None
    assert backends.preferred("cpu")[0] == "counting"
    assert "counting" not in backends.preferred("cuda")


def test_it_is_gone_after_it_was_taken_out() -> None:
    tensors = make(CASE, torch.float32)
    first, second = Counting(), Counting()
    for backend in (first, second):  # of one name: a pack of the first is not the second's
        backends.register(backend)
        fused_ortho_lora(*tensors[:3], seed=1)
        PackedAdapters(*tensors[1:3], torch.float32).apply(tensors.x, None, 1)
        backends.unregister("counting")
        assert backend.calls == ["pack", "forward"] * 2
    fused_ortho_lora(*tensors[:3], seed=1)
    assert second.calls == ["pack", "forward"] * 2
    assert "counting" not in backends.names()
    with pytest.raises(ValueError, match="got 'counting'"):
        backends.unregister("counting")


def test_what_cannot_be_registered() -> None:
    before = backends.names()
    part: Any = SimpleNamespace(name="part", devices=None, preference=1)
    with pytest.raises(TypeError, match=r"^backend must have name, .*backward; it lacks copies, "):
        backends.register(part)
    with pytest.raises(ValueError, match=r"^backend must have a new name, got 'reference'"):
        backends.register(reference)
    for wrong in ({"name": 3}, {"name": "two words"}, {"preference": "high"}):
        words = {word: getattr(reference, word) for word in vars(Backend) if word[0] != "_"}
        with pytest.raises(TypeError, match=r"^backend must have a"):
            backends.register(SimpleNamespace(**{**words, "name": "part", **wrong}))
    with pytest.raises(ValueError, match=r"^name must be one of reference"):
        backends.unregister(None)  # type: ignore[arg-type]
    assert backends.names() == before


def test_every_file_of_the_folder_is_there() -> None:
    assert backends.names() == tuple(backend.name for backend in FILES)
    assert backends.preferred("cpu") == ["cpu", "reference"]
    assert backends.preferred("cuda") == ["triton", "cuda", "reference"]
    assert backends.preferred("meta") == ["reference"]
