"""fused_ortho_lora at its boundary: shapes, layouts, defaults, seeds, modes of torch."""

from __future__ import annotations

import os

import pytest
import torch
from cases import METHODS, make, same_rank
from servers import Server
from torch.autograd import forward_ad

from lora_ortho import fused_ortho_lora, mask_stream
from lora_ortho.backends import cpu
from lora_ortho.reference import merge

CASE = same_rank(24, 20, 70, 3, 4)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_integer_weights(server: Server, dtype: torch.dtype) -> None:
    """A tensor of integers is what the list of the same numbers is."""
    tensors, numbers = make(CASE, torch.float32), [1, 0, 1]
    weights = torch.tensor(numbers, dtype=dtype)
    listed = fused_ortho_lora(*tensors[:3], weights=numbers, seed=3, backend=server.backend)
    found = fused_ortho_lora(*tensors[:3], weights=weights, seed=3, backend=server.backend)
    assert torch.equal(found, listed)


def test_defaults_are_equal_rates_and_unit_weights(server: Server) -> None:
    tensors = make(CASE, torch.float64)
    p, ones = [1 - 1 / 3] * 3, [1.0] * 3
    short = fused_ortho_lora(*tensors[:3], seed=3, backend=server.backend)
    full = fused_ortho_lora(
        *tensors[:3], p=p, scaling=ones, weights=ones, method="orthogonal", base=None, seed=3,
        stream=0, sample=0, strata=1, row_offset=0, col_offset=0, backend=server.backend,
    )  # fmt: skip
    assert torch.equal(short, full)
    thresholds, keep = mask_stream.thresholds(p, "orthogonal")
    masks = mask_stream.masks(3, range(24), range(70), thresholds, "orthogonal")
    expected = merge(*tensors[:3], [1 / q for q in keep], masks)
    torch.testing.assert_close(short, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 3), (2, 0, 3), (2, 1, 3, 2)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_leading_dimensions(server: Server, method: str, lead: tuple[int, ...]) -> None:
    """Tokens are counted over the flattened leading dimensions; gradients have their shapes."""
    case = same_rank(int(torch.tensor(lead).prod()) if lead else 1, 20, 70, 3, 4)
    tensors = make(case, torch.float32)
    x = tensors.x.reshape(*lead, 20).requires_grad_()
    base = tensors.base.reshape(*lead, 70).requires_grad_()
    y = fused_ortho_lora(x, *tensors[1:3], base=base, seed=3, method=method, backend=server.backend)
    assert y.shape == (*lead, 70)
    flat = fused_ortho_lora(
        *tensors[:3], base=tensors.base, seed=3, method=method, backend=server.backend
    )
    assert torch.equal(y.reshape(-1, 70), flat.detach())
    y.backward(tensors.grad.reshape(y.shape))
    assert x.grad.shape == x.shape
    assert base.grad.shape == base.shape
    assert torch.equal(base.grad, tensors.grad.reshape(y.shape))


def test_dimensions_that_do_not_collapse(server: Server) -> None:
    """Batch and tokens swapped: no single stride walks them."""
    tensors = make(CASE, torch.float32)
    x = tensors.x.reshape(4, 6, 20).transpose(0, 1)
    base = tensors.base.reshape(4, 6, 70).transpose(0, 1)
    y = fused_ortho_lora(x, *tensors[1:3], base=base, seed=3, backend=server.backend)
    straight = fused_ortho_lora(
        x.contiguous(), *tensors[1:3], base=base.contiguous(), seed=3, backend=server.backend
    )
    assert torch.equal(y, straight)


@pytest.mark.parametrize("reduce", ["sum", "mean", "rows"])
def test_expanded_gradients(server: Server, reduce: str) -> None:
    """What sum and mean send back has strides of 0."""
    tensors = make(CASE, torch.float32)
    grads = []
    for expand in (True, False):
        x = tensors.x.reshape(4, 6, 20).clone().requires_grad_()
        y = fused_ortho_lora(x, *tensors[1:3], seed=3, backend=server.backend)
        scale = {"sum": 1.0, "mean": 1 / y.numel(), "rows": 1.0}[reduce]
        if expand:
            out = y.sum(0) if reduce == "rows" else getattr(y, reduce)()
            out.backward(torch.ones_like(out))
        else:
            y.backward(torch.full_like(y, scale))
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [2, 16])
def test_it_rounds_once(server: Server, count: int, dtype: torch.dtype) -> None:
    """1 + half a unit + a little is above the tie: it goes up, unless a part was rounded before."""
    one, unit = torch.ones(1, 1, dtype=dtype), torch.finfo(dtype).eps
    parts = [unit / 2, unit / 4096] + [0.0] * (count - 2)
    lora_A = [torch.ones(32, 1, dtype=dtype)] * count
    lora_B = [torch.zeros(130, 32, dtype=dtype) for _ in parts]
    for B, part in zip(lora_B, parts, strict=True):
        B[:, 5] = part
    base = one.expand(20, 130)
    for grad in (False, True):
        y = fused_ortho_lora(
            one.expand(20, 1).detach().requires_grad_(grad), lora_A, lora_B, method="direct",
            base=base, seed=0, backend=server.backend,
        )  # fmt: skip
        assert torch.equal(y.double(), torch.full((20, 130), 1 + unit).double())


def test_base_is_not_modified(server: Server) -> None:
    tensors = make(CASE, torch.float32)
    before = tensors.base.clone()
    with torch.no_grad():
        y = fused_ortho_lora(*tensors[:3], base=tensors.base, seed=3, backend=server.backend)
    assert torch.equal(tensors.base, before)
    assert y.data_ptr() != tensors.base.data_ptr()


def test_negative_views(server: Server) -> None:
    """A tensor whose sign torch has put off: the imaginary part of a conjugate."""
    tensors = make(CASE, torch.float32)
    complex_x = torch.complex(torch.zeros(24, 20), -tensors.x)
    complex_A = [torch.complex(torch.zeros_like(A), -A) for A in tensors.lora_A]
    x, lora_A = complex_x.conj().imag, [A.conj().imag for A in complex_A]
    assert x.is_neg()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            y = fused_ortho_lora(
                x.requires_grad_(grad) if not grad else x.detach().requires_grad_(),
                lora_A, tensors.lora_B, seed=3, backend=server.backend,
            )  # fmt: skip
        assert torch.equal(y, fused_ortho_lora(*tensors[:3], seed=3, backend=server.backend))


@pytest.mark.parametrize("seed", [0, 5, -5, (1 << 63) - 1, -(1 << 63), (1 << 64) - 1])
def test_seeds_as_ints_and_as_tensors(server: Server, seed: int) -> None:
    tensors = make(CASE, torch.float32)
    signed = seed - (1 << 64) if seed >= 1 << 63 else seed
    outputs = [
        fused_ortho_lora(*tensors[:3], seed=value, backend=server.backend)
        for value in (seed, torch.tensor(signed), torch.tensor([signed]))
    ]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    with_grad = fused_ortho_lora(
        tensors.x.requires_grad_(), *tensors[1:3], seed=seed, backend=server.backend
    )
    assert torch.equal(with_grad, outputs[0])


def test_every_coordinate_matters(server: Server) -> None:
    tensors = make(CASE, torch.float32)

    def call(**place: int) -> torch.Tensor:
        given = {"seed": 1, "sample": 1, **place}
        return fused_ortho_lora(*tensors[:3], **given, backend=server.backend)

    names = ("seed", "stream", "sample", "strata", "row_offset", "col_offset")
    outputs = [call(), *(call(**{name: 2}) for name in names)]
    for i, first in enumerate(outputs):
        for second in outputs[:i]:
            assert not torch.equal(first, second)


def test_autocast(server: Server) -> None:
    """x and base take autocast's dtype, float32 factors stay as they are, gradients return."""
    tensors = make(CASE, torch.float32)
    x, base = tensors.x.clone().requires_grad_(), tensors.base.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = fused_ortho_lora(x, *tensors[1:3], base=base, seed=3, backend=server.backend)
        wide = fused_ortho_lora(
            x.double(), *tensors[1:3], base=base.double(), seed=3, backend=server.backend
        )
    assert y.dtype == torch.bfloat16
    assert wide.dtype == torch.float64
    expected = fused_ortho_lora(
        x.bfloat16(), *tensors[1:3], base=base.bfloat16(), seed=3, backend=server.backend
    )
    assert torch.equal(y, expected)
    y.sum().backward()
    assert x.grad.dtype == base.grad.dtype == torch.float32


def test_a_second_derivative_is_refused(server: Server) -> None:
    tensors = make(CASE, torch.float32)
    x = tensors.x.clone().requires_grad_()
    A = tensors.lora_A[0].clone().requires_grad_()
    y = fused_ortho_lora(
        x, [A, *tensors.lora_A[1:]], tensors.lora_B, seed=3, backend=server.backend
    )
    (grad_x,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        (y.sum() + grad_x.square().sum()).backward()


def test_functional_gradient(server: Server) -> None:
    tensors = make(CASE, torch.float32)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (fused_ortho_lora(x, *tensors[1:3], seed=3, backend=server.backend) ** 2).sum()

    x = tensors.x.clone().requires_grad_()
    loss(x).backward()
    assert torch.equal(torch.func.grad(loss)(tensors.x), x.grad)


def test_forward_mode_is_refused(server: Server) -> None:
    """A tangent is never dropped in silence, without autograd either."""
    tensors = make(CASE, torch.float32)
    with torch.no_grad(), forward_ad.dual_level():
        x = forward_ad.make_dual(tensors.x, torch.ones_like(tensors.x))
        with pytest.raises(RuntimeError, match="jvp"):
            fused_ortho_lora(x, *tensors[1:3], seed=3, backend=server.backend)


def test_inference_mode(server: Server) -> None:
    """Factors that were made in inference mode are packed anew, so their changes are seen."""
    with torch.inference_mode():
        tensors = make(CASE, torch.float32)
        first = fused_ortho_lora(*tensors[:3], seed=3, backend=server.backend)
        tensors.lora_B[0].zero_()
        second = fused_ortho_lora(*tensors[:3], seed=3, backend=server.backend)
        assert not torch.equal(first, second)


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(
    cpu.unavailable() is not None, reason=f"no compiled kernels: {cpu.unavailable()}"
)
@pytest.mark.skipif(available_bytes() < 8 << 30, reason="needs 8 GiB of free memory")
def test_more_than_two_to_the_31_elements() -> None:
    """An output of 2**31 + 2**20 elements: its last rows are as when computed alone."""
    torch.use_deterministic_algorithms(False)  # poisoning 4 GiB adds nothing here
    torch.set_num_threads(2)
    tokens, d_out, tail = (1 << 16) + 32, 1 << 15, 16
    x = torch.tensor([[1.0]]).bfloat16().expand(tokens, 1)
    lora_A = [torch.full((1, 1), 1.0 + j).bfloat16() for j in range(2)]
    lora_B = [torch.arange(d_out).remainder(7).bfloat16()[:, None] + 1 for _ in range(2)]
    y = fused_ortho_lora(x, lora_A, lora_B, seed=3, backend="cpu")
    assert y.numel() > 1 << 31
    last = fused_ortho_lora(
        x[:tail], lora_A, lora_B, seed=3, row_offset=tokens - tail, backend="reference"
    )
    assert torch.equal(y[-tail:], last)
