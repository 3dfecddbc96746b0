"""What only a device has: graphs, streams, a second device, memory beyond 2**31 elements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import make, same_rank
from numerics import Results, run
from on_device import back, move
from torch import Tensor, nn

from lora_ortho import Adapter, FusedOrthoLoRALinear, backends, fused_ortho_lora

CASE = same_rank(70, 64, 272, 3, 16)


def same(a: Results, b: Results) -> bool:
    """Whether two results are the same bits."""

    def flat(results: Results) -> list[Tensor]:
        groups = [v if isinstance(v, list) else [v] for v in results if v is not None]
        return [tensor.cpu() for group in groups for tensor in group]

    return all(torch.equal(u, v) for u, v in zip(flat(a), flat(b), strict=True))


def test_the_device_has_a_backend(device: torch.device) -> None:
    """What backend=None takes is not the reference."""
    if device.type == "cuda":
        tensors = move(make(CASE, torch.bfloat16), CASE, device)
        assert backends.preferred("cuda")[0] != "reference"
        wanted = run(fused_ortho_lora, tensors, seed=1, backend=backends.preferred("cuda")[0])
        assert same(run(fused_ortho_lora, tensors, seed=1), wanted)


def test_graph(gpu: torch.device, backend: str) -> None:
    """Captured once, forward and backward; a replay with another seed in its tensor draws anew."""
    if backend == "reference":
        pytest.skip("the reference sends its thresholds from the host at every call")
    tensors = move(make(CASE, torch.bfloat16), CASE, gpu)
    seed = torch.tensor(5, device=gpu)
    leaves = [t.requires_grad_() for t in (tensors.x, *tensors.lora_A, *tensors.lora_B)]

    def step() -> list[Tensor]:
        y = fused_ortho_lora(*tensors[:3], base=tensors.base, seed=seed, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, leaves, tensors.grad)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    outputs = []
    for number in (5, -6, 1 << 40):
        seed.fill_(number)
        graph.replay()
        replayed = [t.clone() for t in captured]
        assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))
        outputs.append(replayed[0])
    assert not torch.equal(outputs[0], outputs[1])


def test_streams(gpu: torch.device, backend: str) -> None:
    """The kernels queue behind what came before on the current stream, not on another."""
    tensors = move(make(CASE, torch.bfloat16), CASE, gpu)
    wanted = run(fused_ortho_lora, tensors, seed=3, backend=backend)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(tensors.x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(tensors.x)
        found = run(fused_ortho_lora, tensors._replace(x=late), seed=3, backend=backend)
    stream.synchronize()
    assert same(found, wanted)


def test_second_device(gpu: torch.device, backend: str) -> None:
    """Tensors on a device that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tensors = make(CASE, torch.bfloat16)
    first, second = (
        back(run(fused_ortho_lora, move(tensors, CASE, torch.device("cuda", n)), seed=3,
                 backend=backend))
        for n in (0, 1)
    )  # fmt: skip
    assert torch.cuda.current_device() == gpu.index
    assert same(first, second)


def test_tensors_on_different_devices(gpu: torch.device, backend: str) -> None:
    """Each error names its argument."""
    cpu = make(CASE, torch.bfloat16)
    here = move(cpu, CASE, gpu)
    weights = torch.ones(3, device=gpu)
    changes: list[tuple[str, Any]] = [
        (r"lora_A\[0\]", {"lora_A": cpu.lora_A, "lora_B": cpu.lora_B}),
        (r"lora_B\[1\]", {"lora_B": [here.lora_B[0], cpu.lora_B[1], here.lora_B[2]]}),
        ("base", {"base": cpu.base}),
        ("seed", {"seed": torch.tensor(1)}),
        ("weights", {"weights": weights.cpu()}),
        (r"weights\[1\]", {"weights": [1.0, float("nan"), 1.0]}),
    ]
    right = {"x": here.x, "lora_A": here.lora_A, "lora_B": here.lora_B, "seed": 0}
    for name, change in changes:
        with pytest.raises(ValueError, match=f"^{name} must be"):
            fused_ortho_lora(**{**right, **change}, backend=backend)


@pytest.mark.parametrize("d_out", [1 << 16, (1 << 16) + 3])
def test_more_than_two_to_the_31_elements(gpu: torch.device, backend: str, d_out: int) -> None:
    """The last rows of a large output are those of a small one; so is the gradient of x."""
    if backend == "reference":
        pytest.skip("the reference builds every mask, in 64-bit words: 20 times the memory")
    tokens = (1 << 15) + 70
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * 2 * tokens * d_out + (2 << 30):
        pytest.skip(f"needs 15 GiB of free memory, there are {free >> 30}")
    x = torch.randn(tokens, 32, device=gpu).bfloat16().requires_grad_()
    lora_A = [torch.randn(8, 32, device=gpu).bfloat16() for _ in "ab"]
    lora_B = [torch.randn(d_out, 8, device=gpu).bfloat16() for _ in "ab"]
    y = fused_ortho_lora(x, lora_A, lora_B, seed=3, backend=backend)
    last = x[-70:].detach().requires_grad_()
    place = {"row_offset": tokens - 70}
    small = fused_ortho_lora(last, lora_A, lora_B, seed=3, backend=backend, **place)
    assert torch.equal(y[-70:], small)
    grad = y.detach()
    (grad_x,) = torch.autograd.grad(y, x, grad)
    (small_grad_x,) = torch.autograd.grad(small, last, grad[-70:])
    torch.testing.assert_close(
        grad_x[-70:], small_grad_x, rtol=2e-2, atol=2e-2 * float(grad_x.abs().max())
    )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(gpu: torch.device, backend: str, compiler: str) -> None:
    """In a model, without graph breaks, forward and backward."""
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    tensors = move(make(CASE, torch.float32), CASE, gpu)
    adapters = [Adapter(A, B) for A, B in zip(*tensors[1:3], strict=True)]
    base = nn.Linear(64, 272, device=gpu)
    layer = FusedOrthoLoRALinear(base, adapters, seed=5, trainable=True, backend=backend)
    model = nn.Sequential(nn.Linear(64, 64, device=gpu), layer, nn.Tanh())
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    gradients = []
    for function in (compiled, model):
        model.zero_grad()
        function(tensors.x).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_memory_of_forward(gpu: torch.device, backend: str) -> None:
    """Nothing beyond output and s, as TARGETS asks."""
    if backend == "reference":
        pytest.skip("the reference builds every mask")
    tokens, d_out, ranks = 4096, 4096, 48
    x = torch.randn(tokens, 512, device=gpu).bfloat16()
    lora_A = [torch.randn(16, 512, device=gpu).bfloat16() for _ in "abc"]
    lora_B = [torch.randn(d_out, 16, device=gpu).bfloat16() for _ in "abc"]
    base = torch.randn(tokens, d_out, device=gpu).bfloat16()
    seed = torch.tensor(3, device=gpu)

    def call() -> Tensor:
        with torch.no_grad():
            return fused_ortho_lora(x, lora_A, lora_B, base=base, seed=seed, backend=backend)

    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = call()
    extra = torch.cuda.max_memory_allocated() - before - 2 * tokens * (d_out + ranks)
    assert y.shape == (tokens, d_out)
    assert extra <= 4096, f"{extra} bytes"  # rounding of allocations to 512 bytes
