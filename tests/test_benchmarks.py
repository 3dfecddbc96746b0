"""The benchmark harness: contenders are checked before they are timed, result files kept whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import checks, peers, record, sections
from benchmarks.bench_cpu import main
from benchmarks.cases import DTYPES, Case, Inputs, make
from benchmarks.harness import Effort
from benchmarks.table import update

SMALL = Case(24, 64, 160, 3, 4)


def test_page_without_markers_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("no table here")
    with pytest.raises(record.ResultError, match="mark"):
        update(page)
    assert page.read_text() == "no table here"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_contender_computes_what_it_should(dtype: str) -> None:
    effort = Effort(0.0, round_seconds=1e-6, least=1)
    rows = [
        sections.forward(SMALL, dtype, effort),
        sections.backward(SMALL, dtype, effort),
        sections.slow_peers(SMALL, dtype, effort, compiled=False),
    ]
    for row in rows:
        assert row["refused"] == {}
        assert row["ratios"]


def test_a_wrong_result_is_refused_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = peers.ours

    def wrong(inputs: Inputs) -> peers.Forward:
        call = right(inputs)

        def one_element_off() -> Tensor:
            y = call()
            y[3, 7] += 0.5
            return y

        return one_element_off

    monkeypatch.setattr(peers, "ours", wrong)
    row = sections.forward(SMALL, "float32", Effort(0.0, least=1))
    assert "wrong result" in row["refused"]["ours"]
    assert "ours" not in row["seconds"]
    assert row["ratios"] == {}


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_of_another_seed_are_noticed(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, masks = make(SMALL, DTYPES[dtype]), checks.orthogonal(SMALL)
    monkeypatch.setattr(peers, "SEED", 1)
    with torch.no_grad(), pytest.raises(checks.WrongResult):
        checks.check_forward(peers.ours(inputs)(), inputs, masks)


def test_unequal_shares_are_noticed() -> None:
    inputs = make(SMALL, torch.float32)
    x, A, B = inputs.x, inputs.lora_A, inputs.lora_B
    with pytest.raises(checks.WrongResult, match="shares"):
        checks.check_random(inputs.base + 3 * (x @ A[0].T @ B[0].T), inputs)


def test_result_files_join_only_when_of_one_machine(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    row = {"case": str(SMALL), "dtype": "float32", "ratios": {}}
    old = record.empty()
    old["forward"] = [row, {**row, "dtype": "bfloat16"}]
    record.save(old, path)
    new = record.empty()
    new["forward"] = [{**row, "others": 0.5}]
    joined = record.join(record.load(path), new)
    assert joined["forward"] == [new["forward"][0], old["forward"][1]]
    new["versions"] = {**new["versions"], "torch": "0"}
    with pytest.raises(record.ResultError, match="versions"):
        record.join(record.load(path), new)
    path.write_text('{"schema": 0}')
    with pytest.raises(record.ResultError, match="schema"):
        record.load(path)


@pytest.mark.parametrize("arguments", [["--case", "1x2"], ["--append"], ["--only", "nothing"]])
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2


def test_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("mine")
    with pytest.raises(SystemExit):
        main(["--json", str(path)])
    assert path.read_text() == "mine"
