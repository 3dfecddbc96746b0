"""What a file of ours says of how it was made."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from lora_ortho.mask_stream import VERSION

from .tensor_file import parse_json_object

METADATA = "lora_ortho"  # the name of our metadata in the tensor file's header


def warn_of_other_masks(file: Path, metadata: Mapping[str, str]) -> None:
    """UserWarning where the masks in a file are of another mask stream than this package draws.

    The file is what it is; made anew with its seed it would be another.
    """
    if METADATA not in metadata:
        return
    version = parse_json_object(file, metadata[METADATA].encode()).get("mask_stream")
    if version is not None and version != VERSION:
        warnings.warn(
            f"{file}: its masks are of mask stream version {version!r}; this package draws "
            f"version {VERSION}, so the seed that it names gives other masks here",
            stacklevel=2,
        )
