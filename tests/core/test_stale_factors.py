"""Factors that change without a version counter that moves: every copy of them is made anew."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from packs import NEEDS_KERNELS, count_packs
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from servers import Server
from stale import (
    D_IN,
    D_OUT,
    RANK,
    WRITERS,
    by_torch,
    check_backward_of_its_forward,
    check_module,
    check_op,
    layer_of,
    normal,
)
from torch import Tensor, nn

from lora_ortho import Adapter, FusedOrthoLoRALinear, attach, fused_ortho_lora, inject
from lora_ortho.adapters import LoadedAdapter
from lora_ortho.packing import Stamp


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("which", ["lora_A", "lora_B"])
@pytest.mark.parametrize("trainable", [False, True])
def test_module(server: Server, trainable: bool, which: str, write: Any) -> None:
    check_module(server, trainable, which, write)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_op_forward_and_backward(server: Server, needs_grad: bool, write: Any) -> None:
    check_op(server, needs_grad, write)


def test_backward_goes_with_its_forward(server: Server) -> None:
    """A factor that is written in between by .data: gradients are those of what was computed."""
    check_backward_of_its_forward(server)


def test_a_retained_graph_twice(server: Server) -> None:
    A, B, x = normal(RANK, D_IN), normal(D_OUT, RANK).requires_grad_(), normal(5, D_IN)
    y = fused_ortho_lora(x, [A], [B], seed=0, backend=server.backend).sum()
    first, second = (torch.autograd.grad(y, B, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("write", WRITERS)
def test_injected_layers_and_convolutions(write: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Flatten(), nn.Linear(96, 5))
    parts = {
        "0": Adapter(normal(RANK, 27), normal(6, RANK)),
        "2": Adapter(normal(RANK, 96), normal(5, RANK)),
    }
    one = LoadedAdapter("one", parts, Path("one"), kernels={"0": (3, 3)})
    plain, x = copy.deepcopy(model), normal(2, 3, 4, 4)
    handle = inject(model, [one], seed=0)
    with torch.no_grad():
        model(x)
        for name in parts:
            factors: Any = handle.layers[name].adapters[0]
            for factor in (factors.lora_A, factors.lora_B):
                write(factor, normal(*factor.shape))
            layer: Any = plain.get_submodule(name)
            update = factors.lora_B @ factors.lora_A
            layer.weight += update.view(layer.weight.shape)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)


def peft_model(base: nn.Module | None = None) -> Any:
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], init_lora_weights=False)
    return get_peft_model(base or nn.Sequential(nn.Linear(D_IN, D_OUT)), config)


@pytest.mark.parametrize("write", WRITERS)
def test_attached_layers(write: Any) -> None:
    model, x = peft_model(), normal(5, D_IN)
    layer = model.base_model.model[0]
    for grad in (False, True, False):
        with torch.set_grad_enabled(grad), attach(model, seed=0):
            model(x)
            for part in (layer.lora_A, layer.lora_B):
                weight = part["default"].weight
                write(weight, normal(*weight.shape))
            found = model(x)
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-4)  # PEFT itself


def test_pefts_hot_swap(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(D_IN, D_OUT))
    for name in ("one", "two"):
        model = peft_model(base)
        model.save_pretrained(tmp_path / name)
        base = model.unload()
    model, x = PeftModel.from_pretrained(base, tmp_path / "one").eval(), normal(5, D_IN)
    with torch.no_grad():
        handle = attach(model, seed=0)
        before = model(x)
        hotswap_adapter(model, tmp_path / "two", adapter_name="default", torch_device="cpu")
        after = model(x)
        handle.detach()
        torch.testing.assert_close(after, model(x), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(after, before, atol=1e-2)


def test_diffusers_hot_swap(tmp_path: Path) -> None:
    config = {"target_modules": ["to_q", "to_v"], "init_lora_weights": False}
    for name, rank in (("one", 3), ("two", 4)):
        model: Any = models.unet()
        model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, **config))
        model.save_lora_adapter(tmp_path / name)
    unet: Any = models.unet()
    unet.enable_lora_hotswap(target_rank=4)
    how = {"prefix": None, "weight_name": "pytorch_lora_weights.safetensors"}
    unet.load_lora_adapter(tmp_path / "one", adapter_name="a", use_safetensors=True, **how)
    with torch.no_grad():
        handle = attach(unet, seed=0)
        before = models._run_unet(unet)
        unet.load_lora_adapter(
            tmp_path / "two", adapter_name="a", use_safetensors=True, hotswap=True, **how
        )
        after = models._run_unet(unet)
        handle.detach()
        torch.testing.assert_close(after, models._run_unet(unet), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(after, before, atol=1e-2)


@pytest.mark.parametrize("grad", [False, True])
def test_swapped_tensors(server: Server, grad: bool) -> None:
    """swap_tensors refuses tensors that somebody has a weak reference to."""
    layer, x = layer_of(server.backend, trainable=True), normal(5, D_IN)
    with torch.set_grad_enabled(grad):
        layer(x).detach()
        factors: Any = layer.adapters[0]
        fused_ortho_lora(x, [factors.lora_A], [factors.lora_B], seed=0).detach()
    torch.utils.swap_tensors(factors.lora_B, nn.Parameter(normal(D_OUT, RANK)))
    torch.testing.assert_close(layer(x), by_torch(layer, x), rtol=1e-4, atol=1e-4)


def test_casts_that_swap_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer, x = layer_of(trainable=True), normal(5, D_IN)
        layer(x).detach()
        layer.double()
        torch.testing.assert_close(layer(x.double()), by_torch(layer, x.double()))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_inference_tensors(server: Server) -> None:
    """They count no changes: what holds one is packed in every call."""
    x = normal(5, D_IN)
    with torch.inference_mode():
        model = peft_model()
        layer = model.base_model.model[0]
        fused = layer_of(server.backend)
        fused.adapters[0].lora_B = normal(D_OUT, RANK)
        with attach(model, seed=0, backend=server.backend):
            for _ in range(2):
                torch.testing.assert_close(fused(x), by_torch(fused, x), rtol=1e-4, atol=1e-4)
                fused.adapters[0].lora_B[0, 0] += 5.0  # one element, which no sample need show
                layer.lora_B["default"].weight[0, 0] += 5.0
                found = model(x)
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-4)


@NEEDS_KERNELS
def test_refresh_shows_what_no_check_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """One element of frozen factors, written past its counter."""
    big, x = 512, normal(3, D_IN)
    model = nn.Sequential(nn.Linear(D_IN, big))
    part = Adapter(normal(RANK, D_IN), normal(big, RANK))
    handle = inject(model, [LoadedAdapter("one", {"0": part}, Path("one"))], seed=0)
    layer: Any = handle.layers["0"]
    factors, packs = layer.adapters[0], count_packs(monkeypatch)
    with torch.no_grad():
        model(x)
        seen = 0
        for row in range(big):  # some row is no sample
            factors.lora_B.data[row, 1] += 5.0
            before = len(packs)
            model(x)
            seen += len(packs) - before
        assert seen < big, "every element is compared: refresh has no work left"
        handle.refresh()
        expected = by_weights(model[0], factors, x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def by_weights(layer: Any, factors: Any, x: Tensor) -> Tensor:
    base = nn.functional.linear(x, layer.weight, layer.bias)
    return base + x @ factors.lora_A.T @ factors.lora_B.T


def test_memory_that_another_tensor_took() -> None:
    """The same address once more, after the memory was given back."""
    buffer = bytearray(64)
    tensor = torch.frombuffer(buffer, dtype=torch.float32)
    stamp, address = Stamp([tensor]), tensor.data_ptr()
    assert stamp.matches([tensor])
    tensor.data = torch.frombuffer(buffer, dtype=torch.float32)
    assert tensor.data_ptr() == address
    assert not stamp.matches([tensor])


@NEEDS_KERNELS
@pytest.mark.parametrize("what", ["op", "module", "attach"])
def test_one_element_of_a_trained_factor(what: str) -> None:
    """Where gradients are recorded nothing is compared: everything is packed."""
    big, x = 256, normal(3, D_IN)
    base = nn.Linear(D_IN, big)
    A, B = normal(RANK, D_IN), nn.Parameter(normal(big, RANK))
    if what == "op":
        run: Any = lambda: base(x) + fused_ortho_lora(x, [A], [B], seed=0)  # noqa: E731
    elif what == "module":
        layer = FusedOrthoLoRALinear(base, [Adapter(A, B)], seed=0, trainable=True)
        run = lambda: layer(x)  # noqa: E731
    else:
        model = peft_model(nn.Sequential(base))
        inner = model.base_model.model[0]
        A, B = inner.lora_A["default"].weight, inner.lora_B["default"].weight
        attach(model, seed=0)
        run = lambda: model(x)  # noqa: E731
        base = inner.base_layer
    for row in range(big):
        run()
        B.data[row, 1] += 5.0
        expected = base(x) + x @ A.T @ B.T
        torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-4)


@NEEDS_KERNELS
def test_views_of_one_storage_keep_no_more_than_their_places() -> None:
    """New views of stacked factors at every call: old entries do not pile up."""
    from lora_ortho import packing

    A, B, x = normal(3, RANK, D_IN), normal(3, D_OUT, RANK), normal(2, D_IN)
    for _ in range(20):
        for j in range(3):
            fused_ortho_lora(x, [A[j]], [B[j]], seed=0)
    _, places = packing._storages[id(B.untyped_storage())]
    assert sorted(len(entries) for entries in places.values()) == [1, 1, 1]


@pytest.mark.parametrize("threads", [2, 4])
def test_threads_that_meet_changed_factors(server: Server, threads: int) -> None:
    """Whoever comes second while the first one packs: not the new stamp with the old pack."""
    base = nn.Linear(256, 256).requires_grad_(False)
    pair = [Adapter(normal(32, 256), normal(256, 32)) for _ in range(2)]
    layer = FusedOrthoLoRALinear(base, pair, method="direct", seed=0, backend=server.backend)
    x = normal(4, 256)

    def run(found: list[Tensor]) -> None:
        with torch.no_grad():
            found.append(layer(x))

    for _ in range(20):
        found: list[Tensor] = []
        expected = base(x)
        for factors in layer.adapters:
            factors.lora_B.normal_()
            expected = expected + x @ factors.lora_A.T @ factors.lora_B.T
        running = [threading.Thread(target=run, args=(found,)) for _ in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        for y in found:
            torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-2)
