"""How each kernel is launched: a pure function of the problem and the GPU, printable as it is.

tools/triton_facts.py compiles every configuration that these functions can return; what each takes
is in docs/facts/triton.json, the reasons are in docs/triton_kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass

INTERPRETER = "interpreter"
MIN_WIDTH = 16  # the smallest side of a tensor-core product
HOISTED_ADAPTERS = 3
HOISTED_COLUMNS = 64
MOST_TILES = 8  # side by side in a program of the expand kernel


@dataclass(frozen=True)
class Gpu:
    """What the choice depends on.

    Attributes:
        arch: "sm_90", "gfx942", ...; any other name gets the defaults.
        multiprocessors: streaming multiprocessors, or compute units.
    """

    arch: str
    multiprocessors: int


@dataclass(frozen=True)
class Sizes:
    """The sizes that a choice depends on: tokens, d_out, K, the padded rank, bytes an element."""

    tokens: int
    d_out: int
    adapters: int
    width: int
    itemsize: int


@dataclass(frozen=True)
class Expand:
    """Tiles of ``expand_kernel``; tiles is how many of them side by side a program makes."""

    block_m: int
    block_n: int
    tiles: int
    chunk: int
    hoist: bool
    warps: int
    max_registers: int | None


@dataclass(frozen=True)
class Backward:
    """Tiles of a backward kernel; group adapters share a reading of grad, parts share a sum."""

    block_m: int
    block_n: int
    chunk: int
    group: int
    parts: int
    warps: int


def width_of(rank: int) -> int:
    """The rank to which factors are padded with zeros: a power of two, at least 16."""
    return max(MIN_WIDTH, 1 << (rank - 1).bit_length())


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def expand(gpu: Gpu, sizes: Sizes) -> Expand:
    """The tiles of the expand kernel."""
    half = sizes.itemsize == 2
    chunk = min(sizes.width, 32 if half else 16)
    few = sizes.adapters <= HOISTED_ADAPTERS
    few = few and sizes.adapters * sizes.width <= HOISTED_COLUMNS
    hoist = half and few and chunk == sizes.width  # what is hoisted is one chunk of each adapter
    block_m, block_n, warps = _expand_tile(gpu.arch, sizes)
    registers = 168 if hoist and gpu.arch == "sm_90" else None
    rows = _ceil(sizes.tokens, block_m)
    tiles = _ceil(sizes.d_out, block_n)
    # as many tiles a program as leave two programs for each multiprocessor
    tiles = min(MOST_TILES, tiles, max(1, rows * tiles // (2 * gpu.multiprocessors)))
    return Expand(block_m, block_n, tiles, chunk, hoist, warps, registers)


def tile_counts(config: Expand, sizes: Sizes) -> tuple[int, ...]:
    """The numbers of tiles that a configuration may have for a problem, its own among them."""
    most = min(MOST_TILES, _ceil(sizes.d_out, config.block_n))
    powers = (1 << i for i in range(most.bit_length()))
    return tuple(sorted({config.tiles, *(count for count in powers if count <= most)}))


def _expand_tile(arch: str, sizes: Sizes) -> tuple[int, int, int]:
    """Rows, columns and warps: what does not spill, in the fewest instructions an element."""
    if arch == INTERPRETER:  # whose time goes with the number of programs
        return 32, 128, 1
    if sizes.itemsize == 4:
        return 32, 32, 4
    if arch.startswith("sm_10"):  # 64 rows would take the way through tensor memory: 29 to 20
        return 32, 64, 4
    if arch != "sm_90" and sizes.width > 64:
        return 32, 64, 4
    return 64, 64, 4


def grad_s(gpu: Gpu, sizes: Sizes) -> Backward:
    """The tiles of the kernel that sums over columns."""
    return _backward(gpu, sizes, sizes.tokens, sizes.d_out)


def grad_B(gpu: Gpu, sizes: Sizes) -> Backward:
    """The tiles of the kernel that sums over rows."""
    return _backward(gpu, sizes, sizes.d_out, sizes.tokens)


def _backward(gpu: Gpu, sizes: Sizes, kept: int, summed: int) -> Backward:
    block = 64 if sizes.itemsize == 2 or gpu.arch == INTERPRETER else 32
    chunk = min(sizes.width, 64)
    group = max(1, min(sizes.adapters, 64 // sizes.width))
    programs = _ceil(kept, block) * _ceil(sizes.adapters, group) * (sizes.width // chunk)
    # enough parts for two programs on each multiprocessor, of at least four tiles each
    parts = max(1, min(_ceil(2 * gpu.multiprocessors, programs), summed // (4 * block)))
    return Backward(block, block, chunk, group, parts, 4)
