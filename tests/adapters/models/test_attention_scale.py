"""The scale that diffusers' models take at a call reaches injected adapters."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SUBJECTS, fill, library, pipeline
from torch import Tensor, nn

import lora_ortho
from lora_ortho import attach, inject
from lora_ortho.adapters import adapters_of
from lora_ortho.adapters.models.attention_scale import argument_of

ARGUMENTS = {"unet": "cross_attention_kwargs", "flux": "joint_attention_kwargs"}
TARGETS = ["to_q", "to_v", "proj_out"]


def adapted(kind: str) -> Any:
    """A model of diffusers with two adapters, loaded as its pipelines do."""
    peft = library("peft")
    model: Any = SUBJECTS[kind].make()
    for name in ("one", "two"):
        model.add_adapter(peft.LoraConfig(r=2, target_modules=TARGETS), name)
    fill(model)
    model.set_adapters(["one", "two"])
    return model.double()


def run(kind: str, model: Any, scale: float | None) -> Tensor:
    """The subject's forward, with a scale."""
    given = {} if scale is None else {ARGUMENTS[kind]: {"scale": scale}}

    class WithScale:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return model(*args, **kwargs, **given)

    with torch.no_grad():
        return SUBJECTS[kind].run(WithScale())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ARGUMENTS)
@pytest.mark.parametrize("method", ["direct", "orthogonal"])
def test_as_with_peft(kind: str, method: str) -> None:
    """Each call has its own scale; one without has none."""
    model = adapted(kind)
    loaded, bare = adapters_of(model), SUBJECTS[kind].make()
    scales = (None, 0.5, None, 0.0, -2.0, 1.0, None)
    expected = [run(kind, model, scale) for scale in scales]
    if method == "orthogonal":  # as attach has it, where PEFT's layers hear of the scale
        with attach(model, seed=3):
            expected = [run(kind, model, scale) for scale in scales]
    with inject(bare, loaded, seed=3, method=method) as handle:
        weights = {name: layer.weights for name, layer in handle.layers.items()}
        for scale, right in zip(scales, expected, strict=True):
            torch.testing.assert_close(run(kind, bare, scale), right, rtol=1e-9, atol=1e-9)
            assert {name: layer.weights for name, layer in handle.layers.items()} == weights
    assert not torch.allclose(expected[0], expected[1])
    assert not bare._forward_hooks
    assert not bare._forward_pre_hooks


def test_after_an_error() -> None:
    """A pass that fails leaves the weights as they were."""
    model = adapted("unet")
    loaded, bare = adapters_of(model), SUBJECTS["unet"].make()
    with inject(bare, loaded, seed=3) as handle:
        expected = run("unet", bare, None)
        inside = bare.get_submodule("conv_out")
        hook = inside.register_forward_pre_hook(lambda _, __: (_ for _ in ()).throw(KeyError))
        with pytest.raises(KeyError):
            run("unet", bare, 0.5)
        hook.remove()
        assert all(layer.weights == [1.0, 1.0] for layer in handle.layers.values())
        assert torch.equal(run("unet", bare, None), expected)


def test_after_an_interruption() -> None:
    """torch calls no hooks after Ctrl-C; the next call has its own scale all the same."""
    model = adapted("unet")
    loaded, bare = adapters_of(model), SUBJECTS["unet"].make()

    def interrupt(*_: Any) -> None:
        hook.remove()
        raise KeyboardInterrupt

    with inject(bare, loaded, method="direct") as handle:
        for weights in ([1.0, 1.0], [2.0, -1.0]):
            model.set_adapters(["one", "two"], weights)
            hook = bare.get_submodule("conv_out").register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                run("unet", bare, 0.5)
            handle.set(weights=weights)
            for scale in (None, 0.25, None):
                expected = run("unet", model, scale)
                torch.testing.assert_close(run("unet", bare, scale), expected, rtol=1e-9, atol=1e-9)
                assert all(layer.weights == weights for layer in handle.layers.values())


def test_settings_changed_during_a_call() -> None:
    """They stay, and the scale of the call counts besides."""
    model = adapted("unet")
    loaded, bare = adapters_of(model), SUBJECTS["unet"].make()
    model.set_adapters(["one", "two"], [2.0, -1.0])
    with inject(bare, loaded, method="direct") as handle:
        hook = bare.get_submodule("conv_in").register_forward_pre_hook(
            lambda *_: (handle.set(weights=[2.0, -1.0]), None)[1]
        )
        for scale in (0.5, None):
            expected = run("unet", model, scale)
            torch.testing.assert_close(run("unet", bare, scale), expected, rtol=1e-9, atol=1e-9)
        hook.remove()
        assert all(layer.weights == [2.0, -1.0] for layer in handle.layers.values())


def test_weights_of_the_handle_count_besides() -> None:
    model = adapted("unet")
    loaded, bare = adapters_of(model), SUBJECTS["unet"].make()
    model.set_adapters(["one", "two"], [2.0, -1.0])
    expected = run("unet", model, 0.5)
    with inject(bare, loaded, method="direct") as handle:
        handle.set(weights=[2.0, -1.0])
        torch.testing.assert_close(run("unet", bare, 0.5), expected, rtol=1e-9, atol=1e-9)
        assert all(layer.weights == [2.0, -1.0] for layer in handle.layers.values())


def test_compiled() -> None:
    model = adapted("flux")
    loaded, bare = adapters_of(model), SUBJECTS["flux"].make()
    torch.compiler.reset()
    with inject(bare, loaded, seed=3):
        expected = run("flux", bare, 0.5)
        compiled = torch.compile(bare, backend="eager")
        torch.testing.assert_close(run("flux", compiled, 0.5), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            run("flux", compiled, None), run("flux", bare, None), rtol=1e-9, atol=1e-9
        )


def test_text_encoders_are_not_told() -> None:
    """diffusers scales them before their call, by PEFT's layers: refused, not ignored."""
    peft, pipe = library("peft"), pipeline()
    for part, target in (("unet", "to_q"), ("text_encoder", "q_proj")):
        getattr(pipe, part).add_adapter(peft.LoraConfig(r=2, target_modules=[target]), "x")
    loaded = adapters_of(pipe, ["x"])
    pipe.unload_lora_weights()
    reason = "does not reach the adapters of text_encoder.*, which diffusers would scale too"
    with inject(pipe, loaded):
        run("unet", pipe.unet, None)
        run("unet", pipe.unet, 1.0)
        with pytest.raises(ValueError, match=f"cross_attention_kwargs: a scale of 0.5 {reason}"):
            run("unet", pipe.unet, 0.5)
    run("unet", pipe.unet, 0.5)
    only = {n: p for n, p in loaded[0].layers.items() if n.startswith("text_encoder")}
    with (
        inject(pipe, [lora_ortho.adapters.LoadedAdapter("x", only, loaded[0].source)]),
        pytest.raises(ValueError, match=reason),
    ):
        run("unet", pipe.unet, 0.5)


def test_every_model_that_scales_is_known() -> None:
    """By the text of diffusers: the classes whose forward scales PEFT's layers."""
    diffusers = library("diffusers")
    folder = Path(inspect.getfile(diffusers)).parent / "models"
    scaling = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                for part in node.body:
                    if isinstance(part, ast.FunctionDef) and part.name == "forward":
                        text = ast.unparse(part)
                        if "apply_lora_scale(" in text or "scale_lora_layers(self" in text:
                            scaling.add(node.name)
    known = set()
    for info in pkgutil.walk_packages([str(folder)], "diffusers.models."):
        if "flax" in info.name:
            continue
        module = importlib.import_module(info.name)
        for name, kind in vars(module).items():
            if isinstance(kind, type) and issubclass(kind, nn.Module) and name in scaling:
                made = kind.__new__(kind)
                nn.Module.__init__(made)
                if argument_of(made) is not None:
                    known.add(name)
    assert len(scaling) >= 3
    assert known == scaling
