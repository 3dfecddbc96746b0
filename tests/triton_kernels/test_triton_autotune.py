"""Optional tuning of the Triton kernels: what it picks, what it keeps, that it changes no bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cases import make, same_rank

from lora_ortho.backends import triton as backend
from lora_ortho.packing import PackedAdapters

if backend.unavailable() is not None or not backend.interpreted():
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

from lora_ortho.triton_kernels import autotune
from lora_ortho.triton_kernels.launch_config import Expand, Gpu, Sizes, expand, tile_counts

GPU = Gpu("sm_90", 132)
SIZES = Sizes(tokens=8192, d_out=4096, adapters=3, width=16, itemsize=2)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Tuning on, nothing known, a cache folder of its own."""
    monkeypatch.setenv(autotune.VARIABLE, "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "_key", lambda gpu, device, sizes, draw: f"{draw} {sizes}")
    forget()
    yield
    forget()


def forget() -> None:
    """As in a new process."""
    autotune._known.clear()
    autotune._files_read.clear()


def tune(monkeypatch: pytest.MonkeyPatch, fastest: int | None) -> tuple[Expand, list[int]]:
    """The choice where one number of tiles is the fastest, and what was timed for it."""
    timed: list[int] = []

    def measure(run: Callable[[], None], gpu: Gpu) -> float:
        run()
        return 1.0 if timed[-1] == fastest else 2.0

    monkeypatch.setattr(autotune, "measure", measure)
    default = expand(GPU, SIZES)
    choice = autotune.tuned(
        default, GPU, CPU, SIZES, "shared", lambda config: timed.append(config.tiles)
    )
    assert {**vars(choice), "tiles": 0} == {**vars(default), "tiles": 0}
    return choice, timed


@pytest.mark.parametrize("fastest", tile_counts(expand(GPU, SIZES), SIZES))
def test_the_fastest_is_taken_and_kept(monkeypatch: pytest.MonkeyPatch, fastest: int) -> None:
    choice, timed = tune(monkeypatch, fastest)
    assert choice.tiles == fastest
    assert timed == [1, 2, 4, 8]
    for _ in range(2):
        assert tune(monkeypatch, None) == (choice, [])
        forget()  # the second time the file knows it
    assert list(autotune.cache_path().parent.iterdir()) == [autotune.cache_path()]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 0, "tiles": {}}', '{"format": 1, "tiles": 3}']
)
def test_a_file_of_another_format_is_replaced(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    path = autotune.cache_path()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.warns(UserWarning, match="no tuning of this version"):
        assert tune(monkeypatch, 2)[0].tiles == 2
    assert list(json.loads(path.read_text())["tiles"].values()) == [2]


@pytest.mark.parametrize("count", [0, 3, 64, "8", None])
def test_a_count_that_may_not_be_is_tuned_anew(
    monkeypatch: pytest.MonkeyPatch, count: object
) -> None:
    tune(monkeypatch, 4)
    content = json.loads(autotune.cache_path().read_text())
    content["tiles"] = dict.fromkeys(content["tiles"], count)
    autotune.cache_path().write_text(json.dumps(content))
    forget()
    assert tune(monkeypatch, 8)[0].tiles == 8


def test_a_folder_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "lora_ortho").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="for this process only"):
        assert tune(monkeypatch, 1)[0].tiles == 1
    assert tune(monkeypatch, None)[1] == []


def test_tuned_calls_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is picked, also where the output is written over base."""
    tensors = make(same_rank(33, 20, 300, 3, 8), torch.bfloat16)
    prepared = PackedAdapters(tensors.lora_A, tensors.lora_B, torch.bfloat16, backend="triton")
    assert tensors.base is not None
    monkeypatch.setenv(autotune.VARIABLE, "0")
    plain = prepared.apply(tensors.x, tensors.base, 5)
    assert not autotune.cache_path().exists()
    monkeypatch.setenv(autotune.VARIABLE, "1")
    for fastest in (0, 1):
        forget()
        autotune.cache_path().unlink(missing_ok=True)
        times = iter([1.0, 0.5] if fastest else [0.5, 1.0])
        monkeypatch.setattr(autotune, "measure", lambda run, gpu, t=times: run() or next(t, 9.0))
        base = tensors.base.clone()
        assert prepared.apply(tensors.x, base, 5, out=base) is base
        assert torch.equal(base, plain)
        assert list(autotune._known.values()) == [1 + fastest]
