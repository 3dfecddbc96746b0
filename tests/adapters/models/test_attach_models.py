"""attach on language models, a UNet and a Flux transformer: against PEFT and against itself."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch
from models import NAMES, SUBJECTS, Subject, adapted, layers_of, library, pipeline
from torch import Tensor, nn

import lora_ortho
from lora_ortho.adapters.models.convolution import selectors

THREE = ("plain", "rslora", "offset")


@pytest.fixture(params=NAMES)
def subject(request: pytest.FixtureRequest) -> Subject:
    return SUBJECTS[request.param]


def tensors_of(model: nn.Module) -> list[tuple[str, int, int]]:
    """Names, identity and version of everything in the state_dict."""
    return [(name, t.data_ptr(), t._version) for name, t in model.state_dict().items()]


def inputs_of(subject: Subject, model: nn.Module, *names: str) -> dict[str, Tensor]:
    """What arrives at layers of PEFT during one forward of the model."""
    found: dict[str, Tensor] = {}
    layers = layers_of(model)
    hooks = [
        layers[name].register_forward_pre_hook(
            lambda _, args, name=name: found.__setitem__(name, args[0].detach())
        )
        for name in names
    ]
    subject.run(model)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def test_attach_run_detach_leaves_no_trace(subject: Subject) -> None:
    model = adapted(subject, *THREE)
    before, kinds = tensors_of(model), {n: type(m) for n, m in model.named_modules()}
    attributes = {name: set(layer.__dict__) for name, layer in layers_of(model).items()}
    expected = subject.run(model)
    with lora_ortho.attach(model, seed=3) as handle:
        assert list(handle.layers) == sorted(layers_of(model))
        assert not torch.equal(subject.run(model), expected)
        assert tensors_of(model) == before
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    assert {name: set(layer.__dict__) for name, layer in layers_of(model).items()} == attributes
    assert tensors_of(model) == before
    assert torch.equal(subject.run(model), expected)


@torch.no_grad()
def test_direct_is_what_peft_computes(subject: Subject) -> None:
    """In float64, to rounding; with several kinds of adapters and unequal ranks at once."""
    model = adapted(subject, *THREE, "patterns")
    expected = subject.run(model)
    bare = subject.run(subject.make())
    with lora_ortho.attach(model, method="direct"):
        ours = subject.run(model)
    assert float((expected - bare).abs().max()) > 1e-2 * float(bare.abs().max())
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@torch.no_grad()
def test_orthogonal_averages_to_direct(subject: Subject) -> None:
    """A layer at a time, since a model is not linear: z-scores over 1000 draws."""
    draws = 1000
    model = adapted(subject, *THREE)
    names = [name for name in (subject.layer, subject.convolution) if name is not None]
    inputs = inputs_of(subject, model, *names)
    for name, x in inputs.items():
        x = x[:1, :, :3, :3] if name == subject.convolution else x.reshape(-1, x.shape[-1])[:2]
        layer = layers_of(model)[name]
        expected = layer(x)
        base = layer.base_layer(x)
        with lora_ortho.attach(model, seed=9) as handle:
            total, squares = torch.zeros_like(expected), torch.zeros_like(expected)
            for sample in range(draws):
                handle.set(sample=sample)
                share = layer(x) - base
                total += share
                squares += share.square()
        mean = total / draws
        spread = ((squares / draws - mean.square()).clamp_min(0) / draws).sqrt()
        assert bool((spread > 0).all())
        z = float(((mean - (expected - base)) / spread).abs().max())
        assert z < 5.5, f"{name}: z = {z:.2f}"


@torch.no_grad()
def test_masks_are_those_of_the_layer_alone(subject: Subject) -> None:
    """Adapters on other layers change nothing; the names are those of the model without PEFT."""
    model = adapted(subject, *THREE)
    names = [name for name in (subject.layer, subject.convolution) if name is not None]
    inputs = inputs_of(subject, model, *names)
    with lora_ortho.attach(model, seed=2) as handle:
        together = {name: layers_of(model)[name](inputs[name]) for name in names}
        streams = {entry.name: entry.stream for entry in handle.report}
    for name in names:
        one = Subject(subject.make, subject.run, (name,), name)
        alone = adapted(one, *THREE)
        assert list(layers_of(alone)) == [name]
        with lora_ortho.attach(alone, seed=2) as handle:
            assert torch.equal(layers_of(alone)[name](inputs[name]), together[name])
        assert streams[name] == zlib.crc32(name.encode()) == handle.report[0].stream


@torch.no_grad()
def test_masks_are_those_of_the_op(subject: Subject) -> None:
    """Element for element: a layer's output is fused_ortho_lora's for its name's stream."""
    model = adapted(subject, *THREE)
    (x,) = inputs_of(subject, model, subject.layer).values()
    layer = layers_of(model)[subject.layer]
    parts = [(layer.lora_A[n].weight, layer.lora_B[n].weight) for n in ("plain", "rslora")]
    model.base_model.set_adapter(["plain", "rslora"])
    with lora_ortho.attach(model, seed=4, p=[0.4, 0.6], weights=[0.5, 2.0]):
        ours = layer(x)
    expected = lora_ortho.fused_ortho_lora(
        x,
        [A for A, _ in parts],
        [B for _, B in parts],
        p=[0.4, 0.6],
        weights=[0.5, 2.0],
        scaling=[5 / 3, 3 / 2],
        base=layer.base_layer(x),
        seed=4,
        stream=zlib.crc32(subject.layer.encode()),
        backend="reference",
    )
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_masks_of_a_convolution_are_those_of_its_places() -> None:
    """Row (n, h, w), column channel; at most one adapter everywhere."""
    subject = SUBJECTS["unet"]
    name = subject.convolution
    assert name is not None
    model = adapted(subject, "plain", "rslora")
    x = inputs_of(subject, model, name)[name]
    layer = layers_of(model)[name]
    single = []
    for kind in ("plain", "rslora"):
        model.base_model.set_adapter([kind])
        single.append(layer(x) - layer.base_layer(x))
    model.base_model.set_adapter(["plain", "rslora"])
    with lora_ortho.attach(model, seed=6):
        ours = layer(x) - layer.base_layer(x)
    n, channels, height, width = ours.shape
    owner = lora_ortho.mask_stream.winners(
        6, range(n * height * width), range(channels), [0.5, 0.5], stream=zlib.crc32(name.encode())
    )
    owner = owner.view(n, height, width, channels).movedim(-1, 1)
    expected = sum(torch.where(owner == j, 2 * delta, 0.0) for j, delta in enumerate(single))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_pipeline() -> None:
    """All its parts; a part's masks are those it has alone; scale changes of set_adapters count."""
    peft = library("peft")
    pipe, subject = pipeline(), SUBJECTS["unet"]
    targets = {"unet": ["to_q", "conv1"], "text_encoder": ["q_proj"], "text_encoder_2": ["q_proj"]}
    for name in ("one", "two"):
        for part, modules in targets.items():
            getattr(pipe, part).add_adapter(peft.LoraConfig(r=2, target_modules=modules), name)
    from models import fill

    for part in targets:
        fill(getattr(pipe, part))
    pipe.set_adapters(["one", "two"], [1.0, 0.5])
    expected = subject.run(pipe.unet)
    with lora_ortho.attach(pipe, method="direct") as handle:
        assert {name.split(".")[0] for name in handle.layers} == set(targets)
        torch.testing.assert_close(subject.run(pipe.unet), expected, rtol=1e-9, atol=1e-9)
        pipe.set_adapters(["one", "two"], [0.25, -2.0])
        ours = subject.run(pipe.unet)
        handle.set(method="orthogonal", seed=1)
        merged = subject.run(pipe.unet)
    other = subject.run(pipe.unet)
    torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(ours, expected)
    with lora_ortho.attach(pipe.unet, seed=1):
        assert torch.equal(subject.run(pipe.unet), merged)
    assert torch.equal(subject.run(pipe.unet), other)
    streams = [entry.stream for entry in handle.report]
    assert len(set(streams)) == len(streams)


@torch.no_grad()
@pytest.mark.parametrize("how", ["attach", "inject"])
def test_exported_and_traced(how: str) -> None:
    """A program of torch.export and a trace give the same; the model itself works afterwards."""
    from peft_models import X, make

    model: Any = make(r=7 if how == "attach" else 9)  # ranks that nothing was made for before
    if how == "attach":
        handle: Any = lora_ortho.attach(model, seed=1)
    else:
        loaded = lora_ortho.adapters.adapters_of(model)
        model = model.unload()
        handle = lora_ortho.inject(model, loaded, seed=1)
    with handle:
        programs = [torch.export.export(model, (X,), strict=False)]
        if torch.__version__.startswith("2.8."):  # whose strict export takes no model with a hook
            model(X)  # the first pass, after which ours is gone
        programs.append(torch.export.export(model, (X,), strict=True))
        trace: Any = torch.jit.trace
        traced = trace(model, X, check_trace=False)
        expected = model(X)
        for found in (*(program.module() for program in programs), traced):
            assert torch.equal(found(X), expected)


def test_what_is_made_while_tracing_is_not_kept() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    sizes = ((2, 5), torch.float32, torch.device("cpu"))
    with FakeTensorMode():
        assert type(selectors(*sizes)[0]) is not Tensor
    assert type(selectors(*sizes)[0]) is Tensor
    assert selectors(*sizes) is selectors(*sizes)
