"""Every page in docs/ runs as it is written, top to bottom, in an empty folder.

In a fenced block the first word says what it is: python runs in this process, sh runs in bash, text
is what the block before it printed (`...` stands for anything), and a block with a file name after
its language is that file.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from native import ROOT, environment, locked

from lora_ortho.cli.merge_config import Lora, MergeConfig

DOCS = ROOT / "docs"
EXAMPLES = ROOT / "examples" / "plugins"
FENCE = re.compile(r"^```(\w+)(?: ([\w./-]+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILES = ("toml", "yaml", "cpp", "cmake")
# What a page needs beside the package: module, and the distribution to install.
NEEDS = {
    "language_model": {"peft": "peft", "transformers": "transformers"},
    "command_line": {"peft": "peft", "transformers": "transformers", "matplotlib": "matplotlib"},
    "diffusers": {"peft": "peft", "diffusers": "diffusers"},
    "mergekit": {"peft": "peft", "mergekit": "mergekit"},
    "fusion_bench": {"peft": "peft", "fusion_bench": "fusion-bench"},
    "cpp": {},
    "training": {},
}


class Block(NamedTuple):
    """One fenced block: what it is, the file that it is or None, its text, its line."""

    kind: str
    file: str | None
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        kind, file, code = match.groups()
        found.append(Block(kind, file, code, text[: match.start()].count("\n") + 2))
    return found


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment for bash in which `python` and `lora-ortho` are those of this process."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, command in (("python", ""), ("lora-ortho", " -m lora_ortho")):
        script = tools / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}"{command} "$@"\n')
        script.chmod(0o755)
    variables = environment({"LORA_ORTHO": str(ROOT), "HF_HUB_OFFLINE": "1"})
    return {**variables, "PATH": f"{tools}{os.pathsep}{variables['PATH']}"}


def run_python(block: Block, page: Path, names: dict[str, Any]) -> str:
    printed = io.StringIO()
    source = "\n" * (block.line - 1) + block.text  # tracebacks then name the page's own lines
    with contextlib.redirect_stdout(printed):
        exec(compile(source, str(page), "exec"), names)
    return printed.getvalue()


def run_shell(block: Block, variables: dict[str, str], cwd: Path) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=cwd, env=variables, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"line {block.line}: {done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("name", NEEDS)
def test_page_runs(
    name: str, tmp_path: Path, shell: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, distribution in NEEDS[name].items():
        if module not in sys.modules and importlib.util.find_spec(module) is None:
            pytest.skip(f"docs/{name}.md: {distribution} is not installed")
    if name == "cpp" and shutil.which("c++") is None:
        pytest.skip("docs/cpp.md: there is no C++ compiler")
    page, names, printed = DOCS / f"{name}.md", {"__name__": "__main__"}, ""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    found = blocks(page)
    assert found
    for block in found:
        if block.kind == "python":
            printed = run_python(block, page, names)
        elif block.kind == "sh":
            builds = "cmake --preset release" in block.text  # in the sources, as other tests do
            with locked("release") if builds else contextlib.nullcontext():
                printed = run_shell(block, shell, work)
        elif block.kind == "text":
            same = doctest.OutputChecker().check_output(
                block.text, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            )
            assert same, f"{page}, line {block.line}: printed\n{printed}"
        else:
            assert block.kind in FILES, f"{page}, line {block.line}: a block of {block.kind!r}"
            assert block.file, f"{page}, line {block.line}: a {block.kind} block needs a file name"
            (work / block.file).write_text(block.text, encoding="utf-8")


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


def test_links_between_pages_lead_somewhere() -> None:
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


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
