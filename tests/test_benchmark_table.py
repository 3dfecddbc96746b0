"""The README's benchmark table is what the committed result file says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import record
from benchmarks.cases import CPU_CASES, DTYPES
from benchmarks.table import block, update
from benchmarks.targets import TARGETS, ratio

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def test_readme_table_agrees_with_its_result_file() -> None:
    _, wanted, found = block(README.read_text(encoding="utf-8"))
    assert found == wanted, "run: python -m benchmarks.table --update README.md"


def test_committed_result_is_whole() -> None:
    path, _, _ = block(README.read_text(encoding="utf-8"))
    result = record.load(ROOT / path)
    assert path.stem == result["kind"]
    for section in ("forward", "backward"):
        for case in CPU_CASES:
            for dtype in DTYPES:
                assert ratio(result, section, case, dtype, "ours/direct") > 0
    for target in TARGETS:
        for dtype in target.dtypes:
            assert target.value(result, dtype) >= 0


def test_another_figure_changes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _, text = block(README.read_text(encoding="utf-8"))
    result = record.load(ROOT / path)
    result["forward"][0]["ratios"]["ours/direct"]["median"] *= 1.2
    copy = tmp_path / path
    copy.parent.mkdir(parents=True)
    copy.write_text(json.dumps(result))
    monkeypatch.setattr(record, "RESULTS", tmp_path / "benchmarks" / "results")
    page = tmp_path / "README.md"
    page.write_text(text, encoding="utf-8")
    _, wanted, found = block(text)
    assert wanted != found
    update(page)
    assert page.read_text(encoding="utf-8") == wanted
