"""Which mask stream a layer draws from."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable


def assign_streams(names: Iterable[str]) -> dict[str, int]:
    """Stream numbers in [0, 2**32) by layer name: the CRC-32 of the name's UTF-8 bytes.

    Where two names have the same CRC-32, the later one in name order moves to the next free
    number. Give the names of all modules of a model, so that a layer's number does not depend on
    which other layers are adapted.
    """
    found = assign_part_streams((name, "") for name in names)
    return {name: number for (name, _), number in found.items()}


def assign_part_streams(
    names: Iterable[tuple[str, str]], first: Collection[str] = ()
) -> dict[tuple[str, str], int]:
    """As `assign_streams`, for names (name within its part, part) of a pipeline of several models.

    The part does not enter the number, so a layer has the masks that it has in its model alone;
    where two parts have a layer of one name, the later part moves on: parts are in name order,
    after those in `first`, which then have the numbers that they have without the others.
    """
    taken: set[int] = set()
    streams: dict[tuple[str, str], int] = {}
    for name, part in sorted(set(names), key=lambda pair: (pair[1] not in first, pair)):
        number = zlib.crc32(name.encode("utf-8"))
        while number in taken:
            number = (number + 1) % 2**32
        taken.add(number)
        streams[name, part] = number
    return streams
