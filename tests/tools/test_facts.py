"""Compiled facts as JSON, and the pages that are rendered from them; nothing is compiled here."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import facts
import native
import pytest

KEYS = {
    *("kernel", "dtype", "draw", "adapters", "rank", "arch", "registers", "local_bytes"),
    *("instructions", "instructions_per_element"),
}


@pytest.mark.parametrize("name", facts.TABLES)
def test_the_page_is_rendered_from_the_facts(name: str) -> None:
    assert facts.section(name) == facts.TABLES[name](facts.read(name))


@pytest.mark.parametrize("name", facts.TABLES)
def test_the_file_is_as_it_would_be_written(name: str) -> None:
    read = facts.read(name)
    assert read.text() == facts.path(name).read_text(encoding="utf-8")
    assert all(row.keys() >= KEYS for row in read.kernels)


@pytest.mark.parametrize("name", facts.TABLES)
def test_one_row_for_each_kernel(name: str) -> None:
    """No two for what a reader may ask; the kernel that benchmarks ask for is among them."""
    rows = facts.read(name).kernels
    numbers = {"registers", "local_bytes", "instructions", "shared_bytes", "loads", "stores"}
    keys = [key for key in rows[0] if key not in numbers and "per_element" not in key]
    assert len({tuple(row[key] for key in keys) for row in rows}) == len(rows)
    (row,) = [
        row
        for row in facts.read(name).chosen(kernel="expand", draw="shared", dtype="bfloat16")
        if (row["adapters"], row["rank"]) == (3, 16) and row["arch"].startswith("sm_90")
    ]
    assert 5 < row["instructions_per_element"] < 24


def test_no_facts_of_what_there_is_not() -> None:
    with pytest.raises(LookupError, match=r"no facts of {'arch': 'sm_70'}"):
        facts.read("cuda").chosen(arch="sm_70")


def test_the_command_renders_both_pages(tmp_path: Path) -> None:
    """In a copy of which the tables are gone."""
    (tmp_path / "tools").mkdir()
    shutil.copy(facts.ROOT / "tools" / "facts.py", tmp_path / "tools")
    shutil.copytree(facts.ROOT / "docs" / "facts", tmp_path / "docs" / "facts")
    pages = {name: facts.page(name).read_text(encoding="utf-8") for name in facts.TABLES}
    for name, text in pages.items():
        without = text.replace(facts.section(name), "")
        (tmp_path / "docs" / facts.page(name).name).write_text(without, encoding="utf-8")
    native.run([sys.executable, tmp_path / "tools" / "facts.py"], cwd=tmp_path)
    for name, text in pages.items():
        rendered = tmp_path / "docs" / facts.page(name).name
        assert rendered.read_text(encoding="utf-8") == text
