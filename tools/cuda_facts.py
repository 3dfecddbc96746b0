"""What the compiler made of the CUDA kernels: registers, spills, widths, instructions per element.

``python tools/cuda_facts.py`` compiles them and writes docs/facts/cuda.json and the tables of
docs/cuda_kernels.md.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import facts
import sass

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")

_NAME = re.compile(r"(\w+?)_kernelI(?:NS0_\d+(\w+?)E|(f))((?:Lb[01]E)*)E")
_MANGLED = re.compile(r"^_ZN10lora_ortho4cuda\d+")
# What each Boolean template parameter tells: a key of the row, its values for false and for true.
_WIDTHS = (("variant", ("narrow", "wide")),)
_FLAGS = {
    "expand": (("draw", ("none or own", "shared")), ("variant", ("direct", "staged"))),
    "shrink": _WIDTHS,
    "grad_s": _WIDTHS,
}


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture: its row of facts, and its machine code."""

    row: facts.Row
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


def compiler() -> str:
    """The name of the compiler and the version that decides what it makes."""
    version = re.search(r"release (\d+\.\d+)", output(["nvcc", "--version"]))
    assert version
    return f"nvcc {version[1]}"


def kernels(library: Path) -> list[Kernel]:
    """Every kernel of a library on every architecture, in the order of the file."""
    with tempfile.TemporaryDirectory() as folder:
        output([tool("cuobjdump") or "", "--extract-elf", "all", library.resolve()], Path(folder))
        found = [each for path in sorted(Path(folder).glob("*.cubin")) for each in _cubin(path)]
    return sorted(found, key=_order)


def collect(found: Sequence[Kernel]) -> facts.Facts:
    """The facts of all kernels."""
    return facts.Facts(compiler(), [each.row for each in found])


def output(command: Sequence[str | Path], folder: Path | None = None) -> str:
    """What a program prints; CalledProcessError where it fails."""
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def _order(each: Kernel) -> tuple[str, str, str, str, int]:
    row = each.row
    words = row["kernel"], row["draw"] or "", row["variant"] or "", row["dtype"]
    return (*words, ARCHITECTURES.index(row["arch"]))


def _cubin(path: Path) -> Iterator[Kernel]:
    arch = re.search(r"sm_\d+a?", path.name)
    assert arch
    usage = output([tool("cuobjdump") or "", "--dump-resource-usage", path])
    numbers = dict(re.findall(r"Function (\S+):\s+(REG.*)", usage))
    for code in sass.kernels(output([tool("nvdisasm") or "", "-c", path])):
        name, used = _NAME.search(_MANGLED.sub("", code.name)), numbers[code.name]
        assert name, code.name
        flags = re.findall(r"Lb([01])E", name[4])
        told = zip(_FLAGS.get(name[1], ()), flags, strict=True)
        chosen = {key: values[int(flag)] for (key, values), flag in told}
        field = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", used)}
        row = {
            "kernel": name[1],
            "variant": chosen.get("variant"),
            "dtype": (name[2] or "float32").lower(),
            "draw": chosen.get("draw"),
            "adapters": None,
            "rank": None,
            "arch": arch[0],
            "registers": field["REG"],
            "local_bytes": field["STACK"] + field["LOCAL"],
            "instructions": len(code.code),
            "instructions_per_element": None,
            "instructions_per_element_some_unowned": None,
        }
        if is_counted(row):
            loop = expand_loop(code)
            row["adapters"], row["rank"] = 3, 16
            row["instructions_per_element"] = loop.per_element(3, owned=True)
            row["instructions_per_element_some_unowned"] = loop.per_element(3, owned=False)
        yield Kernel(row, code)


def is_counted(row: facts.Row) -> bool:
    """Whether the loop of a kernel is counted: expand, where a draw is shared and all is staged."""
    staged = (row["kernel"], row["draw"], row["variant"]) == ("expand", "shared", "staged")
    return staged and row["dtype"] != "float32"


@dataclass(frozen=True)
class Expand:
    """The loop of an expand kernel over blocks of eight columns, ranks up to one step of 16.

    Attributes:
        elements: outputs of a thread in one turn.
        fixed: instructions of a turn beside the adapters after the first.
        adapter: instructions of each adapter after the first.
        skipped: those of ``fixed`` that do not run where every element has an owner.
        accesses: the instructions that read base and write y.
    """

    elements: int
    fixed: int
    adapter: int
    skipped: int
    accesses: tuple[str, ...]

    def per_element(self, adapters: int, *, owned: bool) -> float:
        """Instructions per output element; ``owned``: every element has an owner."""
        total = self.fixed + self.adapter * (adapters - 1) - (self.skipped if owned else 0)
        return total / self.elements


def expand_loop(code: sass.Kernel) -> Expand:
    """Counts the innermost loop that stores to memory, where a draw is shared."""

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


def main() -> None:
    """Compiles all kernels, and writes their facts and the page."""
    if reason := missing():
        sys.exit(f"no facts: {reason}")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for arguments in (["--preset", "cuda", "--fresh"], ["--build", "--preset", "cuda"]):
        command = ["cmake", *arguments]
        subprocess.run(command, cwd=facts.ROOT, env={**os.environ, "PATH": path}, check=True)
    library = facts.ROOT / "build" / "cuda" / "csrc" / "liblora_ortho.so"
    facts.save("cuda", collect(kernels(library)))


if __name__ == "__main__":
    main()
