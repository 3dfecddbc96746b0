"""Which mask stream a layer draws from."""

from __future__ import annotations

import zlib
from collections.abc import Iterable


def assign_streams(names: Iterable[str]) -> dict[str, int]:
    """Stream numbers in [0, 2**32) by layer name: the CRC-32 of the name's UTF-8 bytes.

    Where two names have the same CRC-32, the later one in name order moves to the next free
    number. Give the names of all modules of a model, so that a layer's number does not depend on
    which other layers are adapted.
    """
    taken: set[int] = set()
    streams: dict[str, int] = {}
    for name in sorted(set(names)):
        number = zlib.crc32(name.encode("utf-8"))
        while number in taken:
            number = (number + 1) % 2**32
        taken.add(number)
        streams[name] = number
    return streams
