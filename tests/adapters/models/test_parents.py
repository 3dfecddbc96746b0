"""Layers that nobody calls: known parents are refused or skipped, others reported after a pass."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SUBJECTS, library
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from lora_ortho import Adapter, attach, inject
from lora_ortho.adapters import LoadedAdapter
from lora_ortho.adapters.models.parents import READERS

peft = pytest.importorskip("peft", reason="PEFT is not installed: nothing to attach to")


def adapter(model: nn.Module, *names: str) -> LoadedAdapter:
    """Random factors for layers of a model."""
    parts = {}
    for name in names:
        layer: Any = model.get_submodule(name)
        generator = torch.Generator().manual_seed(len(name))
        d_out, d_in = layer.weight.shape
        A = torch.randn(2, d_in, generator=generator, dtype=layer.weight.dtype)
        B = torch.randn(d_out, 2, generator=generator, dtype=layer.weight.dtype)
        parts[name] = Adapter(A, B, name="x")
    return LoadedAdapter("x", parts, Path("x"))


def adapted(model: nn.Module, *names: str) -> Any:
    """A PeftModel with an adapter on those layers, which does something."""
    config = peft.LoraConfig(r=2, target_modules=list(names), init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config).eval()


def attention() -> nn.Module:
    return nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, batch_first=True), "b": nn.Linear(8, 8)})


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    return nn.ModuleDict({"a": layer, "b": nn.Linear(8, 8)})


def decoder() -> nn.Module:
    return nn.ModuleDict({"a": nn.TransformerDecoderLayer(8, 2, 16), "b": nn.Linear(8, 8)})


def wavlm() -> nn.Module:
    module = library("transformers.models.wavlm.modeling_wavlm")
    return nn.ModuleDict({"a": module.WavLMAttention(8, 2), "b": nn.Linear(8, 8)})


PARENTS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "attention": (attention, "a.out_proj", "MultiheadAttention"),
    "encoder": (encoder, "a.linear1", "TransformerEncoderLayer"),
    "encoder, attention": (encoder, "a.self_attn.out_proj", "MultiheadAttention"),
    "decoder, attention": (decoder, "a.multihead_attn.out_proj", "MultiheadAttention"),
    "wavlm": (wavlm, "a.k_proj", "WavLMAttention"),
}


@pytest.mark.parametrize("kind", PARENTS)
def test_layers_that_their_parent_reads(kind: str) -> None:
    make, name, parent = PARENTS[kind]
    reason = f"part of a {parent}, which reads its weights instead of calling it"
    with pytest.raises(ValueError, match=f"cannot attach: layer {name}, .*{reason}"):
        attach(adapted(make(), name, "b"))
    with attach(adapted(make(), name, "b"), on_unsupported="skip") as attached:
        assert list(attached.layers) == ["b"]
        first = attached.report[0]
        assert (first.name, first.how, first.reason) == (name, "skipped", reason)
    model = make()
    with pytest.raises(ValueError, match=f"layer {name} is {reason}"):
        inject(model, [adapter(model, name, "b")])
    with inject(model, [adapter(model, name, "b")], on_unsupported="skip") as injected:
        assert list(injected.layers) == ["b"]
        first = injected.report[0]
        assert (first.name, first.how, first.reason) == (name, "skipped", reason)
        assert first.adapters == ("x",)
    with pytest.raises(ValueError, match="no layer of them can be adapted"):
        inject(model, [adapter(model, name)], on_unsupported="skip")


def test_what_decoders_call_is_served() -> None:
    model = decoder()
    x = torch.randn(5, 2, 8)
    with torch.no_grad(), inject(model, [adapter(model, "a.linear1", "a.linear2")]) as handle:
        model["a"](x, x)  # type: ignore[index]
        assert [entry.how for entry in handle.report] == ["fused", "fused"]


def test_a_fused_projection() -> None:
    """diffusers keeps to_q and the others beside the layer that it made of them."""
    unet: Any = SUBJECTS["unet"].make().float()
    names = [n for n, m in unet.named_modules() if n.endswith(("attn1.to_q", "attn2.to_v"))][:4]
    inject(unet, [adapter(unet, *names)]).detach()
    unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="part of a Attention, which calls to_qkv instead"):
        inject(unet, [adapter(unet, *names)])
    model = adapted(unet, "to_q", "to_v")
    with pytest.raises(ValueError, match=r"calls to_qkv instead \(fuse_qkv_projections\)"):
        attach(model)
    with attach(model, on_unsupported="skip") as handle:  # to_q of cross attention is called
        assert all(name.endswith("attn2.to_q") for name in handle.layers)
        assert handle.layers
        assert {entry.how for entry in handle.report} == {"fused", "skipped"}


@pytest.mark.parametrize("how", ["attach", "inject"])
def test_projections_that_are_fused_later(how: str) -> None:
    """The report says so, also after a pass in which the layers were called."""
    subject = SUBJECTS["unet"]
    unet: Any = subject.make()
    if how == "inject":
        names = [n for n, m in unet.named_modules() if n.endswith(("attn1.to_q", "attn2.to_q"))]
        handle: Any = inject(unet, [adapter(unet, *names)])
    else:
        handle = attach(adapted(unet, "to_q").double())
    with torch.no_grad():
        subject.run(unet)
        assert {entry.how for entry in handle.report} == {"fused"}
        unet.fuse_qkv_projections()
    for entry in handle.report:
        assert entry.how == ("fused" if ".attn2." in entry.name else "not reached")
    assert "which calls to_qkv instead" in str(handle.report[0])


def _reads(source: str, parent: str, child: str) -> bool:
    """Whether a class's text has `self.child.weight`, beyond looks at its kind."""
    kinds = ("dtype", "device", "shape", "data")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name == parent:
            found = ast.unparse(node)
            reads = found.count(f"self.{child}.weight")
            return reads > sum(found.count(f"self.{child}.weight.{kind}") for kind in kinds)
    return False


PACKAGED = [name for name in READERS if name.startswith(("transformers.", "diffusers."))]


@pytest.mark.parametrize("name", PACKAGED)
def test_the_table_says_what_packages_do(name: str) -> None:
    package, _, parent = name.partition(".")
    library(package)
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "models"
    texts = [path.read_text(encoding="utf-8") for path in folder.rglob("*.py")]
    texts = [text for text in texts if f"class {parent}(" in text]
    if not texts:
        pytest.skip(f"this {package} has no {parent}")
    for child in READERS[name].children:
        assert any(_reads(text, parent, child) for text in texts), child


class Reads(nn.Module):
    """A module of which no table knows that it reads the weights of one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, call: bool = False) -> Tensor:
        y = self.called(x)
        if call:
            return self.read(y)  # type: ignore[no-any-return]
        return nn.functional.linear(y, self.read.weight)


class Outer(nn.Module):
    """Two of them, checkpointed on request."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Reads(), Reads()
        self.checkpointed = False

    def forward(self, x: Tensor, call: bool = False) -> Tensor:
        for part in (self.one, self.two):
            if self.checkpointed:
                x = checkpoint(part, x, call, use_reentrant=False)
            else:
                x = part(x, call)
        return x


NAMES = ["one.called", "one.read", "two.called", "two.read"]
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def put(how: str, names: list[str] = NAMES) -> tuple[Any, Any]:
    """The model with adapters, and its handle."""
    model: Any = Outer().requires_grad_(False)
    if how == "inject":
        return model, inject(model, [adapter(model, *names)])
    model = adapted(model, *names)
    return model, attach(model)


def unreached(handle: Any) -> list[str]:
    return [entry.name for entry in handle.report if entry.how == "not reached"]


@pytest.mark.parametrize("how", ["attach", "inject"])
def test_not_reached(how: str) -> None:
    """Named once a pass has ended; no more once a later pass did call it."""
    model, handle = put(how)
    assert unreached(handle) == []
    model(X)
    assert unreached(handle) == ["one.read", "two.read"]
    assert "no call of it was seen" in str(handle.report[1])
    model(X, call=True)
    assert unreached(handle) == []
    handle.detach()
    assert unreached(handle) == []


@pytest.mark.parametrize("how", ["attach", "inject"])
def test_none_is_reached(how: str) -> None:
    model, handle = put(how, ["one.read", "two.read"])
    with pytest.raises(TypeError):
        model(X, wrong=1)
    assert unreached(handle) == []  # that was no pass
    model(X)
    assert unreached(handle) == ["one.read", "two.read"]


def test_a_pass_that_goes_around_the_peft_model() -> None:
    """As `generate` does, which calls the model inside."""
    model, handle = put("attach")
    model.base_model.model(X)
    assert unreached(handle) == ["one.read", "two.read"]


@pytest.mark.parametrize("how", ["attach", "inject"])
def test_hooks_are_there_for_one_pass(how: str) -> None:
    model, handle = put(how)
    assert any(module._forward_hooks for module in model.modules())
    model(X)
    assert not any(module._forward_hooks for module in model.modules())
    handle.detach()
    model, handle = put(how)
    handle.detach()
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("how", ["attach", "inject"])
@pytest.mark.parametrize("gradients", [False, True])
def test_compiled(how: str, gradients: bool) -> None:
    """No graph break; seen without gradients, and with them nothing is said that is not known."""
    torch.compiler.reset()
    model, handle = put(how)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.set_grad_enabled(gradients):
        compiled(X)
        compiled(X)
    assert unreached(handle) == ([] if gradients else ["one.read", "two.read"])


@pytest.mark.parametrize("how", ["attach", "inject"])
@pytest.mark.parametrize("wrap", ["module", "in place"])
def test_a_compiled_part_is_not_judged_with_gradients(how: str, wrap: str) -> None:
    torch.compiler.reset()
    model, handle = put(how)
    outer = next(module for module in model.modules() if isinstance(module, Outer))
    if wrap == "module":
        outer.two = torch.compile(outer.two, backend="eager")  # type: ignore[assignment]
    else:
        outer.two.compile(backend="eager")
    model(X.clone().requires_grad_())
    assert unreached(handle) == ["one.read"]
    with torch.no_grad():
        model(X)
    assert unreached(handle) == ["one.read", "two.read"]


def test_a_mark_compiles_nothing_anew() -> None:
    """Neither the first pass nor what it changed is a reason to compile again."""
    torch.compiler.reset()
    model, _ = put("inject")
    counter = CompileCounter()
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            compiled(X)
    assert counter.frame_count == 1


@pytest.mark.parametrize("how", ["attach", "inject"])
def test_compiled_with_checkpoints(how: str) -> None:
    """Nothing may be written from inside of those."""
    torch.compiler.reset()
    model, handle = put(how)
    handle.set(seed=0)
    outer = next(module for module in model.modules() if isinstance(module, Outer))
    outer.checkpointed = True
    x = X.clone().requires_grad_()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x).sum(), x)[0]
    expected = torch.autograd.grad(model(x).sum(), x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
