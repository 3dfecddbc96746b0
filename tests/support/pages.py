"""The pages of the project: their blocks of code, their commands, and how those are run."""

from __future__ import annotations

import ast
import contextlib
import doctest
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from native import ROOT, environment, locked

DOCS = ROOT / "docs"
# What a page needs beside the package: module, and the distribution to install.
NEEDS = {
    "language_model": {"peft": "peft", "transformers": "transformers"},
    "command_line": {"peft": "peft", "transformers": "transformers", "matplotlib": "matplotlib"},
    "diffusers": {"peft": "peft", "diffusers": "diffusers"},
    "mergekit": {"peft": "peft", "mergekit": "mergekit"},
    "fusion_bench": {"peft": "peft", "fusion_bench": "fusion-bench"},
    "cpp": {},
    "training": {"peft": "peft", "transformers": "transformers", "accelerate": "accelerate"},
}
FENCE = re.compile(r"^```(\w*)(?: ([\w./-]+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?: {4}.*\n|\n(?= {4}))+")
FILES = ("toml", "yaml", "cpp", "cmake")


class Block(NamedTuple):
    """One fenced block: what it is, the file that it is or None, its text, its line."""

    kind: str
    file: str | None
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        kind, file, code = match.groups()
        found.append(Block(kind, file, code, text[: match.start()].count("\n") + 2))
    return found


def shell(tools: Path) -> dict[str, str]:
    """An environment for bash in which `python` and `lora-ortho` are those of this process."""
    tools.mkdir()
    programs = {"python": "", "lora-ortho": " -m lora_ortho", "pytest": " -m pytest"}
    for name, command in programs.items():
        script = tools / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}"{command} "$@"\n')
        script.chmod(0o755)
    variables = environment({"LORA_ORTHO": str(ROOT), "HF_HUB_OFFLINE": "1"})
    return {**variables, "PATH": f"{tools}{os.pathsep}{variables['PATH']}"}


def run_python(block: Block, page: Path, names: dict[str, Any]) -> str:
    """Runs a block in this process; what it printed."""
    source = "\n" * (block.line - 1) + block.text  # tracebacks then name the page's own lines
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
        with contextlib.redirect_stdout(printed):
            exec(compile(source, str(page), "exec"), names)
        printed.seek(0)
        return printed.read()


def run_shell(text: str, variables: dict[str, str], cwd: Path, where: str) -> str:
    """Runs lines in bash; what they printed. AssertionError where one fails."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=cwd, env=variables, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{where}: {done.stdout}\n{done.stderr}"
    return done.stdout


def run_page(page: Path, variables: dict[str, str], work: Path) -> None:
    """Runs a page top to bottom in a folder, which is the working directory already."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    found = blocks(page)
    assert found
    for block in found:
        where = f"{page}, line {block.line}"
        if block.kind == "python":
            printed = run_python(block, page, names)
        elif block.kind == "sh":
            builds = "cmake --preset release" in block.text  # in the sources, as other tests do
            with locked("release") if builds else contextlib.nullcontext():
                printed = run_shell(block.text, variables, work, where)
        elif block.kind == "text":
            same = doctest.OutputChecker().check_output(
                block.text, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            )
            assert same, f"{where}: printed\n{printed}"
        else:
            assert block.kind in FILES, f"{where}: a block of {block.kind!r}"
            assert block.file, f"{where}: a {block.kind} block needs a file name"
            (work / block.file).write_text(block.text, encoding="utf-8")


_PROGRAMS = r"(lora-ortho|python3?|make|pytest|pip|cmake|ctest|pkg-config|nvcc)"


def commands(page: Path) -> list[str]:
    """Every line of its sh and indented blocks, and every command in its prose.

    Comments are left out. An indented block that begins with no program is one entry, by its first
    line.
    """
    text = page.read_text(encoding="utf-8")
    found = [line for block in blocks(page) if block.kind == "sh" for line in _lines(block.text)]
    found += [f"```{block.text.splitlines()[0]}" for block in blocks(page) if not block.kind]
    for match in INDENTED.finditer(FENCE.sub("", text)):
        lines = _lines(match[0])
        found += lines if re.match(rf"{_PROGRAMS}\b", lines[0]) else lines[:1]
    found += [words for words in spans(page) if re.match(rf"{_PROGRAMS} ", words)]
    return list(dict.fromkeys(found))


def spans(page: Path) -> list[str]:
    """What stands between backquotes in the prose of a page."""
    prose = INDENTED.sub("", FENCE.sub("", page.read_text(encoding="utf-8")))
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def call(words: str) -> ast.Call | None:
    """A call with arguments as Python reads it; None for anything else."""
    try:
        parsed = ast.parse(words, mode="eval").body
    except SyntaxError:
        return None
    has_arguments = isinstance(parsed, ast.Call) and bool(parsed.args or parsed.keywords)
    return parsed if isinstance(parsed, ast.Call) and has_arguments else None


def _lines(text: str) -> list[str]:
    """Lines without comments, and those that are not empty."""
    bare = (re.sub(r"(^|\s+)# .*$", "", line).strip() for line in text.splitlines())
    return [line for line in bare if line]
