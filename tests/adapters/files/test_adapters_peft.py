"""Adapter folders that PEFT wrote, against PEFT's own results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from block_model import Model, X
from torch import nn

from lora_ortho.adapters import AdapterFileError, inject, load_adapter

peft = pytest.importorskip("peft", reason="PEFT is not installed: nothing to compare with")

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 5},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "patterns": {
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"blocks.0.up": 5, r"blocks\.1\..*": 3},
        "alpha_pattern": {"down": 7},
    },
    "bias": {"r": 2, "lora_alpha": 3, "lora_bias": True},
    "gaussian": {"r": 2, "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 2, "init_lora_weights": "orthogonal"},
}


def saved(folder: Path, base: nn.Module, **fields: Any) -> Path:
    """An adapter of that kind with random factors, saved by PEFT."""
    config = peft.LoraConfig(target_modules=["up", "down"], **fields)
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    model.unload()
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_equals_peft(tmp_path: Path, kind: str) -> None:
    base = Model().eval().double()
    bare = base(X.double())
    folder = saved(tmp_path / kind, base, **KINDS[kind])
    with inject(base, [load_adapter(folder, base)], method="direct"):
        ours = base(X.double())
    theirs = peft.PeftModel.from_pretrained(base, folder).eval().double()(X.double())
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(ours, bare, atol=1e-2)


def test_three_adapters_at_once_equal_peft(tmp_path: Path) -> None:
    """The direct merge is PEFT with several active adapters."""
    base = Model().eval().double()
    names = ["plain", "rslora", "patterns"]
    folders = [saved(tmp_path / name, base, **KINDS[name]) for name in names]
    with inject(base, [load_adapter(folder, base) for folder in folders], method="direct"):
        ours = base(X.double())
    model = peft.PeftModel.from_pretrained(base, folders[0], adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    model.base_model.set_adapter(names)
    theirs = model.eval().double()(X.double())
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_bfloat16_base_with_float32_factors(tmp_path: Path) -> None:
    base = Model().eval().to(torch.bfloat16)
    x = X.to(torch.bfloat16)
    folder = saved(tmp_path / "x", base, **KINDS["plain"])
    with inject(base, [load_adapter(folder, base)], method="direct"):
        ours = base(x)
    exact = Model().eval().double()
    exact.load_state_dict(base.state_dict())
    with inject(exact, [load_adapter(folder)], method="direct"):
        reference = exact(x.double())
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()(x)
    error, allowed = (float((y.double() - reference).abs().max()) for y in (ours, theirs))
    assert error <= 2 * allowed


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["blocks.0.down"], "target_modules": ["up"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ],
)
def test_kinds_that_are_refused(tmp_path: Path, fields: dict[str, Any], key: str) -> None:
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["up", "down"], **fields})
    peft.get_peft_model(Model(), config).save_pretrained(tmp_path / "x")
    with pytest.raises(AdapterFileError, match=key) as caught:
        load_adapter(tmp_path / "x")
    assert caught.value.key == key


def test_every_field_of_peft_is_known(tmp_path: Path) -> None:
    """A configuration that PEFT writes with all defaults names no field we do not know."""
    import dataclasses

    from lora_ortho.adapters.files.peft_config import HONOURED, NO_EFFECT, REFUSED

    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields - HONOURED - NO_EFFECT - set(REFUSED) == set()
