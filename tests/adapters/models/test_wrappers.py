"""Wrappers change nothing: names, masks, files and what is left after detach."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import lora_ortho
from lora_ortho import Adapter, attach, inject, mask_stream
from lora_ortho.adapters import LoadedAdapter, assign_streams, load_adapter
from lora_ortho.adapters.components import components, named

peft = pytest.importorskip("peft", reason="PEFT is not installed: nothing to attach to")

NAMES = ["down", "inner", "inner.up"]


class Net(nn.Module):
    """8 to 16 to 8 features, one of the layers a level deeper."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"up": nn.Linear(8, 16)})
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.inner["up"](x)))  # type: ignore[no-any-return]


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LAYERS = {"inner.up": (8, 16), "down": (16, 8)}


def base() -> Net:
    torch.manual_seed(0)
    return Net().double().requires_grad_(False).eval()


def factors(name: str, layer: str) -> tuple[Tensor, Tensor]:
    d_in, d_out = LAYERS[layer]
    generator = torch.Generator().manual_seed(len(name) * 7 + len(layer))
    sizes = (4, d_in), (d_out, 4)
    A, B = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return A, B


def loaded() -> list[LoadedAdapter]:
    """Two adapters, "one" and "third", for both layers."""
    return [
        LoadedAdapter(n, {k: Adapter(*factors(n, k), scaling=2.0) for k in LAYERS}, Path(n))
        for n in ("one", "third")
    ]


def peft_model() -> Any:
    """The same adapters as PEFT has them."""
    model: Any = None
    for name in ("one", "third"):
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"])
        if model is None:
            model = peft.get_peft_model(base(), config, name)
        else:
            model.add_adapter(name, config)
    for name in LAYERS:
        layer = model.base_model.model.get_submodule(name)
        for adapter in ("one", "third"):
            A, B = factors(adapter, name)
            layer.lora_A[adapter].weight.data = A
            layer.lora_B[adapter].weight.data = B
    model.base_model.set_adapter(["one", "third"])
    return model.double().eval()


def merged() -> Tensor:
    """The orthogonal merge under seed 0, in plain torch, with streams by the plain names."""
    model, h = base(), X
    streams = assign_streams(["", *NAMES])
    for name in ("inner.up", "down"):
        y = model.get_submodule(name)(h)
        owners = mask_stream.winners(
            0, range(5), range(y.shape[1]), [0.5, 0.5], stream=streams[name]
        )
        for j, adapter in enumerate(("one", "third")):
            A, B = factors(adapter, name)
            y = y + (owners == j) * 2 * 2.0 * (h @ A.T @ B.T)
        h = torch.relu(y) if name == "inner.up" else y
    return h


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def holder(model: nn.Module) -> Any:
    """The parent of the inner layer, in a PEFT model or not."""
    found = next(module for module in model.modules() if isinstance(module, Net))
    return found.inner


def inner(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[Any], Any]:
    """A wrapper around one layer, put where the layer was."""

    def change(model: Any) -> Any:
        holder(model)["up"] = wrap(holder(model)["up"])
        return model

    return change


def around_a_base_layer(model: Any) -> Any:
    up = holder(model)["up"]
    if hasattr(up, "base_layer"):
        up.base_layer = compiled(up.base_layer)
    return model


def fsdp(model: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({nn.ModuleDict}) if type(model) is Net else None,
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


def fsdp2(model: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    fully_shard(holder(model)["up"], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "none": lambda model: model,
    "compile": compiled,
    "compile inside": inner(compiled),
    "compile a base layer": around_a_base_layer,
    "data parallel": nn.DataParallel,
    "distributed": lambda model: nn.parallel.DistributedDataParallel(model.requires_grad_(True)),
    "fsdp": fsdp,
    "fsdp2": fsdp2,
    "checkpoint": checkpoint_wrapper,
    "checkpoint inside": inner(checkpoint_wrapper),
    "two": lambda model: compiled(checkpoint_wrapper(model)),
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model),
}


@pytest.fixture(autouse=True)
def _group(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()
    torch.compiler.reset()


def run(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(X)
    return result


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("how", ["attach", "inject"])
def test_masks_are_those_of_the_plain_names(how: str, wrapper: str) -> None:
    names = ["", *NAMES]
    if how == "attach":
        model = WRAPPERS[wrapper](peft_model())
        assert [entry.name for entry in named(components(model))] == names
        handle: Any = attach(model, seed=0)
    else:
        model = WRAPPERS[wrapper](base())
        assert [entry.name for entry in named(components(model))] == names
        handle = inject(model, loaded(), seed=0)
    with handle:
        torch.testing.assert_close(run(model), merged(), rtol=1e-9, atol=1e-9)
        assert list(handle.layers) == ["down", "inner.up"]
        assert [entry.how in ("fused", "base + delta") for entry in handle.report] == [True, True]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_files(tmp_path: Path, wrapper: str) -> None:
    """An export of the wrapped model fits the plain one, and a file the wrapped one."""
    model = WRAPPERS[wrapper](peft_model())
    lora_ortho.export(model, tmp_path / "out")
    back = peft.PeftModel.from_pretrained(base(), tmp_path / "out")
    torch.testing.assert_close(run(back), run(peft_model()), rtol=1e-9, atol=1e-9)
    found = load_adapter(tmp_path / "out", WRAPPERS[wrapper](base()))
    assert sorted(found.layers) == ["down", "inner.up"]


def with_a_hook(model: Any) -> None:
    holder(model)["up"].register_forward_hook(lambda _, __, output: output + 0)


def with_accelerate(model: Any) -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    hooks.add_hook_to_module(holder(model)["up"], hooks.ModelHook())


def with_a_hook_taken_off(model: Any) -> None:
    """accelerate then leaves the forward that it found as an attribute of the layer."""
    with_accelerate(model)
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    hooks.remove_hook_from_module(holder(model)["up"])


def with_a_compiled_forward(model: Any) -> None:
    up = holder(model)["up"]
    up.forward = torch.compile(up.forward, backend="eager")
    run(model)


def compiled_in_place(model: Any) -> None:
    holder(model)["up"].compile(backend="eager")
    run(model)


def put_around(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        inner(wrap)(model)
        run(model)

    return change


def parametrized(model: Any) -> None:
    """torch derives a class from that of the layer."""
    up = holder(model)["up"]
    nn.utils.parametrize.register_parametrization(
        getattr(up, "base_layer", up), "weight", nn.Identity()
    )


def sharded(model: Any) -> None:
    fsdp2(model)


AFTERWARDS: dict[str, Callable[[Any], None]] = {
    "hook": with_a_hook,
    "accelerate": with_accelerate,
    "accelerate, taken off": with_a_hook_taken_off,
    "compiled forward": with_a_compiled_forward,
    "compile()": compiled_in_place,
    "torch.compile": put_around(compiled),
    "checkpoint": put_around(checkpoint_wrapper),
    "parametrized": parametrized,
    "fully_shard": sharded,
}


@pytest.mark.parametrize("change", AFTERWARDS)
@pytest.mark.parametrize("how", ["attach", "inject"])
def test_detach_leaves_a_model_that_works(how: str, change: str) -> None:
    """Whatever was put on a layer meanwhile: then it counts, and after detach it is plain."""
    model = peft_model() if how == "attach" else base()
    plain = run(model)
    handle: Any = attach(model, seed=0) if how == "attach" else inject(model, loaded(), seed=0)
    expected = run(model)
    AFTERWARDS[change](model)
    torch.testing.assert_close(run(model), expected, rtol=1e-9, atol=1e-9)
    handle.detach()
    assert torch.equal(run(model), plain)
    assert torch.equal(run(model), plain)
    if change == "compiled forward":  # it is there still, in front of every forward of a class
        del holder(model)["up"].forward
    with attach(model, seed=0) if how == "attach" else inject(model, loaded(), seed=0):
        torch.testing.assert_close(run(model), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize("how", ["attach", "inject"])
def test_nothing_is_left(how: str) -> None:
    """Classes, attributes, children and hooks are those of before, also in a copy."""
    model = peft_model() if how == "attach" else base()

    def state(of: nn.Module) -> list[Any]:
        return [
            (n, type(m), sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks))
            for n, m in of.named_modules()
        ]

    before = state(model)
    handle: Any = attach(model, seed=0) if how == "attach" else inject(model, loaded(), seed=0)
    twin = copy.deepcopy(model)
    handle.detach()
    assert state(model) == before
    assert lora_ortho.detach(twin) == 2
    assert state(twin) == before
    assert lora_ortho.detach(twin) == 0
    assert torch.equal(run(twin), run(model))


def test_inject_twice_says_how() -> None:
    """As a cell of a notebook that is run again."""
    model = base()
    plain = run(model)
    inject(model, loaded())
    with pytest.raises(ValueError, match=r"adapted already; detach it first, .*detach\(model\)"):
        inject(model, loaded())
    assert lora_ortho.detach(model) == 2
    assert torch.equal(run(model), plain)
    inject(model, loaded()).detach()
