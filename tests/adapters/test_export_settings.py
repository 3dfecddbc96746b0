"""export of what is attached or injected: as it is set, until something else is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import deltas_of, refused
from peft_models import Small, layer, make
from safetensors import safe_open

from lora_ortho import attach, export, inject, load_adapter, mask_stream
from lora_ortho.adapters import adapters_of, assign_streams

SETTINGS: Any = {"p": [0.75, 0.5], "weights": [0.5, -2.0]}


def test_an_attached_model_is_exported_as_it_is_attached(tmp_path: Path) -> None:
    """Rates, weights, order, seed and sample, of the model and of the handle, until given."""
    model = make()
    named: Any = {"adapters": ["two", "one"], **SETTINGS}
    export(model, tmp_path / "wanted", "ortho_rows", seed=7, sample=3, **named)
    export(
        model, tmp_path / "other", "ortho_rows", seed=7, sample=3, **{**named, "weights": [1, 1]}
    )
    wanted, other = deltas_of(tmp_path / "wanted"), deltas_of(tmp_path / "other")
    with attach(model, ["two", "one"], seed=7, **SETTINGS) as handle:
        handle.set(sample=3)
        for j, source in enumerate((model, handle)):
            export(source, tmp_path / f"{j}", "ortho_rows")
            export(source, tmp_path / f"given{j}", "ortho_rows", weights=[1, 1])
            for name, delta in deltas_of(tmp_path / f"{j}").items():
                assert torch.equal(delta, wanted[name])
            for name, delta in deltas_of(tmp_path / f"given{j}").items():
                assert torch.equal(delta, other[name])
        with safe_open(tmp_path / "0" / "adapter_model.safetensors", "pt") as file:
            made = json.loads(file.metadata()["lora_ortho"])
        assert [(one["name"], one["p"], one["weight"]) for one in made["adapters"]] == [
            ("two", 0.75, 0.5), ("one", 0.5, -2.0)
        ]  # fmt: skip
        assert (made["seed"], made["sample"], made["mask_stream"]) == (7, 3, 1)
        model.base_model.set_adapter(["one", "two"])  # attached layers keep their own order
        export(model, tmp_path / "reset", "ortho_rows")
        for name, delta in deltas_of(tmp_path / "reset").items():
            assert torch.equal(delta, wanted[name])
        export(handle, tmp_path / "some", adapters=["one"])
    with attach(model, weights=[0.0, 1.0], seed=7, keep_zero_weights=True):
        export(model, tmp_path / "kept", "ortho_rows")
        export(model, tmp_path / "off", "ortho_rows", keep_zero_weights=False)
    given: Any = {"weights": [0.0, 1.0], "seed": 7}
    export(model, tmp_path / "kept_too", "ortho_rows", keep_zero_weights=True, **given)
    for name, delta in deltas_of(tmp_path / "kept").items():
        assert torch.equal(delta, deltas_of(tmp_path / "kept_too")[name])
        assert not torch.equal(delta, deltas_of(tmp_path / "off")[name])
    with pytest.raises(ValueError, match="the handle is detached"):
        export(handle, tmp_path / "late")
    with safe_open(tmp_path / "some" / "adapter_model.safetensors", "pt") as file:
        (one,) = json.loads(file.metadata()["lora_ortho"])["adapters"]
    assert (one["name"], one["p"], one["weight"]) == ("one", 0.5, -2.0)


def test_an_injection_is_exported_as_it_is(tmp_path: Path) -> None:
    """With convolutions and biases, and factors as they are at this moment."""
    make("one", lora_bias=True).save_pretrained(tmp_path)
    make("two").save_pretrained(tmp_path)
    model = Small()
    loaded = [load_adapter(tmp_path / name, model) for name in ("one", "two")]
    export(loaded, tmp_path / "wanted", "ortho_rows", seed=9, sample=2, **SETTINGS)
    export(loaded, tmp_path / "default", "ortho_rows")
    with inject(model, loaded, seed=9, **SETTINGS) as handle:
        handle.set(sample=2)
        export(handle, tmp_path / "found", "ortho_rows")
        refused(tmp_path, handle, ValueError, "an injection is exported whole", adapters=["one"])
        refused(tmp_path, model, ValueError, "give the handle that inject gave")
    with inject(model, loaded) as handle:
        export(handle, tmp_path / "fresh", "ortho_rows")
    for found, right in (("found", "wanted"), ("fresh", "default")):
        one, two = (load_adapter(tmp_path / name) for name in (found, right))
        assert list(one.layers) == list(two.layers)
        assert one.kernels == two.kernels
        for name, part in two.layers.items():
            for field in ("lora_A", "lora_B", "bias"):
                assert torch.equal(getattr(one.layers[name], field), getattr(part, field))


def test_strata_are_exported(tmp_path: Path) -> None:
    """Those of the attachment, the injection or the call; named in the header where not 1."""
    model = make()
    for name in ("one", "two"):
        make(name).save_pretrained(tmp_path)
    given: Any = {"seed": 7, "sample": 6, **SETTINGS}
    export(model, tmp_path / "plain", "ortho_rows", **given)
    export(model, tmp_path / "wanted", "ortho_rows", strata=4, **given)
    export(model, tmp_path / "direct", "direct", strata=4, **given)
    with attach(model, seed=7, strata=4, **SETTINGS) as handle:
        handle.set(sample=6)
        export(handle, tmp_path / "attached", "ortho_rows")
        export(handle, tmp_path / "other", "ortho_rows", strata=1)
    loaded = [load_adapter(tmp_path / name) for name in ("one", "two")]
    export(loaded, tmp_path / "loaded", "ortho_rows", strata=4, **given)
    base = Small()
    with inject(base, loaded, seed=7, strata=4, **SETTINGS) as injection:
        injection.set(sample=6)
        export(injection, tmp_path / "injected", "ortho_rows")
    stream = assign_streams(["down", "image", "up"])["up"]
    rates = SETTINGS["p"]
    owner = mask_stream.winners(7, range(1), range(10), rates, stream=stream, sample=6, strata=4)
    deltas = {name: deltas_of(tmp_path / name) for name in ("plain", "wanted", "attached", "other")}
    assert torch.equal((deltas["wanted"]["up"] == 0).all(1), owner[0] == -1)
    for name in deltas["wanted"]:
        assert torch.equal(deltas["attached"][name], deltas["wanted"][name])
        assert torch.equal(deltas["other"][name], deltas["plain"][name])
        assert torch.equal(
            deltas_of(tmp_path / "injected")[name], deltas_of(tmp_path / "loaded")[name]
        )
    assert not torch.equal(deltas["plain"]["up"], deltas["wanted"]["up"])
    told = {"plain": None, "wanted": 4, "direct": None, "attached": 4, "injected": 4}
    for name, strata in told.items():
        with safe_open(tmp_path / name / "adapter_model.safetensors", "pt") as file:
            assert json.loads(file.metadata()["lora_ortho"]).get("strata") == strata
    wrong: Any = {"method": "ortho_rows", "strata": 0}
    refused(tmp_path, model, ValueError, "strata must be in [1, 65536], got 0", **wrong)


def test_weight_0_is_off(tmp_path: Path) -> None:
    """Left out before K is counted; a layer that only such adapters adapt is left out."""
    model = make("one", "two", "three")
    for name in ("down", "image"):
        layer(model, name).set_adapter(["one", "two"])
    layer(model, "down").set_adapter(["two"])
    found = {adapter.name: adapter for adapter in adapters_of(model)}
    loaded = [found[name] for name in ("one", "two", "three")]
    export(loaded, tmp_path / "x", "ortho_rows", weights=[1, 0, 2], seed=4)
    export([loaded[0], loaded[2]], tmp_path / "y", "ortho_rows", weights=[1, 2], seed=4)
    assert list(deltas_of(tmp_path / "x")) == ["image", "up"]
    for name, delta in deltas_of(tmp_path / "y").items():
        assert torch.equal(delta, deltas_of(tmp_path / "x")[name])
    export(loaded, tmp_path / "kept", "ortho_rows", weights=[1, 0, 2], seed=4,
           keep_zero_weights=True)  # fmt: skip
    kept = deltas_of(tmp_path / "kept")["up"]
    stream = assign_streams(["down", "image", "up"])["up"]
    owner = mask_stream.winners(4, range(1), range(10), [2 / 3] * 3, stream=stream)[0]
    assert set(owner.tolist()) == {0, 1, 2}
    assert bool((kept[owner == 1] == 0).all())
    export(loaded, tmp_path / "p", "ortho_rows", weights=[1, 0, 2], p=[0.5, 0.1, 0.5], seed=4)
    for name, delta in deltas_of(tmp_path / "y").items():
        if name == "up":  # 0.1 of the one that is off counts for nothing
            assert torch.equal(delta, deltas_of(tmp_path / "p")[name])
    refused(tmp_path, loaded, ValueError, "every adapter has weight 0", weights=[0, 0, 0])
