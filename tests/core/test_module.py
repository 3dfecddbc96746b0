"""FusedOrthoLoRALinear as a drop-in for nn.Linear."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from cases import METHODS, make
from layers import CASE, both_ways, build, by_op, changed_in_place
from numerics import assert_one
from servers import Server
from torch import Tensor, nn
from torch.autograd import forward_ad

from lora_ortho import Adapter, FusedOrthoLoRALinear, fused_ortho_lora, mask_stream


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trainable", [False, True])
def test_it_is_the_op_on_the_base(server: Server, trainable: bool, method: str) -> None:
    module, x, adapters = build(
        method=method, trainable=trainable, stream=9, backend=server.backend
    )
    expected = by_op(module, x, adapters).detach()
    assert torch.equal(both_ways(module, x), expected)


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3), (2, 0)], ids=str)
def test_leading_dimensions(server: Server, lead: tuple[int, ...]) -> None:
    module, _, adapters = build(backend=server.backend)
    x = torch.randn(*lead, 16)
    found = both_ways(module, x)
    assert found.shape == (*lead, 40)
    assert torch.equal(found, by_op(module, x, adapters).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_adapter_bias_is_masked_with_the_adapter(
    server: Server, method: str, dtype: torch.dtype
) -> None:
    """base + Σ gain_j m_j (B_j A_j x + b_j), against float64 and plain torch in the same dtype."""
    module, x, adapters = build(dtype, bias=True, method=method, backend=server.backend)
    thresholds, keep = mask_stream.thresholds([2 / 3] * 3, method)
    masks = mask_stream.masks(7, range(6), range(40), thresholds, method)

    def written_out(wide: torch.dtype, absolute: bool = False) -> Tensor:
        def of(tensor: Tensor) -> Tensor:
            return tensor.detach().to(wide).abs() if absolute else tensor.detach().to(wide)

        y = of(module.base(x))
        for adapter, mask, q in zip(adapters, masks, keep, strict=True):
            delta = of(x) @ of(adapter.lora_A).T @ of(adapter.lora_B).T
            delta = delta if adapter.bias is None else delta + of(adapter.bias)
            gain = adapter.weight * adapter.scaling / q
            y = y + delta * mask * (abs(gain) if absolute else gain)
        return y

    exact, terms = written_out(torch.float64), written_out(torch.float64, absolute=True)
    assert_one("y", both_ways(module, x), exact, written_out(dtype), terms)


def test_adapter_bias_learns(server: Server) -> None:
    module, x, _ = build(bias=True, method="direct", trainable=True, backend=server.backend)
    module(x).sum().backward()
    for factors, scale in zip(module.adapters, [0.5 * 1.5, None, 2.5 * -0.5], strict=True):
        assert factors.lora_A.grad.shape == (4, 16)
        assert factors.lora_B.grad.shape == (40, 4)
        if scale is not None:
            torch.testing.assert_close(factors.bias.grad, torch.full((40,), 6 * scale))


def test_a_fresh_seed_at_every_call(server: Server) -> None:
    module, x, _ = build(seed=None, backend=server.backend)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.manual_seed(1)
            first, second = module(x), module(x)
            torch.manual_seed(1)
            assert torch.equal(module(x), first)
            assert not torch.equal(first, second)


def test_a_fixed_seed_leaves_the_generator_alone() -> None:
    module, x, _ = build()
    before = torch.get_rng_state()
    assert torch.equal(module(x), module(x))
    assert torch.equal(torch.get_rng_state(), before)


def test_eval_does_not_switch_masks_off_but_method_does(server: Server) -> None:
    module, x, adapters = build(backend=server.backend)
    masked = both_ways(module, x)
    assert torch.equal(both_ways(module.eval(), x), masked)
    module.method = "direct"
    direct = both_ways(module, x)
    assert torch.equal(direct, by_op(module, x, adapters).detach())
    assert not torch.equal(direct, masked)
    module.method = "orthogonal"
    assert torch.equal(both_ways(module, x), masked)


def test_stream_sample_and_weights_may_be_set(server: Server) -> None:
    module, x, adapters = build(backend=server.backend)
    seen = [both_ways(module, x)]
    module.stream = 4
    seen.append(both_ways(module, x))
    module.sample = 5
    seen.append(both_ways(module, x))
    assert torch.equal(seen[-1], by_op(module, x, adapters, sample=5).detach())
    module.weights = [0.0, 0.0, 0.0]
    assert torch.equal(both_ways(module, x), module.base(x).detach())
    assert module.weights == [0.0] * 3
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("trainable", [False, True])
def test_state_dict_round_trips(trainable: bool) -> None:
    module, x, _ = build(trainable=trainable, bias=True)
    buffer = io.BytesIO()
    both_ways(module, x)
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other = build(trainable=not trainable, bias=True)[0]
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(both_ways(other, x), both_ways(module, x))
    names = {name for name, _ in module.named_parameters()}
    assert names == (set(module.state_dict()) if trainable else {"base.weight", "base.bias"})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_moves_between_dtypes(server: Server, dtype: torch.dtype) -> None:
    module, x, adapters = build(trainable=True, backend=server.backend)
    both_ways(module, x)
    module.to(dtype)
    adapters = [
        Adapter(a.lora_A.to(dtype), a.lora_B.to(dtype), a.scaling, a.weight) for a in adapters
    ]
    x = x.detach().to(dtype)
    found = both_ways(module, x)
    assert found.dtype == dtype
    assert torch.equal(found, by_op(module, x, adapters).detach())


class Halves(nn.Module):
    """A base of its own kind: it computes in bfloat16 whatever comes in, and keeps its output."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 16, 40
        self.kept = torch.randn(6, 40).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.kept


def test_any_base_is_called_as_it_is(server: Server) -> None:
    """x is cast to what base gives; the output of a foreign base is not written over."""
    tensors = make(CASE, torch.float32)
    adapters = [Adapter(A, B) for A, B in zip(*tensors[1:3], strict=True)]
    base = Halves()
    before = base.kept.clone()
    module = FusedOrthoLoRALinear(base, adapters, seed=7, backend=server.backend)
    expected = fused_ortho_lora(
        tensors.x.bfloat16(), *tensors[1:3], base=before, seed=7, backend=server.backend
    )
    assert torch.equal(both_ways(module, tensors.x), expected)
    assert torch.equal(both_ways(module, tensors.x.bfloat16()), expected.detach())
    assert torch.equal(base.kept, before)


class Zeros(nn.Module):
    """A base whose output has the dtype of its input."""

    in_features, out_features = 16, 40

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], 40)


def test_dtypes_may_change_from_call_to_call(server: Server) -> None:
    tensors = make(CASE, torch.float32)
    adapters = [Adapter(A, B) for A, B in zip(*tensors[1:3], strict=True)]
    module = FusedOrthoLoRALinear(Zeros(), adapters, seed=7, backend=server.backend)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        x = tensors.x.to(dtype)
        expected = fused_ortho_lora(x, *tensors[1:3], seed=7, backend=server.backend)
        assert torch.equal(both_ways(module, x.clone()), expected)


def test_forward_mode_is_refused() -> None:
    """Though autograd is off, the tangent is not dropped in silence."""
    module, x, _ = build()
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        module(forward_ad.make_dual(x, torch.ones_like(x)))


def test_hooks_see_the_output_of_the_base_unchanged(server: Server) -> None:
    module, x, _ = build(backend=server.backend)
    kept = []
    module.base.register_forward_hook(lambda _, __, output: kept.append(output))
    with torch.no_grad():
        y = module(x)
        assert torch.equal(kept[0], nn.functional.linear(x, module.weight, module.bias))
    assert not torch.equal(y, kept[0])


def test_functional_call_uses_other_tensors(server: Server) -> None:
    module, x, adapters = build(trainable=True, backend=server.backend)
    other = {name: p.detach() * 2 for name, p in module.named_parameters()}
    expected = copy.deepcopy(module)
    expected.load_state_dict(other)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found = torch.func.functional_call(module, other, (x,))
            assert torch.equal(found, expected(x))
    assert torch.equal(both_ways(module, x), by_op(module, x, adapters).detach())


def test_autocast(server: Server) -> None:
    module, x, adapters = build(backend=server.backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = both_ways(module, x)
        base = module.base(x)
    assert found.dtype == torch.bfloat16
    expected = fused_ortho_lora(
        x.detach().bfloat16(),
        [a.lora_A for a in adapters],
        [a.lora_B for a in adapters],
        scaling=[a.scaling for a in adapters],
        weights=[a.weight for a in adapters],
        base=base.detach(),
        seed=7,
        backend=server.backend,
    )
    assert torch.equal(found, expected)


def test_gradients_reach_base_adapters_and_input(server: Server) -> None:
    module, x, _ = build(trainable=True, backend=server.backend)
    x.requires_grad_()
    module(x).square().sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
    frozen, x, _ = build(backend=server.backend)
    assert [name for name, _ in frozen.named_parameters()] == ["base.weight", "base.bias"]


def test_made_in_inference_mode() -> None:
    with torch.inference_mode():
        module, x, _ = build()
        before = module(x)
        changed_in_place(module)
        assert not torch.equal(module(x), before)


def test_it_looks_like_a_linear() -> None:
    module, _, _ = build(seed=None, stream=5)
    assert (module.in_features, module.out_features) == (16, 40)
    assert module.weight is module.base.weight
    assert module.bias is module.base.bias
    text = repr(module)
    for part in ("in_features=16, out_features=40", "ranks=(4, 4, 4)", "method='orthogonal'",
                 "seed=None", "stream=5", "names=(style 0, style 1, style 2)"):  # fmt: skip
        assert part in text


def test_default_rates_count_the_adapters() -> None:
    """Adapters without a rate take 1 - 1/K; given ones keep theirs."""
    tensors = make(CASE, torch.float32)
    pairs = list(zip(*tensors[1:3], strict=True))
    module = FusedOrthoLoRALinear(
        nn.Linear(16, 40), [Adapter(*pairs[0], p=0.9), *(Adapter(*pair) for pair in pairs[1:])],
        seed=3,
    )  # fmt: skip
    expected = fused_ortho_lora(
        *tensors[:3], p=[0.9, 2 / 3, 2 / 3], base=module.base(tensors.x), seed=3
    )
    assert torch.equal(both_ways(module, tensors.x), expected.detach())
