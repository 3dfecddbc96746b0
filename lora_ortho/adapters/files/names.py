"""What adapters are called where nobody named them: whole names of folders and files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import PurePath

from .image_file import DIFFUSERS_FILE
from .peft_folder import TENSOR_FILE

_ENDING = ".safetensors"  # the only ending that is taken off: names have dots of their own
_CACHED = "models--"  # before OWNER--NAME, how the hub's cache calls a repository


def title_of(path: str | os.PathLike[str]) -> str:
    """The name of a folder or file: a link's own; in the hub's cache the repository's."""
    return titles([path])[0]


def titles(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Names for several: of those that are alike, as much of the path as tells them apart.

    Equal paths have equal names.
    """
    whole = [_levels(path) for path in paths]
    found = [(*levels[:-1], levels[-1].removesuffix(_ENDING) or _ENDING) for levels in whole]
    if len(set(found)) < len(set(whole)):  # a folder and a file that differ in the ending alone
        found = whole
    names = [levels[-1] for levels in found]
    for depth in range(2, max(map(len, found), default=0) + 1):
        pairs = set(zip(names, found, strict=True))
        alike = {name for name in names if sum(other == name for other, _ in pairs) > 1}
        longer = ("/".join(levels[-depth:]) for levels in found)
        names = [one if n in alike else n for n, one in zip(names, longer, strict=True)]
    return names


def _levels(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The levels of a path without what names no adapter."""
    parts = PurePath(os.path.abspath(path)).parts
    if len(parts) > 1 and parts[-1] in (TENSOR_FILE, DIFFUSERS_FILE):
        parts = parts[:-1]
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith(_CACHED):
        parts = (*parts[:-3], *parts[-3].removeprefix(_CACHED).split("--"))
    return parts
