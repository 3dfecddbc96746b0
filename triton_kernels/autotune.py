"""Optional tuning of the one choice that changes no bit: the tiles that an expand program walks.

Off unless LORA_ORTHO_AUTOTUNE=1. The first call of a size then times every candidate on its GPU
and keeps the fastest, for this process and, in the file of :func:`cache_path`, for the next.
Backward is not tuned: how its sums fall into parts is part of its result.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import triton
from triton.testing import do_bench

from .launch_config import INTERPRETER, Expand, Gpu, Sizes, tile_counts

VARIABLE = "LORA_ORTHO_AUTOTUNE"
_FORMAT = 1

_known: dict[str, int] = {}
_files_read: set[Path] = set()


def enabled() -> bool:
    """Whether the environment asks for tuning."""
    return os.environ.get(VARIABLE, "0") not in ("", "0")


def cache_path() -> Path:
    """Where what was found is kept: a JSON file in the user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "lora_ortho" / "triton_autotune.json"


def tuned(
    config: Expand,
    gpu: Gpu,
    device: torch.device,
    sizes: Sizes,
    draw: str,
    run: Callable[[Expand], None],
) -> Expand:
    """The configuration with the fastest number of tiles.

    Args:
        config: the default, returned as it is while a CUDA graph is captured.
        run: launches a configuration on outputs that nobody reads.
    """
    key = _key(gpu, device, sizes, draw)
    choices = {count: replace(config, tiles=count) for count in tile_counts(config, sizes)}
    if _known.get(key) not in choices:
        _read(cache_path())
    if _known.get(key) not in choices:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return config
        times = {count: measure(partial(run, choice), gpu) for count, choice in choices.items()}
        _known[key] = min(times, key=lambda count: times[count])
        _write(cache_path())
    return choices[_known[key]]


def measure(run: Callable[[], None], gpu: Gpu) -> float:
    """Milliseconds of a launch: the median on a GPU, one run in the interpreter."""
    if gpu.arch == INTERPRETER:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    return float(do_bench(run, warmup=5, rep=20, return_mode="median"))


def _key(gpu: Gpu, device: torch.device, sizes: Sizes, draw: str) -> str:
    name = "interpreter" if gpu.arch == INTERPRETER else torch.cuda.get_device_name(device)
    return f"{name}, Triton {triton.__version__}, {draw}, {sizes}"


def _read(path: Path) -> None:
    """Adds what earlier processes found; a file that is not of this format is named and ignored."""
    if path in _files_read or not path.exists():
        return
    _files_read.add(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["tiles"] if content["format"] == _FORMAT else None
    except (OSError, ValueError, TypeError, KeyError):
        found = None
    if not isinstance(found, dict):
        warnings.warn(f"{path} is no tuning of this version; tuning anew", stacklevel=2)
        return
    counts = {key: count for key, count in found.items() if isinstance(count, int)}
    _known.update({key: count for key, count in counts.items() if key not in _known})


def _write(path: Path) -> None:
    """Replaces the file by all that is known, whole; a folder that cannot be written is named."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8"
        ) as file:
            json.dump({"format": _FORMAT, "tiles": _known}, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"the tuning is kept for this process only: {error}", stacklevel=2)
