"""Result files are read by their types, written whole, and joined only where they fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmark_results import empty, synthetic, synthetic_gpu, timed
from native import ROOT

from benchmarks import record
from benchmarks.cases import CPU_CASES, DTYPES
from benchmarks.record import ModelRow, OpShare, Quartiles, Stage, ThreadsRow, Unmeasured
from benchmarks.targets import View, judged, targets_of

CASE = CPU_CASES[2]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    """Rows of every type, on a processor and on a GPU."""
    result = synthetic()
    q = Quartiles(1.0, 0.5, 2.0, 7)
    result.threads.append(
        ThreadsRow(case=CASE, dtype="float32", backend="cpu", threads=2, speedup={"ours": q})
    )
    result.model.append(
        ModelRow(
            model="m",
            step="forward",
            tokens=8,
            dtype="float32",
            backend="cpu",
            seconds={"ours": q},
            profile=[OpShare("aten::mm", 0.75)],
            ours_share=0.25,
        )
    )
    result.unmeasured.append(Unmeasured("layer", CASE, "float32", "cpu", "failed: why"))
    stage = Stage("build", "ok", 1.5, "")
    for number, one in enumerate((replace(result, targets=judged(result)), synthetic_gpu())):
        path = tmp_path / f"{number}.json"
        record.save(replace(one, stages=[stage], interrupted=True), path)
        assert record.load(path) == replace(one, stages=[stage], interrupted=True)


def _written(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    path = tmp_path / "result.json"
    record.save(synthetic(), path)
    return path, json.loads(path.read_text())


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("case", "1x2", r"forward\[0\]\.case case must read"),
        ("dtype", 1, r"forward\[0\]\.dtype must be of type str: 1"),
        ("seconds", {"ours": 1.0}, r"forward\[0\]\.seconds\.ours must be of type Quartiles"),
        ("others_cores", float("nan"), r"others_cores must be of type float: nan"),
        ("floor", {"bytes": 1}, r"forward\[0\]\.floor lacks operations"),
        ("others", 0.0, r"forward\[0\] has what is not known: others"),
        ("seconds", None, r"forward\[0\]\.seconds must be of type"),
    ],
)
def test_a_file_of_another_form_is_refused_by_its_place(
    tmp_path: Path, where: str, value: object, message: str
) -> None:
    path, found = _written(tmp_path)
    found["forward"][0][where] = value
    path.write_text(json.dumps(found))
    with pytest.raises(record.ResultError, match=message):
        record.load(path)


def test_a_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    path, found = _written(tmp_path)
    for schema in (2, None):
        path.write_text(json.dumps(found | {"schema": schema}))
        with pytest.raises(record.ResultError, match="not a benchmark result of schema 3"):
            record.load(path)
    del found["machine"]
    for text, message in ((json.dumps(found), "lacks machine"), ("{", "Expecting"), ("1", "not a")):
        path.write_text(text)
        with pytest.raises(record.ResultError, match=message):
            record.load(path)
    with pytest.raises(record.ResultError, match="there is no such file"):
        record.load(tmp_path / "absent.json")


def test_result_files_join_only_when_of_one_machine() -> None:
    old, new = empty("cpu-x"), empty("cpu-x")
    old.forward.extend([timed(CASE, 1.0), timed(CASE, 1.0, dtype="bfloat16")])
    new.forward.append(timed(CASE, 2.0))
    new.unmeasured.append(Unmeasured("layer", CASE, "float32", "cpu", "failed: why"))
    joined = record.join(old, new)
    assert joined.forward == [new.forward[0], old.forward[1]]
    assert joined.unmeasured == new.unmeasured
    other = replace(new, versions={**new.versions, "torch": "0"})
    with pytest.raises(record.ResultError, match="versions"):
        record.join(old, other)


def test_committed_results_are_whole() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        result = record.load(path)
        assert path.stem == result.kind
        if not result.kind.startswith("cpu"):
            continue
        for dtype in DTYPES:
            view = View(result, dtype, "cpu")
            for section in ("forward", "backward"):
                for case in CPU_CASES:
                    assert view.ratio(section, case, "ours/direct") > 0
            for target in targets_of(result):
                if dtype in target.dtypes:
                    assert target.value(view) >= 0
