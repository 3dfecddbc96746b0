"""Exports in tests: one read back, in PEFT and here, and refusals that leave no file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_ortho import export, load_adapter

peft = pytest.importorskip("peft", reason="PEFT is not installed: nothing to export for")


def deltas_of(folder: Path) -> dict[str, Tensor]:
    layers = load_adapter(folder).layers
    return {name: part.scaling * part.lora_B @ part.lora_A for name, part in layers.items()}


def refused(
    folder: Path, source: Any, error: type[Exception], *parts: str, **arguments: Any
) -> None:
    before = sorted(os.listdir(folder))
    with pytest.raises(error) as caught:
        export(source, folder / "refused", **arguments)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert sorted(os.listdir(folder)) == before


def reloaded(base: nn.Module, folder: Path) -> Any:
    """A model with the exported adapter, in PEFT."""
    model = peft.PeftModel.from_pretrained(base, folder)
    return model.double().eval()


def close(ours: Tensor, theirs: Tensor, relative: float = 1e-9) -> None:
    size = relative * float(theirs.abs().max())
    torch.testing.assert_close(ours, theirs, rtol=relative, atol=size)
