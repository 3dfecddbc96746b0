"""What the compiler made of the CUDA kernels: registers, spills, widths, instructions per element.

``python tests/support/cuda_facts.py`` compiles them and writes the table into docs/cuda_kernels.md.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import sass
from native import ROOT, build, run

PAGE = ROOT / "docs" / "cuda_kernels.md"
BEGIN, END = "<!-- facts: begin -->\n", "<!-- facts: end -->\n"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")

_NAME = re.compile(r"(\w+?)_kernelI(?:NS0_\d+(\w+?)E|(f))((?:Lb[01]E)*)E")
_MANGLED = re.compile(r"^_ZN10lora_ortho4cuda\d+")
_MEANING = {
    "expand": ("orthogonal", "staged"),
    "shrink": ("masked", "wide"),
}


@dataclass(frozen=True)
class Fact:
    """One kernel on one architecture."""

    architecture: str
    kernel: str  # "expand orthogonal staged"
    dtype: str
    registers: int
    local: int  # bytes of stack and local memory
    instructions: int
    code: sass.Kernel


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit, or the one that triton's wheel carries."""
    for folder in (None, "/usr/local/cuda/bin"):
        if found := shutil.which(name, path=folder):
            return found
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
    return str(path) if os.access(path, os.X_OK) else None


def missing() -> str | None:
    """Why there can be no facts here; None where there can."""
    if shutil.which("nvcc") is None:
        return "nvcc is not installed"
    absent = [name for name in ("cuobjdump", "nvdisasm") if tool(name) is None]
    return f"{' and '.join(absent)} not found" if absent else None


@cache
def library() -> Path:
    """The shared library with CUDA kernels for every architecture; built once."""
    return build("cuda") / "csrc" / "liblora_ortho.so"


@cache
def facts() -> tuple[Fact, ...]:
    """Every kernel on every architecture, in the order of the table."""
    cuobjdump = tool("cuobjdump") or ""
    with tempfile.TemporaryDirectory() as folder:
        run([cuobjdump, "--extract-elf", "all", library()], cwd=Path(folder))
        found = [fact for path in sorted(Path(folder).glob("*.cubin")) for fact in _cubin(path)]
    return tuple(sorted(found, key=_order))


def _order(fact: Fact) -> tuple[str, int, str]:
    return (fact.kernel, ARCHITECTURES.index(fact.architecture), fact.dtype)


def _cubin(path: Path) -> Iterator[Fact]:
    architecture = re.search(r"sm_\d+a?", path.name)
    assert architecture
    usage = run([tool("cuobjdump") or "", "--dump-resource-usage", path])
    numbers = dict(re.findall(r"Function (\S+):\s+(REG.*)", usage))
    for code in sass.kernels(run([tool("nvdisasm") or "", "-c", path])):
        name, used = _NAME.search(_MANGLED.sub("", code.name)), numbers[code.name]
        assert name, code.name
        words = _MEANING.get(name[1], ())
        flags = re.findall(r"Lb([01])E", name[4])
        chosen = [w if flag == "1" else f"not {w}" for w, flag in zip(words, flags, strict=True)]
        field = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", used)}
        yield Fact(
            architecture[0],
            " ".join([name[1], *chosen]),
            (name[2] or "float32").lower(),
            field["REG"],
            field["STACK"] + field["LOCAL"],
            len(code.code),
            code,
        )


@dataclass(frozen=True)
class Expand:
    """The loop of an expand kernel over blocks of eight columns, ranks up to one step of 16.

    Attributes:
        elements: outputs of a thread in one turn.
        fixed: instructions of a turn beside the adapters after the first.
        adapter: instructions of each adapter after the first.
        skipped: those of ``fixed`` that do not run where the keep probabilities sum to 1.
    """

    elements: int
    fixed: int
    adapter: int
    skipped: int
    accesses: tuple[str, ...]

    def per_element(self, adapters: int, *, full: bool) -> float:
        """Instructions per output element; ``full``: the keep probabilities sum to 1."""
        total = self.fixed + self.adapter * (adapters - 1) - (self.skipped if full else 0)
        return total / self.elements


def expand_loop(code: sass.Kernel) -> Expand:
    """Counts an orthogonal expand kernel's loop: it is the innermost that stores to memory."""

    def part(loop: sass.Loop) -> list[str]:
        return code.code[loop.begin : loop.end]

    def stores(loop: sass.Loop) -> bool:
        return any("HMMA" in x for x in part(loop)) and any("STG" in x for x in part(loop))

    (loop,) = [loop for loop in code.loops if stores(loop)]
    while inner := [each for each in loop.inside if stores(each)]:
        (loop,) = inner
    (adapters,) = [each for each in loop.inside if each.inside]
    own = [
        i
        for i in range(loop.begin, loop.end)
        if not any(each.begin <= i < each.end for each in loop.inside)
    ]
    products = sum("HMMA" in code.code[i] for i in own)
    return Expand(
        4 * products,  # a product of 16 x 8 outputs by 32 threads
        loop.own(),
        adapters.own(),
        _selects(code, own),
        tuple(code.code[i] for i in own if re.search(r"\b(LDG|STG)\b", code.code[i])),
    )


def _selects(code: sass.Kernel, own: list[int]) -> int:
    """Length of the part that only compares and selects and is jumped over as a whole."""
    best = 0
    for i in own:
        target = code.targets.get(i, 0)
        part = code.code[i + 1 : target]
        plain = all(re.search(r"\b(ISETP|FSEL|SEL|IMAD|SHF|PLOP3|MOV)\b", line) for line in part)
        if part and plain and any("FSEL" in line or "SEL" in line for line in part):
            best = max(best, len(part))
    return best


def table() -> str:
    """The facts as two Markdown tables."""
    lines = [
        "| expand, K = 3, r = 16 | keep probabilities sum to 1 | to less |",
        "|---|---|---|",
    ]
    for fact in facts():
        if fact.kernel == "expand orthogonal staged" and fact.dtype != "float32":
            count = expand_loop(fact.code)
            full, partly = (count.per_element(3, full=full) for full in (True, False))
            lines.append(f"| {fact.dtype}, {fact.architecture} | {full:.1f} | {partly:.1f} |")
    lines += [
        "",
        "| kernel | dtype | registers: " + ", ".join(ARCHITECTURES) + " | instructions | local |",
        "|---|---|---|---|---|",
    ]
    rows: dict[tuple[str, str], list[Fact]] = {}
    for fact in facts():
        rows.setdefault((fact.kernel, fact.dtype), []).append(fact)
    for (kernel, dtype), each in rows.items():
        columns = [
            ", ".join(str(f.registers) for f in each),
            ", ".join(str(f.instructions) for f in each),
            ", ".join(sorted({str(f.local) for f in each})),
        ]
        lines.append(f"| {kernel} | {dtype} | {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def committed() -> str:
    """The table as docs/cuda_kernels.md has it."""
    return PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


def main() -> None:
    """Writes the table into its page."""
    if reason := missing():
        sys.exit(f"no facts: {reason}")
    text = PAGE.read_text(encoding="utf-8")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text(head + BEGIN + table() + END + tail, encoding="utf-8")
    os.replace(temporary, PAGE)


if __name__ == "__main__":
    main()
