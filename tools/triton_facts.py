"""What the Triton kernels take on each GPU, read from what the compiler makes; needs no GPU.

``python tools/triton_facts.py`` compiles everything that ships for minutes and writes
docs/facts/triton.json and the table of docs/triton_kernels.md; with ``--print`` it prints the facts
instead.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import facts
import torch
import triton
from lora_ortho.triton_kernels.launch import Launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_variants import Variant, variants

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}


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


def row(variant: Variant) -> facts.Row:
    """Compiles one kernel and reads its facts.

    Beside the keys of ``facts``: shared_bytes of a program, and the kinds of loads from and stores
    to global memory. Registers of AMD are vector registers, local_bytes its scratch.
    """
    launch = variant.launch()
    compiled = compile_launch(launch, variant.gpu.arch)
    nvidia = variant.gpu.arch.startswith("sm_")
    registers, local_bytes, code = (_read_nvidia if nvidia else _read_amd)(compiled)
    names = [word for word in code if not word.endswith(":")]
    threads = launch.options["num_warps"] * (32 if nvidia else 64)
    elements = launch.constants["BLOCK_M"] * launch.constants["BLOCK_N"] // threads
    tiles = launch.constants.get("TILES") or launch.arguments["tiles"]
    return {
        "kernel": variant.kernel,
        "dtype": str(variant.dtype).removeprefix("torch."),
        "draw": variant.draw,
        "adapters": variant.adapters,
        "rank": variant.rank,
        "arch": variant.gpu.arch,
        "registers": registers,
        "local_bytes": local_bytes,
        "shared_bytes": compiled.metadata.shared,
        "loads": _accesses(names, r"LDG|global_load|buffer_load"),
        "stores": _accesses(names, r"STG|global_store|buffer_store"),
        "instructions": len(names),
        "instructions_per_element": per_element(code, tiles, elements),
    }


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


def _accesses(names: Sequence[str], kinds: str) -> list[str]:
    return sorted({name for name in names if re.match(kinds, name)})


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


def measure(chosen: Sequence[Variant], jobs: int) -> facts.Facts:
    """The facts of many, by processes beside one another."""
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(jobs, len(chosen))) as pool:
        rows = pool.map(row, chosen, chunksize=4)
    return facts.Facts(f"Triton {triton.__version__}", rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python tools/triton_facts.py")
    parser.add_argument("--print", action="store_true", help="print the facts, write nothing")
    parser.add_argument("--every", type=int, default=1, help="with --print: every n-th kernel")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args(arguments)
    if options.every != 1 and not options.print:
        parser.error("--every goes with --print")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is set: nothing can be compiled", file=sys.stderr)
        return 1
    found = measure(list(variants())[:: options.every], options.jobs)
    if options.print:
        print(found.text(), end="")
    else:
        facts.save("triton", found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
