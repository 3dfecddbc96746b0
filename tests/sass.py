"""Reading machine code: loops, how deep they nest, and what is in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_TARGET = re.compile(r"\(?(\.L_x_\d+)\)?")


@dataclass
class Loop:
    """Instructions [begin, end) and the loops inside."""

    begin: int
    end: int
    inside: list[Loop] = field(default_factory=list)

    def own(self) -> int:
        """Instructions that are in no inner loop."""
        return self.end - self.begin - sum(loop.end - loop.begin for loop in self.inside)


@dataclass
class Kernel:
    """One kernel: its instructions as text, and the loops of the outermost level."""

    name: str
    code: list[str]
    loops: list[Loop]

    def count(self, pattern: str) -> int:
        """How many instructions match a regular expression."""
        return sum(re.search(pattern, line) is not None for line in self.code)


def kernels(listing: str) -> Iterator[Kernel]:
    """The kernels in what ``nvdisasm`` prints about a cubin."""
    for part in re.split(r"^\s*\.section\s+\.text\.", listing, flags=re.MULTILINE)[1:]:
        labels: dict[str, int] = {}
        code: list[str] = []
        for line in part.splitlines():
            if found := _LABEL.match(line):
                labels[found[1]] = len(code)
            elif found := _INSTRUCTION.match(line):
                code.append(found[2])
        while code and re.search(r"\bNOP\b", code[-1]):
            code.pop()
        yield Kernel(part.split(",")[0].strip(), code, _loops(code, labels))


def _loops(code: list[str], labels: dict[str, int]) -> list[Loop]:
    """Every backward branch closes a loop; those that begin alike are one."""
    ends: dict[int, int] = {}
    for at, line in enumerate(code):
        if not re.search(r"\bBRA\b", line):
            continue
        found = _TARGET.search(line)
        target = labels.get(found[1], at) if found else at
        if target < at:
            ends[target] = max(ends.get(target, 0), at + 1)
    outermost: list[Loop] = []
    for begin, end in sorted(ends.items(), key=lambda item: (item[0], -item[1])):
        level = outermost
        while level and begin < level[-1].end:
            level = level[-1].inside
        level.append(Loop(begin, end))
    return outermost
