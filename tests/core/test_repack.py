"""The GPU backends: changed factors are seen, and packed into the memory that captured graphs read.

On the CPU, in Triton's interpreter and with the CUDA kernels on the host."""

from __future__ import annotations

from typing import Any

import pytest
import stale
import torch
from cuda_host import use
from servers import Server, interpreted

from lora_ortho import fused_ortho_lora, packing
from lora_ortho.backends import triton
from lora_ortho.problem import Draw, Problem


@pytest.fixture(params=[pytest.param("triton", marks=interpreted()), "cuda"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A backend of GPUs that serves CPU tensors."""
    if request.param == "cuda":
        use(monkeypatch)
    return Server(request.param)


def addresses(packed: Any) -> list[int]:
    tensors = [packed.buffer] if hasattr(packed, "buffer") else [packed.A, packed.B]
    return [tensor.data_ptr() for tensor in tensors]


def kept_by(layer: Any) -> Any:
    return layer._mixer._kept[0].packed


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("write", stale.WRITERS)
def test_module(gpu: Server, write: Any, trainable: bool) -> None:
    stale.check_module(gpu, trainable, "lora_B", write)


def test_op(gpu: Server) -> None:
    stale.check_op(gpu, True, stale.by_data)
    stale.check_op(gpu, False, stale.by_data)
    stale.check_backward_of_its_forward(gpu)


def test_the_memory_of_a_pack_is_written_again(gpu: Server) -> None:
    layer, x = stale.layer_of(gpu.backend, trainable=True), stale.normal(5, stale.D_IN)
    factors: Any = layer.adapters[0]
    with torch.no_grad():
        layer(x)
        place = addresses(kept_by(layer))
        factors.lora_B.mul_(2)
        torch.testing.assert_close(layer(x), stale.by_torch(layer, x), rtol=1e-4, atol=1e-4)
        factors.lora_A.data[0, 0] += 5.0
        layer.refresh()
        torch.testing.assert_close(layer(x), stale.by_torch(layer, x), rtol=1e-4, atol=1e-4)
    layer(x).sum().backward()  # a training step in between
    with torch.no_grad():
        factors.lora_B.data.mul_(2)
        torch.testing.assert_close(layer(x), stale.by_torch(layer, x), rtol=1e-4, atol=1e-4)
    assert addresses(kept_by(layer)) == place


def test_the_memory_of_the_ops_pack_is_written_again(gpu: Server) -> None:
    A, B = stale.normal(stale.RANK, stale.D_IN), stale.normal(stale.D_OUT, stale.RANK)
    x = stale.normal(5, stale.D_IN)

    def kept() -> Any:
        (((_, found),),) = (
            entries.values() for entries in packing._storages[id(B.untyped_storage())][1].values()
        )
        return found

    fused_ortho_lora(x, [A], [B], seed=0, backend=gpu.backend)
    place = addresses(kept())
    B.mul_(2)
    found = fused_ortho_lora(x, [A], [B], seed=0, backend=gpu.backend)
    torch.testing.assert_close(found, x @ A.T @ B.T, rtol=1e-4, atol=1e-4)
    B.data[0, 0] += 5.0
    packing.refresh([A], [B])
    found = fused_ortho_lora(x, [A], [B], seed=0, backend=gpu.backend)
    torch.testing.assert_close(found, x @ A.T @ B.T, rtol=1e-4, atol=1e-4)
    assert addresses(kept()) == place


@interpreted()
def test_tables_are_sent_once() -> None:
    """Nothing is copied from the host while a graph is captured: the table of intervals is kept."""
    problem = Problem(
        Draw.SHARED, ((0, 29999), (30000, 59999)), 8, 16, (2, 3), torch.float32, "cpu"
    )
    A, B = [stale.normal(r, 8) for r in (2, 3)], [stale.normal(16, r) for r in (2, 3)]
    assert triton.pack(problem, A, B).table is triton.pack(problem, A, B).table
