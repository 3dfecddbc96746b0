"""export: what is written runs in PEFT and here as the merge did."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from adapter_files import write_file
from exports import close, refused, reloaded
from image_tensors import kohya
from models import KINDS, SUBJECTS, Subject, adapted
from peft_models import Small, X, layer, make
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_ortho
from lora_ortho import Adapter, attach, export, inject, load_adapter
from lora_ortho.adapters import LoadedAdapter, adapters_of

peft = pytest.importorskip("peft", reason="PEFT is not installed: nothing to export for")


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    return SUBJECTS[request.param]


@torch.no_grad()
@pytest.mark.parametrize(
    ("subject", "kind"),
    [
        ("smollm", "all"),
        *((name, kind) for name in ("llama", "gpt2", "unet", "flux") for kind in [*KINDS, "all"]),
    ],
    indirect=["subject"],
)
def test_direct_runs_as_the_merge_did(tmp_path: Path, subject: Subject, kind: str) -> None:
    """rsLoRA, unequal ranks, patterns, biases, convolutions, Conv1D; in PEFT and here."""
    kinds = [*KINDS] if kind == "all" else [kind]
    model = adapted(subject, *kinds)
    weights = [0.5 + 0.25 * j for j in range(len(kinds))]
    with attach(model, method="direct", weights=weights):
        expected = subject.run(model)
        written = export(model, tmp_path / "x", weights=weights)
    assert written.path == tmp_path / "x"
    assert set(written.errors.values()) == {0.0}
    base = subject.make()
    theirs = subject.run(reloaded(base, tmp_path / "x"))
    close(theirs, expected)
    bare = subject.make()
    with inject(bare, [load_adapter(tmp_path / "x", bare)], method="direct"):
        close(subject.run(bare), expected)


@torch.no_grad()
def test_ortho_rows_are_the_masks_of_one_token(tmp_path: Path) -> None:
    """Every layer gets one token, row 0, so that the run-time merge is a weight."""
    subject = SUBJECTS["llama"]
    model = adapted(subject, *KINDS)
    token = torch.tensor([[7]])
    weights = [1.0, -0.5, 2.0, 0.25]
    with attach(model, seed=11, weights=weights) as handle:
        handle.set(sample=3)
        expected = model(input_ids=token).logits
    export(model, tmp_path / "x", "ortho_rows", seed=11, sample=3, weights=weights)
    theirs = reloaded(subject.make(), tmp_path / "x")(input_ids=token).logits
    close(theirs, expected)
    p = [0.9, 0.7, 0.8, 0.6]
    with attach(model, seed=11, p=p):
        expected = model(input_ids=token).logits
    export(model, tmp_path / "x", "ortho_rows", seed=11, p=p, force=True)
    close(reloaded(subject.make(), tmp_path / "x")(input_ids=token).logits, expected)


@torch.no_grad()
def test_ortho_rows_of_image_models(tmp_path: Path) -> None:
    """Layer by layer, since a forward has many tokens; a convolution at its first place."""
    subject = SUBJECTS["unet"]
    model = adapted(subject, "plain", "offset")
    export(model, tmp_path / "x", "ortho_rows", seed=5)
    merged = reloaded(subject.make(), tmp_path / "x")
    for name, x in (
        (subject.layer, torch.randn(1, 32, dtype=torch.float64)),
        (str(subject.convolution), torch.randn(1, 48, 1, 1, dtype=torch.float64)),
    ):
        with attach(model, seed=5):
            expected = layer(model, name)(x)
        close(layer(merged, name)(x), expected)


@torch.no_grad()
def test_loaded_adapters_of_several_layouts(tmp_path: Path) -> None:
    """A folder of PEFT and a file of kohya's, merged without PEFT."""
    subject = SUBJECTS["unet"]
    model = adapted(subject, "patterns", "rslora")
    expected = subject.run(model)
    adapted(subject, "patterns").save_pretrained(tmp_path)
    file = write_file(tmp_path / "k.safetensors", kohya(model, "rslora"))
    bare = subject.make()
    loaded = [load_adapter(path, bare) for path in (tmp_path / "patterns", file)]
    export(loaded, tmp_path / "x", model=bare)
    close(subject.run(reloaded(bare, tmp_path / "x")), expected)


def test_metadata(tmp_path: Path) -> None:
    model = make("one", "two")
    model.save_pretrained(tmp_path)
    loaded = [load_adapter(tmp_path / name) for name in ("one", "two")]
    export(loaded, tmp_path / "x", "ortho_rows", seed=7, sample=2, p=[0.75, 0.5], weights=[1, 0.5])
    with safe_open(tmp_path / "x" / "adapter_model.safetensors", "pt") as file:
        made = json.loads(file.metadata()["lora_ortho"])
    assert (made["method"], made["seed"], made["sample"], made["rank"]) == (
        "ortho_rows",
        7,
        2,
        None,
    )
    assert made["versions"]["lora_ortho"] == lora_ortho.__version__
    assert [(a["name"], a["p"], a["weight"]) for a in made["adapters"]] == [
        ("one", 0.75, 1.0), ("two", 0.5, 0.5)
    ]  # fmt: skip
    for entry in made["adapters"]:
        for name, digest in entry["sha256"].items():
            data = (tmp_path / entry["name"] / name).read_bytes()
            assert hashlib.sha256(data).hexdigest() == digest
        assert len(entry["sha256"]) == 2


def test_hashes_of_a_models_adapters() -> None:
    model = make("one")
    (before,) = adapters_of(model)
    with torch.no_grad():
        layer(model, "up").lora_A["one"].weight[0, 0] += 1
    (after,) = adapters_of(model)
    assert before.sha256["tensors"] != after.sha256["tensors"]
    assert adapters_of(model)[0].sha256 == after.sha256


def test_the_same_bytes_twice(tmp_path: Path) -> None:
    model = make()
    for name in ("a", "b"):
        export(model, tmp_path / name, "ortho_rows", seed=3)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        first, second = ((tmp_path / name / file).read_bytes() for name in ("a", "b"))
        assert first == second
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@torch.no_grad()
def test_reduced_rank(tmp_path: Path) -> None:
    """The error that is returned is the one that is made."""
    model = make("one", "two", "three", base=Small().double()).double()
    written = export(model, tmp_path / "x", rank=4)
    full = {entry: layer(model, entry) for entry in ("up", "down", "image")}
    assert written.ranks == {"up": 4, "down": 4, "image": 4}
    loaded = load_adapter(tmp_path / "x")
    for name, module in full.items():
        exact = sum(module.get_delta_weight(n) for n in ("one", "two", "three")).flatten(1)
        part = loaded.layers[name]
        error = float((exact - part.lora_B @ part.lora_A).norm() / exact.norm())
        assert written.errors[name] == pytest.approx(error, rel=1e-6)
        sizes = torch.linalg.svdvals(exact)
        assert error == pytest.approx(float(sizes[4:].norm() / sizes.norm()), rel=1e-6)
    assert "3 layers, ranks 4 to 4, relative error at most 0." in str(written)
    assert max(written.errors.values()) > 0.05


def test_dtype(tmp_path: Path) -> None:
    model = make()
    export(model, tmp_path / "x", dtype=torch.bfloat16)
    assert load_adapter(tmp_path / "x").layers["up"].lora_A.dtype == torch.bfloat16
    assert (
        load_adapter(export(model, tmp_path / "y").path).layers["up"].lora_A.dtype == torch.float32
    )
    with torch.no_grad():
        layer(model, "up").lora_B["one"].weight[0, 0] = 1e6
    refused(tmp_path, model, ValueError, "up.lora_B.weight is not finite in torch.float16",
            dtype=torch.float16)  # fmt: skip


class Nested(nn.Module):
    """A layer whose name is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.inner = nn.Linear(6, 6), nn.Module()
        self.inner.up = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.up(self.up(x))  # type: ignore[no-any-return, operator]


def test_names_that_end_in_names(tmp_path: Path) -> None:
    """PEFT takes names as suffixes: only the layers that were exported may be adapted."""
    config = peft.LoraConfig(r=2, target_modules="^up", init_lora_weights=False)
    model = peft.get_peft_model(Nested(), config, "one")
    config = peft.LoraConfig(r=3, target_modules="^up", init_lora_weights=False)
    model.add_adapter("two", config)
    model.base_model.set_adapter(["one", "two"])
    expected = model(X)
    export(model, tmp_path / "x")
    model.unload()
    again = peft.PeftModel.from_pretrained(model.base_model.model, tmp_path / "x")
    assert [n for n, m in again.named_modules() if hasattr(m, "lora_A")] == ["base_model.model.up"]
    torch.testing.assert_close(again(X), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("equal_ranks", [False, True])
def test_readers_of_mixed_ranks(tmp_path: Path, equal_ranks: bool) -> None:
    """lora_alpha over a layer's own rank is its scaling, whoever reads; equal ranks over r too."""
    model = make("one", "two", base=Small().double()).double()
    for name in ("down", "image"):  # of one adapter each
        layer(model, name).set_adapter(["one"] if name == "down" else ["two"])
    wanted = {
        name: sum(module.get_delta_weight(n) for n in module.active_adapters).flatten(1)
        for name in ("up", "down", "image")
        for module in [layer(model, name)]
    }
    written = export(model, tmp_path / "x", equal_ranks=equal_ranks)
    fields = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    ranks = {5} if equal_ranks else {2, 3, 5}
    assert set(written.ranks.values()) == ranks
    assert "alpha_pattern" not in fields
    assert bool(fields.get("rank_pattern")) != equal_ranks
    assert fields["target_modules"] == ["down", "image", "up"]
    tensors = load_file(tmp_path / "x" / "adapter_model.safetensors")
    for name, delta in wanted.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"].flatten(1) for x in "AB")
        close(fields["lora_alpha"] / len(A) * B @ A, delta)
        if equal_ranks:
            assert len(A) == fields["r"] == fields["lora_alpha"]
    theirs = reloaded(Small().double(), tmp_path / "x")
    for name, delta in wanted.items():
        close(layer(theirs, name).get_delta_weight("default").flatten(1), delta)


class Blocks(nn.Module):
    """Layers of equal last names, one of them not to be adapted, and other modules of the name."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(3))
        self.side = nn.ModuleDict({"up": nn.ReLU(), "down": nn.Linear(4, 4)})


@pytest.mark.parametrize(
    ("names", "targets"),
    [
        (["blocks.0.up", "blocks.1.up", "blocks.2.up"], ["0.up", "1.up", "2.up"]),
        (["side.down"], ["down"]),
        (["blocks.1.up", "side.down"], ["1.up", "down"]),
    ],
)
def test_the_shortest_names_that_select_the_layers(
    tmp_path: Path, names: list[str], targets: list[str]
) -> None:
    model = Blocks()
    part = Adapter(torch.ones(2, 4), torch.ones(4, 2))
    one = LoadedAdapter("one", dict.fromkeys(names, part), Path("one"))
    export([one], tmp_path / "x", model=model)
    fields = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert fields["target_modules"] == targets
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "x").base_model.model
    assert [n for n, m in adapted.named_modules() if hasattr(m, "lora_A")] == names
