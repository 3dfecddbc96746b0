"""The code in README.md runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from adapter_files import small_model, write

import lora_ortho

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_readme_has_both_blocks() -> None:
    assert len(BLOCKS) == 2


def test_one_layer() -> None:
    names: dict[str, Any] = {}
    exec(BLOCKS[0], names)
    assert names["y"].shape == (2, 77, 4096)
    assert names["layer"].method == "direct"


def test_whole_model(tmp_path: Path) -> None:
    model = small_model()
    model.forward = lambda x: model.b.c(model.a(x))  # type: ignore[operator, union-attr]
    folders = [write(tmp_path / "one"), write(tmp_path / "two")]
    x = torch.randn(3, 3)
    bare = model(x)
    names: dict[str, Any] = {"lora_ortho": lora_ortho, "model": model, "folders": folders, "x": x}
    exec(BLOCKS[1], names)
    assert names["y"].shape == (3, 5)
    assert not torch.equal(names["y"], bare)
    assert torch.equal(model(x), bare)
