"""What the kernels take on each GPU, read from what the compiler makes; needs no GPU.

``python -m lora_ortho.triton_kernels.resources`` compiles everything that ships and prints the
table of docs/triton_kernels.md; ``--json`` prints every figure.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import Launch
from .shipped import Shipped, shipped

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Figures:
    """What one compiled kernel takes.

    Attributes:
        registers: of a thread (vector registers on AMD).
        stack: bytes of local memory or scratch of a thread: spills or anything else.
        shared: bytes of shared memory of a program.
        stores, loads: the kinds of accesses to global memory.
        instructions: in the kernel, all paths.
        per_element: instructions that a thread issues for each element of its tiles of y or grad,
            None where loops are nested. See :func:`per_element`.
    """

    kernel: str
    arch: str
    dtype: str
    method: str
    adapters: int
    rank: int
    registers: int
    stack: int
    shared: int
    stores: tuple[str, ...]
    loads: tuple[str, ...]
    instructions: int
    per_element: float | None


def compile_launch(launch: Launch, arch: str) -> Any:
    """A launch compiled as its own call would have it compiled, every address at 16 bytes."""
    kinds: dict[str, str] = {}
    aligned = {}
    for number, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            kinds[name] = "constexpr"
            continue
        value = launch.arguments[name]
        if isinstance(value, torch.Tensor):
            kinds[name] = "*" + _TYPES[value.dtype]
            aligned[(number,)] = [["tt.divisibility", 16]]
        else:
            kinds[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    if arch.startswith("sm_"):
        target = GPUTarget("cuda", int(arch[3:]), 32)
    else:
        target = GPUTarget("hip", arch, 64)
    source = ASTSource(launch.kernel, kinds, launch.constants, aligned)
    return triton.compile(source, target=target, options=launch.options)


def figures(item: Shipped) -> Figures:
    """Compiles one kernel and reads its figures."""
    launch = item.launch()
    compiled = compile_launch(launch, item.gpu.arch)
    nvidia = item.gpu.arch.startswith("sm_")
    read = _read_nvidia if nvidia else _read_amd
    registers, stack, code = read(compiled)
    names = [word for word in code if not word.endswith(":")]
    threads = launch.options["num_warps"] * (32 if nvidia else 64)
    elements = launch.constants["BLOCK_M"] * launch.constants["BLOCK_N"] // threads
    tiles = launch.constants.get("TILES") or launch.arguments["tiles"]
    return Figures(
        item.kernel,
        item.gpu.arch,
        str(item.dtype).removeprefix("torch."),
        item.method,
        item.adapters,
        item.rank,
        registers,
        stack,
        compiled.metadata.shared,
        _accesses(names, r"STG|global_store|buffer_store"),
        _accesses(names, r"LDG|global_load|buffer_load"),
        len(names),
        per_element(code, tiles, elements),
    )


def per_element(code: Sequence[str], tiles: int, elements: int) -> float | None:
    """Instructions for each element of a program that makes so many tiles of so many elements.

    Every instruction before and after the loop over tiles counts once and each in the loop once
    for each tile, whatever its predicate and even on paths that are not taken. A jump back over
    fewer than 20 instructions is a wait, not a loop.

    Args:
        code: instructions in their order, "jump LABEL" for a branch, "LABEL:" for a place.
    """
    places: dict[str, int] = {}
    loops: dict[int, int] = {}  # from where a jump goes back to, to the last that does
    number = 0
    for word in code:
        if word.endswith(":"):
            places[word[:-1]] = number
            continue
        number += 1
        start = places.get(word.removeprefix("jump "))
        if start is not None and number - start >= 20:
            loops[start] = number
    if not loops:
        return number / elements if tiles == 1 else None
    if len(loops) > 1:
        return None
    ((start, end),) = loops.items()
    return (number + (tiles - 1) * (end - start)) / (tiles * elements)


def _accesses(names: Sequence[str], kinds: str) -> tuple[str, ...]:
    return tuple(sorted({name for name in names if re.match(kinds, name)}))


def _read_nvidia(compiled: Any) -> tuple[int, int, list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output([triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin])
        text = _output([triton.knobs.nvidia.nvdisasm.path, "-c", cubin])
    counts = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    code = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            code.append(label[1] + ":")
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            jump = re.search(r"`\((\.L_\w+)\)", found[2]) if found[1][:3] == "BRA" else None
            code.append(f"jump {jump[1]}" if jump else found[1])
    return counts["REG"], counts["STACK"] + counts["LOCAL"], code


def _read_amd(compiled: Any) -> tuple[int, int, list[str]]:
    text = compiled.asm["amdgcn"]

    def count(name: str) -> int:
        return max(int(value) for value in re.findall(rf"\.{name}:\s+(\d+)", text))

    spilled = 4 * count("vgpr_spill_count")
    kinds = "(?:v|s|ds|global|buffer|scratch|flat)"
    code = []
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            code.append(label[1] + ":")
        elif found := re.match(rf"\s+({kinds}_\w+)\s*(\.LBB\w+)?", line):
            code.append(f"jump {found[2]}" if found[2] else found[1])
    return count("vgpr_count"), max(spilled, count("private_segment_fixed_size")), code


def _output(command: list[str | Path]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def measure(items: Sequence[Shipped], jobs: int) -> list[Figures]:
    """The figures of many, by processes beside one another."""
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(jobs, len(items))) as pool:
        return pool.map(figures, items, chunksize=4)


def table(found: Sequence[Figures], version: str = triton.__version__) -> str:
    """Rows are kernels and problems; a cell is registers and instructions for each element.

    Args:
        version: of the Triton that compiled them.
    """
    archs = list(dict.fromkeys(one.arch for one in found))
    found_in = {
        (one.kernel, one.dtype, one.method, one.adapters, one.rank, one.arch): one for one in found
    }
    rows = list(dict.fromkeys(key[:-1] for key in found_in))
    lines = [
        f"Triton {version}. Each cell: registers of a thread, instructions for each "
        "element of y or grad.",
        "",
        "| kernel | dtype | method | K × r | " + " | ".join(archs) + " |",
        "| --- " * 4 + "| ---: " * len(archs) + "|",
    ]
    for row in rows:
        kernel, dtype, method, adapters, rank = row
        texts = [f"{adapters} × {rank or 'unequal'}"]
        for arch in archs:
            one = found_in[kernel, dtype, method, adapters, rank, arch]
            count = "-" if one.per_element is None else f"{one.per_element:.1f}"
            texts.append(f"{one.registers}, {count}")
        lines.append(f"| {kernel} | {dtype} | {method} | " + " | ".join(texts) + " |")
    stack = max(one.stack for one in found)
    lines += ["", f"{len(found)} kernels, at most {stack} bytes of local memory or scratch."]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m lora_ortho.triton_kernels.resources")
    parser.add_argument("--json", action="store_true", help="every figure, as JSON")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--every", type=int, default=1, help="only every n-th kernel")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is set: nothing can be compiled", file=sys.stderr)
        return 1
    found = measure(list(shipped())[:: options.every], options.jobs)
    if options.json:
        print(json.dumps({"triton": triton.__version__, "kernels": [asdict(f) for f in found]}))
    else:
        print(table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
