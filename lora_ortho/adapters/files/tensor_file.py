"""Safetensors files from strangers: the header is checked before anything is allocated.

Format: 8 bytes little-endian header length, the header (a JSON object from tensor names to dtype,
shape and data_offsets, and "__metadata__"), then the tensors' bytes without holes.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from .errors import AdapterFileError

# Largest header read, in bytes: an adapter's is some 150 bytes a tensor.
MAX_HEADER = 16 * 1024 * 1024
# Largest file read, in bytes: rank 256 on every layer of a 70-billion model in float32 is 13 GiB.
MAX_FILE = 16 * 1024**3
# Bytes of an element of each dtype that a low-rank factor may have, and an alpha besides.
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_ALPHA_BYTES = {**ITEM_BYTES, "I64": 8, "I32": 4}
_GLANCE, _SHOWN = 512, 40  # bytes read, and shown, of a file that is something else
_PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


@dataclass(frozen=True)
class Entry:
    """One tensor of a header: dtype name, shape, and where its bytes lie after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Contents:
    """The tensors of a file that was read whole.

    Attributes:
        tensors: by name, on the CPU, in their own dtypes.
        sha256: of the whole file, in hexadecimal.
    """

    tensors: dict[str, torch.Tensor]
    sha256: str


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading, and nothing else: a pipe or device could block for ever."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        number = os.open(path, flags)
    except OSError as error:
        raise AdapterFileError(path, error.strerror or str(error)) from None
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise AdapterFileError(path, "not a regular file")
    return open(number, "rb")


def parse_json_object(path: Path, text: bytes) -> dict[str, Any]:
    """A JSON object with no name twice; AdapterFileError for anything else."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise AdapterFileError(path, "occurs twice in one JSON object", twice)
        return result

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except AdapterFileError:
        raise
    except RecursionError:
        raise AdapterFileError(path, "JSON nested too deeply") from None
    except ValueError as error:  # undecodable bytes, wrong syntax, numbers of thousands of digits
        raise AdapterFileError(path, f"not valid JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise AdapterFileError(path, f"expected a JSON object, found {type(parsed).__name__}")
    return parsed


def what_it_is(start: bytes) -> str | None:
    """What a file is by its first bytes that is often in an adapter's place; None if not known."""
    text = start.lstrip()
    if not start:
        return "empty: 0 bytes; was the download cut off?"
    if start.startswith(_PICKLE_STARTS):
        return "a pickle, not safetensors; pickles are never loaded"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: fetch it with 'git lfs pull'"
    if text.startswith(b"<"):
        return "an HTML or XML page, not an adapter: a download that was answered with an error?"
    if start.startswith((b"GGUF", b"\x1f\x8b")):
        return f"a {'GGUF' if start.startswith(b'GGUF') else 'gzip'} file, not safetensors"
    words = " ".join(text[:_SHOWN].decode("ascii", "replace").split())
    if len(text) >= 8 and words.isprintable() and "\ufffd" not in words:
        return f"text, not an adapter: it begins {words!r}; a download that failed?"
    return None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(path: Path, key: str, fields: object) -> Entry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise AdapterFileError(path, "its entry must have dtype, shape and data_offsets", key)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    sizes = _ALPHA_BYTES if key.endswith(".alpha") else ITEM_BYTES
    if not isinstance(dtype, str) or dtype not in sizes:
        allowed = ", ".join(sizes)
        raise AdapterFileError(path, f"dtype {dtype!r} is not one of {allowed}", key)
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise AdapterFileError(path, f"shape {shape!r} is not a list of sizes", key)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise AdapterFileError(path, f"data_offsets {offsets!r} are not two positions", key)
    begin, end = offsets
    needed = prod(shape) * sizes[dtype]
    if end - begin != needed:
        problem = f"shape {shape} of {dtype} needs {needed} bytes, data_offsets give {end - begin}"
        raise AdapterFileError(path, problem, key)
    return Entry(dtype, tuple(shape), begin, end)


def _metadata(path: Path, header: dict[str, Any]) -> dict[str, str]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterFileError(path, "must map names to strings", "__metadata__")
    return metadata


def _entries(path: Path, header: dict[str, Any], data_bytes: int) -> dict[str, Entry]:
    """Every tensor's entry; together they must cover the data exactly, in any order."""
    entries = {key: _entry(path, key, fields) for key, fields in header.items()}
    position = 0
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            problem = f"data_offsets start at {entry.begin}, the data before it ends at {position}"
            raise AdapterFileError(path, problem, key)
        position = entry.end
        if position > data_bytes:
            problem = f"ends at byte {position} of the data, which has {data_bytes}: truncated?"
            raise AdapterFileError(path, problem, key)
    if position != data_bytes:
        raise AdapterFileError(path, f"{data_bytes - position} bytes belong to no tensor")
    return entries


def _read_header(path: Path, file: BinaryIO) -> tuple[bytes, dict[str, Entry], dict[str, str]]:
    """The bytes up to the tensors, the checked entries, and the metadata."""
    size = os.fstat(file.fileno()).st_size
    if size > MAX_FILE:
        raise AdapterFileError(path, f"{size} bytes are over the limit of {MAX_FILE}")
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(size - 8, MAX_HEADER):
        found = what_it_is(start + file.read(_GLANCE))
        if found is not None:
            raise AdapterFileError(path, found)
    if len(start) < 8:
        raise AdapterFileError(path, f"{size} bytes are too few for safetensors: truncated?")
    if length > size - 8:
        problem = f"the header claims {length} bytes, the file has {size - 8} after its first 8"
        raise AdapterFileError(path, problem)
    if length > MAX_HEADER:
        raise AdapterFileError(path, f"a header of {length} bytes; the limit is {MAX_HEADER}")
    text = file.read(length)
    if len(text) != length:
        raise AdapterFileError(path, "changed while it was read")
    header = parse_json_object(path, text)
    metadata = _metadata(path, header)
    return start + text, _entries(path, header, size - 8 - length), metadata


class TensorFile:
    """A safetensors file that is open, its header checked in full; the tensors come from the same
    open file, so nothing can be exchanged in between. A context manager that closes it.

    Attributes:
        entries: what it holds, by tensor name.
        metadata: the header's "__metadata__".
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open_regular(path)
        try:
            self._head, self.entries, self.metadata = _read_header(path, self._file)
        except BaseException:
            self._file.close()
            raise

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by name."""
        return {key: entry.shape for key, entry in self.entries.items()}

    def read(self) -> Contents:
        """Every tensor, on the CPU, in its own dtype; NaN and infinity are refused."""
        data = self._file.read()
        if len(data) != max((entry.end for entry in self.entries.values()), default=0):
            raise AdapterFileError(self._path, "changed while it was read")
        data = self._head + data
        try:
            tensors = load(data)
        except SafetensorError as error:
            raise AdapterFileError(self._path, f"not a safetensors file ({error})") from None
        for key, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
                raise AdapterFileError(self._path, f"holds {kind}", key)
        return Contents(tensors, hashlib.sha256(data).hexdigest())

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
