"""Every page in docs/ runs as it is written, top to bottom, in an empty folder.

In a fenced block the first word says what it is: python runs in this process, sh runs in bash, text
is what the block before it printed (`...` stands for anything), and a block with a file name after
its language is that file.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from native import ROOT
from pages import DOCS, FENCE, NEEDS, blocks, run_page, shell

from lora_ortho.merge_config import Lora, MergeConfig

EXAMPLES = ROOT / "examples" / "plugins"
# Every page that people read.
WRITTEN = sorted(
    page
    for folder in (ROOT, DOCS, ROOT / "benchmarks", ROOT / "examples", ROOT / "examples" / "texts")
    for page in folder.glob("*.md")
)


@pytest.mark.parametrize("name", NEEDS)
def test_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, distribution in NEEDS[name].items():
        if module not in sys.modules and importlib.util.find_spec(module) is None:
            pytest.skip(f"docs/{name}.md: {distribution} is not installed")
    if name == "cpp" and shutil.which("c++") is None:
        pytest.skip("docs/cpp.md: there is no C++ compiler")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    run_page(DOCS / f"{name}.md", shell(tmp_path / "tools"), work)


def test_every_page_with_code_is_run() -> None:
    assert {page.stem for page in DOCS.glob("*.md") if blocks(page)} == set(NEEDS)


def test_examples_on_pages_are_the_files() -> None:
    shown = {
        block.file: block.text
        for page in DOCS.glob("*.md")
        for block in blocks(page)
        if block.file and page.stem in ("mergekit", "fusion_bench")
    }
    assert shown == {path.name: path.read_text(encoding="utf-8") for path in EXAMPLES.iterdir()}


def test_every_key_of_a_merge_is_on_the_page() -> None:
    text = (DOCS / "command_line.md").read_text(encoding="utf-8")
    table = "".join(line for line in text.splitlines() if line.startswith("|"))
    keys = {f.name for record in (MergeConfig, Lora) for f in fields(record)} - {"folder"}
    missing = {key for key in keys if f"`{key}`" not in table and key != "loras"}
    assert not missing


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub names them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """To a file, and to one of its headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s:]+)\)", text):
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def generator() -> Any:
    spec = importlib.util.spec_from_file_location("make_pages", DOCS / "make_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_current() -> None:
    for name, make in generator().PAGES.items():
        assert (DOCS / name).read_text(encoding="utf-8") == make(), f"docs/{name}: run `make docs`"


def test_every_public_name_is_in_the_api() -> None:
    headings = re.findall(r"^### (\w+)$", (DOCS / "api.md").read_text("utf-8"), re.MULTILINE)
    import lora_ortho

    modules = {"backends", "mask_stream"}
    assert set(lora_ortho.__all__) - modules <= set(headings)
