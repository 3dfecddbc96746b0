"""The registry of merges: a merge in one file is served by all that offer merges by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import config, small_model, tensors, write
from native import environment

from lora_ortho import Adapter, export, load_adapter
from lora_ortho.merges import METHODS, Gives, register
from lora_ortho.plugins.weights import fold_into

# A file of `lora_ortho/merges/methods`, as somebody who adds a merge would write it.
MEAN = '''
"""The mean of the adapters, times a scale."""

from lora_ortho.merges.factors import concatenate, gains_of, rule_of
from lora_ortho.merges.registry import Gives, register


@register(
    gives=Gives.FACTORS,
    when="the adapters are of one task",
    source="this test",
)
def mean(adapters, *, scale=1.0):
    """The mean, as factors side by side."""
    gains = gains_of(adapters, rule_of(adapters, "direct"))
    B = adapters[0].lora_B.double()
    share = scale / len(adapters)
    return concatenate(adapters, [B.new_full(B.shape[:1], gain * share) for gain in gains])
'''


@pytest.fixture
def mean() -> Iterator[None]:
    """The merge, registered while a test runs."""
    exec(compile(MEAN, "mean.py", "exec"), {})
    yield
    del METHODS["mean"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two adapters, a merge of them, and the file with the merge that is new."""
    for j, name in enumerate(("one", "two")):
        factors = {key: value + j for key, value in tensors().items()}
        write(tmp_path / name, config(), factors)
    loras = "\n".join(f'[[loras]]\nfile_path = "{name}"' for name in ("one", "two"))
    (tmp_path / "merge.toml").write_text(loras, encoding="utf-8")
    (tmp_path / "mean.py").write_text(MEAN, encoding="utf-8")
    return tmp_path


def wanted(folder: Path, layer: str, scale: float = 1.0) -> torch.Tensor:
    parts = [load_adapter(folder / name).layers[layer] for name in ("one", "two")]
    deltas = [part.scaling * part.lora_B @ part.lora_A for part in parts]
    return scale * torch.stack(deltas).mean(dim=0)


def assert_exported(found: Path, folder: Path, scale: float = 1.0) -> None:
    layers = load_adapter(found).layers
    assert sorted(layers) == ["a", "b.c"]
    for name, part in layers.items():
        torch.testing.assert_close(part.lora_B @ part.lora_A, wanted(folder, name, scale))


@pytest.mark.usefixtures("mean")
def test_export_serves_it(folder: Path) -> None:
    adapters = [load_adapter(folder / name) for name in ("one", "two")]
    assert_exported(export(adapters, folder / "x", "mean").path, folder)
    assert_exported(export(adapters, folder / "y", "mean", scale=3.0).path, folder, 3.0)
    from safetensors import safe_open

    for name, parameters in (("x", None), ("y", {"scale": 3.0})):
        with safe_open(folder / name / "adapter_model.safetensors", "pt") as file:
            made = json.loads(file.metadata()["lora_ortho"])
        assert (made["method"], made["seed"]) == ("mean", None)
        assert made.get("parameters") == parameters
    with pytest.raises(TypeError, match="'mean' has no parameter 'scal'; it has scale"):
        export(adapters, folder / "z", "mean", scal=3.0)


@pytest.mark.usefixtures("mean")
def test_plugins_serve_it(folder: Path) -> None:
    model: Any = small_model()
    before = model.a.weight.detach().clone()
    adapters = [load_adapter(folder / name) for name in ("one", "two")]
    fold_into(model, adapters, "mean")
    torch.testing.assert_close(model.a.weight.detach() - before, wanted(folder, "a"))


def run(folder: Path, *arguments: str, program: str = "lora_ortho.cli") -> tuple[int, str, str]:
    """A program in a process that has imported the merge's file."""
    code = f"import sys, mean; from {program} import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, env=environment(),
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_the_command_line_serves_it(folder: Path) -> None:
    status, out, err = run(folder, "merge", "--help")
    assert "direct, ortho_rows or mean" in " ".join(out.split()), err
    status, out, err = run(folder, "merge", "merge.toml", "--export", "x", "--method", "mean")
    assert status == 0, err
    assert_exported(folder / "x", folder)
    status, out, err = run(folder, "methods")
    (line,) = (line for line in out.splitlines() if line.startswith("mean "))
    assert line.endswith("scale=1.0; when the adapters are of one task")
    status, out, err = run(folder, "methods", "--json")
    assert json.loads(out)["mean"] == {
        "gives": "factors",
        "draws": False,
        "needs": "the adapters alone",
        "parameters": {"scale": 1.0},
        "when": "the adapters are of one task",
        "source": "this test",
    }
    status, out, err = run(folder, "merge", "merge.toml", "--export", "y", "--method", "median")
    assert status == 1
    assert "method must be one of direct, element_disjoint, ortho_rows, mean, got" in err


def refused(message: str, function: Any, **fields: Any) -> None:
    before = dict(METHODS)
    with pytest.raises((TypeError, ValueError), match=message):
        register(**{"gives": Gives.FACTORS, "when": "never", "source": "", **fields})(function)
    assert before == METHODS


def test_what_cannot_be_registered() -> None:
    def direct(adapters: Sequence[Adapter]) -> None: ...

    def layers(factors: Sequence[Adapter]) -> None: ...

    def still(adapters: Sequence[Adapter]) -> None: ...

    def drawn(
        adapters: Sequence[Adapter], *, seed: int, stream: int, sample: int, strata: int
    ) -> None: ...

    def asks(adapters: Sequence[Adapter], *, density: float) -> None: ...

    def by_place(adapters: Sequence[Adapter], density: float = 0.5) -> None: ...

    refused("a merge called 'direct' is registered already", direct)
    refused(r"layers must take \(adapters, \*\)", layers)
    refused(
        r"still must take \(adapters, \*, seed, stream, sample, strata\)", still, masks="orthogonal"
    )
    refused(r"drawn must take \(adapters, \*\)", drawn)
    refused("asks must take its parameters by keyword, each with a default", asks)
    refused("by_place must take its parameters by keyword", by_place)
    refused("masks must be one of orthogonal, dropout, direct, got 'ortho'", still, masks="ortho")
    with pytest.raises(TypeError, match="a merge must be a function, got type"):
        register(gives=Gives.FACTORS, when="", source="")(dict)
    drawn.__name__ = "orthogonal"
    refused("a merge must have a name of its own, got 'orthogonal'", drawn)
    asks.__name__ = "<lambda>"
    refused("a merge must have a name of its own, got '<lambda>'", asks)
    refused("'everything' is not a valid Gives", still, gives="everything")
