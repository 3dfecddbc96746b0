"""Weights that are elsewhere between calls: accelerate's and diffusers' offloading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SUBJECTS, fill, library
from peft_models import Small, X, make
from torch import Tensor, nn

import lora_ortho
from lora_ortho import attach, inject
from lora_ortho.adapters import adapters_of

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

OFFLOADS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "cpu_offload": lambda model, _: accelerate.cpu_offload(model, execution_device="cpu"),
    "with buffers": lambda model, _: accelerate.cpu_offload(
        model, execution_device="cpu", offload_buffers=True
    ),
    "disk_offload": lambda model, path: accelerate.disk_offload(
        model, str(path / "disk"), execution_device="cpu"
    ),
    "dispatch_model": lambda model, _: accelerate.dispatch_model(
        model, {"": "cpu"}, main_device="cpu", force_hooks=True
    ),
    "whole blocks": lambda model, _: accelerate.cpu_offload(
        model, execution_device="cpu", preload_module_classes=["Small"]
    ),
}


def model_for(how: str, **fields: Any) -> Any:
    """Small with two adapters by PEFT, or the same base without."""
    model = make(**fields)
    return model if how == "attach" else model.unload()


def put(how: str, model: Any, **fields: Any) -> Any:
    if how == "attach":
        return attach(model, seed=0)
    return inject(model, adapters_of(make(**fields)), seed=0)


def run(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(X)
    return result


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("how", ["attach", "inject"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_offloaded_models(tmp_path: Path, order: str, how: str, offload: str) -> None:
    """Linear layers and a convolution, twice, with and without gradients; then plain again."""
    model = model_for(how)
    plain = run(model)
    with put(how, model):
        expected = run(model)
    assert not torch.allclose(expected, plain)
    model = model_for(how)
    if order == "before":
        OFFLOADS[offload](model, tmp_path)
        handle = put(how, model)
    else:
        handle = put(how, model)
        OFFLOADS[offload](model, tmp_path)
    for _ in range(2):
        torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(X).detach(), expected, rtol=1e-5, atol=1e-5)
    assert [entry.name for entry in handle.report] == ["down", "image", "up"]
    handle.detach()
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize("how", ["attach", "inject"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_offloading_may_end_first(order: str, how: str) -> None:
    """The hooks are taken off while the adapters are there: they stay, and go as ever."""
    model = model_for(how)
    plain = run(model)
    handle = None if order == "before" else put(how, model)
    accelerate.cpu_offload(model, execution_device="cpu")
    if handle is None:
        handle = put(how, model)
    expected = run(model)
    assert not torch.allclose(expected, plain)
    accelerate.hooks.remove_hook_from_submodules(model)
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-5)
    handle.detach()
    assert torch.equal(run(model), plain)


def test_biases_of_offloaded_adapters() -> None:
    """lora_bias: asked of the module, as its weight is."""
    fields: dict[str, Any] = {"lora_bias": True, "target_modules": ["up"]}
    model = make(**fields)
    with attach(model, seed=0):
        expected = run(model)
    with attach(model, seed=0):
        accelerate.cpu_offload(model, execution_device="cpu")
        torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_hooked_adapters() -> None:
    """A hook on an adapter's own layer is called, and lets gradients through."""
    model, hooked = make(), make()
    seen: list[Tensor] = []
    for name, module in hooked.named_modules():
        if name.endswith(("lora_A.one", "lora_B.two")):
            module.register_forward_hook(lambda _, __, output: seen.append(output))
    found = []
    for each in (model, hooked):
        with attach(each, seed=0):
            each(X).sum().backward()
        gradients = {n: p.grad for n, p in each.named_parameters() if p.grad is not None}
        found.append(gradients)
    assert seen
    assert list(found[0]) == list(found[1])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-4, msg=name)


def test_weights_that_are_nowhere() -> None:
    model = Small().to("meta")
    with pytest.raises(ValueError, match="layer down is on the meta device; load its weights"):
        put("inject", model)


def _unet(adapters: bool) -> Any:
    peft = library("peft")
    unet: Any = SUBJECTS["unet"].make().float()
    if adapters:
        for name in ("one", "two"):
            unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "conv1"]), name)
        fill(unet)
        unet.set_adapters(["one", "two"])
    return unet


def _run_unet(unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    sizes = ((2, 4, 8, 8), (2, 5, 24), (2, 16), (2, 6))
    x, text, pooled, ids = (torch.randn(size, generator=generator) for size in sizes)
    conditions = {"text_embeds": pooled, "time_ids": ids}
    with torch.no_grad():
        result: Tensor = unet(x, torch.tensor(7), text, added_cond_kwargs=conditions).sample
    return result


def _in_float8(unet: Any) -> None:
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def _adapters_in_float8(unet: Any) -> None:
    """Those of PEFT are stored so too, where nobody leaves them out."""
    hooks = library("diffusers.hooks")
    hooks.apply_layerwise_casting(
        unet, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=("norm",)
    )


def _in_groups(unet: Any) -> None:
    cpu = torch.device("cpu")
    unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


@pytest.mark.parametrize(
    ("how", "change"),
    [
        ("attach", _in_float8),
        ("inject", _in_float8),
        ("attach", _adapters_in_float8),
        ("attach", _in_groups),
        ("inject", _in_groups),
    ],
)
@pytest.mark.parametrize("order", ["before", "after"])
def test_hooks_of_diffusers(order: str, how: str, change: Callable[[Any], None]) -> None:
    """Base weights in float8 or moved at each call; what is expected is diffusers with PEFT."""
    attached = how == "attach"
    right, plain = _unet(adapters=True), _unet(adapters=attached)
    loaded = adapters_of(right)
    change(right)
    change(plain)
    expected, bare = _run_unet(right), _run_unet(plain)
    unet = _unet(adapters=attached)
    if order == "before":
        change(unet)
    if attached:
        handle: Any = attach(unet, method="direct")
    else:
        handle = inject(unet, loaded, method="direct")
    if order == "after":
        change(unet)
    for _ in range(2):
        torch.testing.assert_close(_run_unet(unet), expected, rtol=1e-4, atol=1e-4)
    handle.detach()
    assert torch.equal(_run_unet(unet), bare)
    assert lora_ortho.detach(unet) == 0
