"""While adapters are injected, what is saved, loaded, tied and resized is the plain model."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SUBJECTS, library
from peft_models import make
from torch import Tensor, nn

import lora_ortho
from lora_ortho import Adapter, fused_ortho_lora, inject
from lora_ortho.adapters import LoadedAdapter
from lora_ortho.adapters.components import components, named

IDS = torch.arange(14).view(2, 7)
NAMES = ("lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def llama(tied: bool = False) -> Any:
    transformers = library("transformers")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=61, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def adapter(model: nn.Module, *names: str) -> LoadedAdapter:
    """Random factors for layers of a model."""
    parts = {}
    for name in names:
        layer: Any = model.get_submodule(name)
        generator = torch.Generator().manual_seed(len(name))
        A = torch.randn(4, layer.in_features, generator=generator) / 6
        B = torch.randn(layer.out_features, 4, generator=generator) / 6
        parts[name] = Adapter(A, B, name="x")
    return LoadedAdapter("x", parts, Path("x"))


def run(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


@pytest.mark.parametrize("tied", [False, True])
def test_state_dict(tied: bool) -> None:
    """Keys, order, values and storage; nothing is missing or unexpected."""
    model = llama(tied)
    before, names = dict(model.state_dict()), [n for n, _ in model.named_parameters()]
    plain = run(model)
    with inject(model, [adapter(model, *NAMES)], seed=0):
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(after[key].data_ptr() == before[key].data_ptr() for key in before)
        assert [n for n, _ in model.named_parameters()] == names
        other = llama(tied)
        nn.init.normal_(other.model.embed_tokens.weight)
        with inject(other, [adapter(other, *NAMES)], seed=0):
            result = other.load_state_dict(after, strict=True)
            assert not result.missing_keys
            assert not result.unexpected_keys
            assert torch.equal(run(other), run(model))
        assert torch.equal(run(other), plain)


@pytest.mark.parametrize("tied", [False, True])
def test_save_pretrained(tmp_path: Path, tied: bool) -> None:
    """The files are those that the plain model writes, byte for byte."""
    model = llama(tied)
    plain = run(model)
    model.save_pretrained(tmp_path / "plain")
    with inject(model, [adapter(model, *NAMES)], seed=0):
        assert not torch.equal(run(model), plain)
        model.save_pretrained(tmp_path / "injected")
    files = [tmp_path / d / "model.safetensors" for d in ("plain", "injected")]
    assert files[0].read_bytes() == files[1].read_bytes()
    again = type(model).from_pretrained(tmp_path / "injected").eval()
    assert torch.equal(run(again), plain)


def test_layers_are_those_of_the_model() -> None:
    model = llama()
    with inject(model, [adapter(model, *NAMES)], seed=0) as handle:
        for name, found in handle.layers.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            assert type(layer).__name__ == "Linear"
            assert found.layer is layer
            assert type(found.base) is nn.Linear
            assert found.base.weight is layer.weight is layer.base.weight
            assert not list(found.base.children())


def test_names_are_those_of_the_plain_model() -> None:
    """What adapters bring is no module of the model: streams and files do not see it."""
    model = llama()
    before = [(entry.name, entry.stream) for entry in named(components(model))]
    with inject(model, [adapter(model, *NAMES)], seed=0):
        assert [(entry.name, entry.stream) for entry in named(components(model))] == before


def test_tied_weights() -> None:
    model = llama(tied=True)
    with inject(model, [adapter(model, *NAMES)], seed=0):
        expected = run(model)
        model.tie_weights()
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(run(model), expected)
        with torch.no_grad():
            model.model.embed_tokens.weight.add_(1)
        assert not torch.equal(run(model), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings(tied: bool) -> None:
    """As without adapters where the head has none; else an error by name at the next call."""
    plain = llama(tied)
    torch.manual_seed(5)
    plain.resize_token_embeddings(64)
    model = llama(tied)
    with inject(model, [adapter(model, *NAMES[1:])], seed=0, weights=[0.0]):
        torch.manual_seed(5)
        model.resize_token_embeddings(64)
        assert torch.equal(run(model), run(plain))
    assert torch.equal(run(model), run(plain))
    model = llama(tied)
    handle = inject(model, [adapter(model, *NAMES)], seed=0)
    torch.manual_seed(5)
    model.resize_token_embeddings(64)
    head: Any = model.get_submodule("lm_head")
    if list(head.children()):  # the layer is there still, with another weight
        with pytest.raises(ValueError, match="layer lm_head takes 32 features to 64 now, its"):
            run(model)
    else:  # the model has a new one, which nobody adapted
        run(model)
        assert [e.name for e in handle.report if e.how == "not reached"] == ["lm_head"]
    handle.detach()
    assert torch.equal(run(model), run(plain))
    assert {type(m) for m in model.modules() if hasattr(m, "in_features")} == {nn.Linear}


@pytest.mark.parametrize("size", [(8, 64), (16, 32)])
def test_a_weight_of_another_shape(size: tuple[int, int]) -> None:
    """Whoever exchanged it: no kernel is called with factors that do not fit."""
    model = nn.Sequential(nn.Linear(32, 64))
    with inject(model, [LoadedAdapter("x", {"0": adapter(model, "0").layers["0"]}, Path("x"))]):
        model[0].weight = nn.Parameter(torch.randn(size[1], size[0]))
        model[0].bias = None  # type: ignore[assignment]
        with pytest.raises(ValueError, match=f"layer 0 takes {size[0]} features to {size[1]} now"):
            model(torch.randn(3, size[0]))


def test_copies_and_pickles() -> None:
    model = llama()
    plain = run(model)
    with inject(model, [adapter(model, *NAMES)], seed=0, p=[0.5]) as handle:
        expected = run(model)
        twin = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        handle.set(seed=1)
        assert not torch.equal(run(model), expected)
    buffer.seek(0)
    for other in (twin, torch.load(buffer, weights_only=False)):
        assert torch.equal(run(other), expected)
        assert lora_ortho.detach(other) == 3
        assert torch.equal(run(other), plain)
        assert [n for n, _ in other.named_modules()] == [n for n, _ in model.named_modules()]


class Kept(nn.Module):
    """A model that keeps the handle on its own layers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "inject":
            self.net: Any = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
            parts = [Adapter(torch.randn(2, 6), torch.randn(6, 2)) for _ in range(2)]
            found = [LoadedAdapter("x", {"0": part, "1": part}, Path("x")) for part in parts]
            self.handle: Any = inject(self.net, found, seed=0)
        else:
            self.net = make()
            self.handle = lora_ortho.attach(self.net, seed=0)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.net(x)  # type: ignore[no-any-return]


def test_a_pattern_of_peft_that_leaves_the_adapters_out() -> None:
    """PEFT wraps the adapted layers; new adapters of its own change nothing yet."""
    peft, model, x = library("peft"), Kept("inject"), torch.randn(4, 6)
    expected = model(x)
    config = peft.LoraConfig(target_modules=".*[01].*", exclude_modules=r".*\._lora_ortho.*")
    wrapped = peft.get_peft_model(model.net, config)
    assert sum(isinstance(m, peft.tuners.lora.Linear) for m in wrapped.modules()) == 2
    with torch.no_grad():
        assert torch.equal(wrapped(x), expected)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("kind", ["attach", "inject"])
def test_handles_are_copied_with_their_model(kind: str, called: bool) -> None:
    model, x = Kept(kind), torch.randn(4, 7, 6)
    if called:
        model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        expected = model(x)
        assert torch.equal(other(x), expected)
        inside = dict(other.net.named_modules())
        assert list(other.handle.layers) == list(model.handle.layers)
        found = [getattr(part, "layer", part) for part in other.handle.layers.values()]
        assert {id(part) for part in found} <= {id(part) for part in inside.values()}
        other.handle.set(seed=1)
        assert not torch.equal(other(x), expected)
        assert torch.equal(model(x), expected)
        assert {e.how for e in other.handle.report} == {e.how for e in model.handle.report}
        other.handle.detach()
        assert lora_ortho.detach(other.net) == 0
        assert torch.equal(model(x), expected)
    with pytest.raises(TypeError, match="item assignment"):
        model.handle.layers["x"] = model


def test_factors_move_with_the_model() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Conv1d(4, 3, 2))
    conv = Adapter(torch.randn(2, 8), torch.randn(3, 2))
    parts = {"0": adapter(model, "0").layers["0"], "1": conv}
    loaded = LoadedAdapter("x", parts, Path("x"), None, {"1": (2,)})
    with inject(model, [loaded]) as handle:
        model.double()
        assert all(
            b.dtype == torch.float64 for one in handle.layers.values() for b in one.buffers()
        )
        model.to(torch.bfloat16)
        assert model(torch.randn(4, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
        model.to("meta")
        assert all(b.is_meta for one in handle.layers.values() for b in one.buffers())
        assert not any("lora" in key for key in model.state_dict())


def test_hooks_stay() -> None:
    """They see what the layer gives in the model, adapters included, and what it takes."""
    model: Any = nn.Sequential(nn.Linear(6, 5))
    seen: list[Tensor] = []
    model[0].register_forward_pre_hook(lambda _, args: (2 * args[0],))
    model[0].register_forward_hook(lambda _, __, output: seen.append(output))
    part = adapter(model, "0").layers["0"]
    x = torch.randn(3, 6)
    with torch.no_grad(), inject(model, [LoadedAdapter("x", {"0": part}, Path("x"))]) as handle:
        y = model(x)
        assert seen[0] is y
        W, b = model[0].weight, model[0].bias
        expected = 2 * x @ W.T + b + 2 * x @ part.lora_A.T @ part.lora_B.T
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert handle.report[0].how == "fused"
    assert len(model[0]._forward_hooks) == len(model[0]._forward_pre_hooks) == 1


class Quantised(nn.Module):
    """A linear layer of integers with a scale, as packages for quantisation have them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        scale = base.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        self.register_buffer("codes", (base.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.codes * self.scale  # type: ignore[operator]
        return x @ weight.T.to(x.dtype)


def test_quantised_layers_keep_their_forward() -> None:
    model = nn.Sequential(Quantised(nn.Linear(6, 5)))
    x = torch.randn(4, 6)
    plain = model(x)
    part = adapter(model, "0").layers["0"]
    loaded = [LoadedAdapter(n, {"0": part}, Path(n)) for n in ("one", "two")]
    with inject(model, loaded, seed=3) as handle:
        factors = [part.lora_A] * 2, [part.lora_B] * 2
        stream = handle.report[0].stream
        expected = fused_ortho_lora(x, *factors, base=plain, seed=3, stream=stream)
        torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
        assert handle.report[0].reason == "the base layer is a Quantised"
        assert list(model.state_dict()) == ["0.scale", "0.codes"]
    assert torch.equal(model(x), plain)


def test_a_child_called_base_stays() -> None:
    """The layer without adapters goes by that name only where nothing else does."""

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 6, 5
            self.base = nn.Linear(6, 5)

        @property
        def weight(self) -> Tensor:
            return self.base.weight

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.base(x)  # type: ignore[no-any-return]

    model = nn.Sequential(Inside())
    x = torch.randn(4, 6)
    plain = model(x)
    with inject(model, [adapter(model, "0")], weights=[0.0]):
        assert torch.equal(model(x), plain)


def test_shared_layers() -> None:
    """One place under two names is one layer; two places are refused, or get a copy."""
    block = nn.ModuleDict({"up": nn.Linear(6, 6)})
    model: Any = nn.ModuleDict({"a": block, "b": block})
    x = torch.randn(4, 6)
    for name in ("a.up", "b.up"):
        with inject(model, [adapter(model, name)], seed=0) as handle:
            assert list(handle.layers) == ["a.up"]
            assert torch.equal(model["a"]["up"](x), model["b"]["up"](x))
            assert not torch.equal(model["b"]["up"](x), handle.layers["a.up"].base(x))
    with pytest.raises(ValueError, match=r"a\.up is shared: it is also b\.up, and adapter"):
        inject(model, [adapter(model, "a.up", "b.up")])
    model = nn.ModuleDict({"a": block, "b": nn.ModuleDict({"up": block["up"]})})
    with pytest.raises(ValueError, match=r"layer a\.up is shared: it is also b\.up"):
        inject(model, [adapter(model, "b.up")])
    model["b"]["up"] = copy.deepcopy(model["b"]["up"])
    inject(model, [adapter(model, "b.up")]).detach()


def test_scripted_and_replaced_layers_are_refused() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(6, 5)), nn.Linear(6, 5))
    part = Adapter(torch.randn(2, 6), torch.randn(5, 2))
    with pytest.raises(ValueError, match="layer 0 is compiled by TorchScript"):
        inject(model, [LoadedAdapter("x", {"0": part}, Path("x"))])
    model[1].forward = lambda x: x
    with pytest.raises(ValueError, match="layer 1 is called by another forward, put on the layer"):
        inject(model, [LoadedAdapter("x", {"1": part}, Path("x"))])


def test_an_adapted_unet_is_saved_as_it_is(tmp_path: Path) -> None:
    """diffusers' own save_pretrained, with convolutions among the layers."""
    subject = SUBJECTS["unet"]
    unet: Any = subject.make()
    plain = subject.run(unet)
    unet.save_pretrained(tmp_path / "plain")
    conv, linear = str(subject.convolution), subject.layer
    sizes = {n: unet.get_submodule(n).weight.shape for n in (conv, linear)}
    parts = {
        n: Adapter(torch.randn(2, size[1:].numel()).double(), torch.randn(size[0], 2).double())
        for n, size in sizes.items()
    }
    kernels = {conv: tuple(sizes[conv][2:])}
    with inject(unet, [LoadedAdapter("x", parts, Path("x"), None, kernels)]) as handle:
        assert not torch.equal(subject.run(unet), plain)
        assert {entry.how for entry in handle.report} == {"fused", "convolution"}
        unet.save_pretrained(tmp_path / "injected")
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert len(files) == 2
    for file in files:
        written = [(tmp_path / folder / file).read_bytes() for folder in ("plain", "injected")]
        assert written[0] == written[1]
