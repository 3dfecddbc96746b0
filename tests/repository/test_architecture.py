"""Every file, function, command and name on docs/architecture.md is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from native import ROOT
from pages import FENCE, INDENTED

PAGE = ROOT / "docs" / "architecture.md"
FOLDERS = (
    "lora_ortho",
    "triton_kernels",
    "csrc",
    "benchmarks",
    "tools",
    "tests",
    "docs",
    "examples",
)
SOURCES = {".py", ".h", ".cpp", ".cu", ".c", ".txt", ".cmake"}
_PATH = re.compile(r"[\w.-]+(/[\w.-]+)*(/|\.\w+)|Makefile")
_NAME = re.compile(r"[A-Za-z_]\w*")
_SCOPE = re.compile(r"\n\s*\n|\n(?=- |#|\|)|\|")  # paragraphs, list items, cells of tables


def scopes(text: str) -> Iterator[list[str]]:
    """What stands between backquotes, of each paragraph, list item and cell of a table."""
    prose = INDENTED.sub("", FENCE.sub("", text))
    for scope in _SCOPE.split(prose):
        if spans := [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", scope)]:
            yield spans


def is_command(span: str) -> bool:
    return span.startswith(("make ", "pytest ", "python ", "cmake ", "lora-ortho"))


def is_path(span: str) -> bool:
    return _PATH.fullmatch(span) is not None


def text_of(path: Path) -> str:
    """A file, or all sources in a folder."""
    if path.is_file():
        return path.read_text(encoding="utf-8")
    files = (file for file in sorted(path.rglob("*")) if file.suffix in SOURCES)
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def problems(text: str) -> Iterator[str]:
    """What a page says that is not so."""
    for spans in scopes(text):
        paths = [ROOT / span for span in spans if is_path(span)]
        yield from (f"there is no {path.relative_to(ROOT)}" for path in paths if not path.exists())
        places = [path for path in paths if path.exists()] or [ROOT / name for name in FOLDERS]
        for span in spans:
            if is_command(span):
                yield from wrong_command(span)
            elif not is_path(span):
                yield from unknown_name(span, places)


def wrong_command(command: str) -> Iterator[str]:
    program, *words = command.split()
    if program == "pytest":
        yield from (f"there is no {word}" for word in words if not (ROOT / word).exists())
    if program == "python" and words[0] != "-m":
        yield from (f"there is no {word}" for word in words[:1] if not (ROOT / word).exists())
    elif program == "python":
        module = ROOT / words[1].replace(".", "/")
        if not module.with_suffix(".py").exists() and not (module / "__main__.py").exists():
            yield f"there is no module {words[1]}"
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        yield from (f"there is no target {word}" for word in words if word not in targets)
    if program == "cmake":
        presets = (ROOT / "CMakePresets.json").read_text("utf-8")
        if f'"name": "{words[-1]}"' not in presets:
            yield f"there is no preset {words[-1]}"
    if program == "lora-ortho":
        files = {path.stem for path in (ROOT / "lora_ortho" / "cli").glob("*.py")}
        yield from (f"there is no command {word}" for word in words if word not in files)


def unknown_name(name: str, places: list[Path]) -> Iterator[str]:
    if not _NAME.fullmatch(name):
        yield f"{name!r} is no name, file or command"
    elif not any(re.search(rf"\b{name}\b", text_of(place)) for place in places):
        found = ", ".join(str(place.relative_to(ROOT)) for place in places)
        yield f"{name} is not in {found}"


def test_everything_on_the_page_is_there() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert sum(len(spans) for spans in scopes(text)) > 150
    assert list(problems(text)) == []


@pytest.mark.parametrize(
    "wrong",
    [
        "`csrc/nowhere.h`",
        "`lora_ortho/nowhere/`",
        "`lora_ortho/module.py`: `not_in_the_module`",
        "| `lora_ortho/module.py`: `load_adapter` | `lora_ortho/__init__.py` |",  # in the other
        "`make nothing`",
        "`pytest tests/nowhere`",
        "`lora-ortho nothing`",
        "`python -m benchmarks.nothing`",
        "`python tools/nothing.py`",
        "`cmake --preset nothing`",
        "`s = x A`",
    ],
)
def test_what_is_not_there_is_noticed(wrong: str) -> None:
    assert list(problems(wrong)) != []


def test_every_folder_of_sources_is_on_the_map() -> None:
    """Folders of the package, and those that hold more than one file of sources."""
    text = PAGE.read_text(encoding="utf-8")
    folders = [folder for name in FOLDERS[:5] for folder in [ROOT / name, *(ROOT / name).iterdir()]]
    for folder in folders:
        if folder.is_dir() and len([p for p in folder.iterdir() if p.suffix in SOURCES]) > 1:
            inside = f"`{folder.relative_to(ROOT)}"
            assert inside in text, f"{inside}/` is not on the map"


def test_every_step_has_a_function_for_every_device() -> None:
    steps = ("shrink", "expand", "grad_s", "grad_B", "grad_x", "grad_A", "grad_gains", "sum_parts")
    rows = {
        row[1]: row[0] for row in re.finditer(r"^\| (\w+) \|.*$", PAGE.read_text("utf-8"), re.M)
    }
    for step in steps:
        assert rows[step].count("|") == 6, step
