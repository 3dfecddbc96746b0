"""Two adapters merged through the C library with ctypes and NumPy: no torch, no extension module.

    python merge.py <prefix>/lib/liblora_ortho.so [mask_stream.kat]

Checks the output against NumPy and stored values, and draws against a file of known answers.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from ctypes import POINTER, byref, c_double, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

VERSION, ORTHOGONAL, FLOAT32, ALIGNMENT = 2, 0, 0, 64
TOKENS, D_IN, D_OUT, RANK, SEED = 4, 10, 24, 3, 2026
# y[1, :6]
STORED = [2.6416533, -0.53497314, 2.3337669, -0.89897215, -1.6226585, -0.15300149]


class Matrix(ctypes.Structure):
    """lora_ortho_matrix"""

    _fields_ = (
        ("data", c_void_p),
        ("row_stride", c_int64),
        ("col_stride", c_int64),
        ("dtype", c_int32),
    )


class Factors(ctypes.Structure):
    """lora_ortho_factors"""

    _fields_ = (
        ("struct_version", c_uint32),
        ("method", c_int32),
        ("dtype", c_int32),
        ("isa", c_int32),
        ("adapters", c_int32),
        ("d_in", c_int64),
        ("d_out", c_int64),
        ("ranks", POINTER(c_int64)),
        ("thresholds", POINTER(c_uint32)),
        ("lora_A", POINTER(Matrix)),
        ("lora_B", POINTER(Matrix)),
    )


class Call(ctypes.Structure):
    """lora_ortho_call"""

    _fields_ = (
        ("struct_version", c_uint32),
        ("stream", c_uint32),
        ("sample", c_uint32),
        ("strata", c_uint32),
        ("threads", c_int32),
        ("tokens", c_int64),
        ("row_offset", c_int64),
        ("col_offset", c_int64),
        ("seed", ctypes.c_uint64),
        ("gains", POINTER(c_double)),
    )


class Library:
    """The C library; a status other than OK raises ValueError with its text."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self._library.lora_ortho_status_text.restype = ctypes.c_char_p
        self._library.lora_ortho_version.restype = ctypes.c_char_p

    def version(self) -> str:
        return str(self._library.lora_ortho_version().decode())

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = getattr(self._library, f"lora_ortho_{name}")

        def call(*arguments: Any) -> None:
            status = function(*arguments)
            if status != 0:
                raise ValueError(self._library.lora_ortho_status_text(status).decode())

        return call


def matrix(array: np.ndarray) -> Matrix:
    """A float32 array as the library reads it: any strides."""
    rows, cols = (stride // array.itemsize for stride in array.strides)
    return Matrix(array.ctypes.data, rows, cols, FLOAT32)


def draws(library: Library, seed: int, row: int, cols: range, *place: int) -> np.ndarray:
    """The 16-bit draws of some columns of a row; place: stream, sample, strata, lane_set."""
    out = np.empty(len(cols), np.uint16)
    where = (c_int64(row), c_int64(1), c_int64(cols.start), c_int64(len(cols)))
    library.draws(
        ctypes.c_uint64(seed & (1 << 64) - 1),
        *where,
        *map(c_uint32, place),
        c_void_p(out.ctypes.data),
    )
    return out


def check_known_draws(library: Library, path: Path) -> None:
    """Compare with the lines ``draw seed stream sample lane_set row col -> u`` of a file."""
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    known = [[int(word) for word in (*w[1:7], w[8])] for w in lines if w and w[0] == "draw"]
    assert known, f"{path} holds no draws"
    for seed, stream, sample, lane_set, row, col, u in known:
        found = draws(library, seed, row, range(col, col + 1), stream, sample, 1, lane_set)
        assert found[0] == u, (seed, stream, sample, lane_set, row, col, u)
    print(f"{len(known)} known draws agree")


def main() -> None:
    """Packs, merges, compares."""
    library = Library(sys.argv[1])
    if len(sys.argv) > 2:
        check_known_draws(library, Path(sys.argv[2]))

    def numbers(rows: int, cols: int, seed: int) -> np.ndarray:
        values = draws(library, seed, 0, range(rows * cols), 0, 0, 1, 0)
        centred: np.ndarray = (values / np.float32(32768) - 1).astype(np.float32)
        return centred.reshape(rows, cols)

    A = [numbers(RANK, D_IN, 10 + j) for j in range(2)]
    B = [numbers(RANK, D_OUT, 20 + j).T for j in range(2)]  # strided
    x, base = numbers(TOKENS, D_IN, 1), numbers(TOKENS, D_OUT, 2)
    rates, limits, keep = (c_double * 2)(0.4, 0.7), (c_uint32 * 2)(), (c_double * 2)()
    library.thresholds(ORTHOGONAL, 2, rates, limits, keep)
    gains = (c_double * 2)(*(1.5 / q for q in keep))
    ranks = (c_int64 * 2)(RANK, RANK)
    matrices = [(Matrix * 2)(*map(matrix, factors)) for factors in (A, B)]
    factors = Factors(
        VERSION, ORTHOGONAL, FLOAT32, 0, 2, D_IN, D_OUT, ranks, limits, *matrices
    )  # fmt: skip

    size = c_size_t()
    library.pack_bytes(byref(factors), byref(size))
    room = np.empty(size.value + ALIGNMENT, np.uint8)
    packed = c_void_p(room.ctypes.data + -room.ctypes.data % ALIGNMENT)
    library.pack(byref(factors), packed, size)
    call = Call(VERSION, 0, 0, 1, 0, TOKENS, 0, 0, SEED, gains)
    y, s = np.empty((TOKENS, D_OUT), np.float32), np.empty((TOKENS, 2 * RANK), np.float32)
    where = (c_void_p(y.ctypes.data), c_void_p(s.ctypes.data))
    inputs = (byref(matrix(x)), byref(matrix(base)))
    library.forward(packed, size, byref(call), *inputs, *where)

    expected = base.astype(np.float64)
    for row in range(TOKENS):
        u = draws(library, SEED, row, range(D_OUT), 0, 0, 1, 0).astype(np.int64)
        below = 0
        for j in range(2):
            owned = (below <= u) & (u < limits[j])
            delta = B[j].astype(np.float64) @ (A[j].astype(np.float64) @ x[row])
            expected[row] += np.where(owned, gains[j] * delta, 0)
            below = limits[j]
    difference = float(np.abs(y - expected).max())
    stored = float(np.abs(y[1, : len(STORED)] - STORED).max())
    print(f"lora_ortho {library.version()}: {difference:.1e} from NumPy, {stored:.1e} from stored")
    assert difference < 1e-5
    assert stored < 1e-5


if __name__ == "__main__":
    main()
