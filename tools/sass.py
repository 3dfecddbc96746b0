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
    """One kernel.

    Attributes:
        code: its instructions as text.
        targets: where the branches among them lead, by index.
        loops: those of the outermost level.
    """

    name: str
    code: list[str]
    targets: dict[int, int]
    loops: list[Loop]


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
        targets: dict[int, int] = {}
        for at, line in enumerate(code):
            found = _TARGET.search(line) if re.search(r"\bBRA\b", line) else None
            if found and found[1] in labels:
                targets[at] = labels[found[1]]
        yield Kernel(part.split(",")[0].strip(), code, targets, _loops(targets))


def _loops(targets: dict[int, int]) -> list[Loop]:
    """Every backward branch closes a loop; those that begin alike are one."""
    ends: dict[int, int] = {}
    for at, target in targets.items():
        if target < at:
            ends[target] = max(ends.get(target, 0), at + 1)
    outermost: list[Loop] = []
    for begin, end in sorted(ends.items(), key=lambda item: (item[0], -item[1])):
        level = outermost
        while level and begin < level[-1].end:
            level = level[-1].inside
        level.append(Loop(begin, end))
    return outermost
