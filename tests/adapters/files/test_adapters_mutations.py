"""Random mutations of valid adapters: each loads to what it says, or is refused."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import PREFIX, config, small_model, tensors
from safetensors.torch import save
from torch import Tensor

from lora_ortho.adapters import AdapterFileError, LoadedAdapter, load_adapter

# 10^5 in all: (layout, how many).
MUTATIONS = {"peft": 40_000, "kohya": 30_000, "diffusers": 30_000}
SLOWEST = 10.0  # seconds for one file; a stranger's file must not hang the loader
GROWTH = 64 << 20  # bytes that all of them together may need
CONFIG, FACTORS = "adapter_config.json", "adapter_model.safetensors"
KINDS = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
}
# What a mutated number, name or structure may become.
HOSTILE: list[Any] = [
    *(0, 1, 2, 3, -1, 4, 24, 1 << 31, 1 << 62, 10**30, 0.5, 1e308, math.nan, math.inf, True, None),
    *("", "F32", "BF16", "I64", "lora_A", "a" * 600, "."),
    *([], [2], [2, 3], [[]], [10**15] * 2, {}, {"a": 1}),
]


def files_of(layout: str) -> dict[str, bytes]:
    """A valid adapter for `small_model` in a layout, by file name."""
    factors = tensors()
    if layout == "peft":
        fields = config(rank_pattern={"c": 2}, alpha_pattern={"^a": 6}, use_rslora=False)
        return {CONFIG: json.dumps(fields).encode(), FACTORS: save(factors)}
    found: dict[str, Tensor] = {}
    for key, value in factors.items():
        layer, _, end = key.removeprefix(PREFIX).rpartition(".lora_")
        if layout == "diffusers":
            found[f"unet.{layer}.lora_{end}"] = value
        else:
            stem = f"lora_unet_{layer.replace('.', '_')}"
            found[f"{stem}.lora_{'down' if end[0] == 'A' else 'up'}.weight"] = value
            found[f"{stem}.alpha"] = torch.tensor(6.0)
    return {"x.safetensors": save(found, {"ss_network_dim": "2"})}


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    """One to three random edits: bytes changed, dropped, repeated or put in."""
    result = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        # most edits go where the meaning is dense: the first bytes and the header
        anywhere = chance.random() < 0.3
        start = chance.randrange(len(result) if anywhere else min(len(result), 700))
        length = chance.choice([1, 1, 1, 2, 4, 8, 40])
        edit = 0 if anywhere else chance.randrange(4)
        if edit == 0:
            for at in range(start, min(start + length, len(result))):
                result[at] = chance.randrange(256)
        elif edit == 1:
            del result[start : start + length]
        elif edit == 2:
            result[start:start] = result[start : start + length]
        else:
            digits = chance.choice([b"0", b"9", b"-", b",", b'"', b"{", b"]", b"1e9", b"null"])
            result[start : start + chance.randrange(3)] = digits
        if not result:
            break
    return bytes(result)


def mutate_json(value: Any, chance: random.Random) -> Any:
    """One thing somewhere in a JSON value changed, dropped, renamed, or put in."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        name = chance.choice(list(value))
        edit = chance.randrange(5)
        if edit == 0:
            return {k: v for k, v in value.items() if k != name}
        if edit == 1:
            other = chance.choice([name[:-1], name + "x", name.replace("a", "b", 1), name.upper()])
            return {other if k == name else k: v for k, v in value.items()}
        if edit == 2:
            return {**value, chance.choice(["x", *value]): chance.choice([*value.values()])}
        return {**value, name: mutate_json(value[name], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        return [*value[:at], mutate_json(value[at], chance), *value[at + 1 :]]
    return chance.choice(HOSTILE)


def mutate_file(name: str, data: bytes, chance: random.Random) -> bytes:
    """Bytes anywhere, or one to two changes of meaning in the JSON, lengths kept honest."""
    if chance.random() < 0.5:
        return mutate_bytes(data, chance)
    start = 0 if name == CONFIG else 8 + int.from_bytes(data[:8], "little")
    value = json.loads(data if name == CONFIG else data[8:start])
    for _ in range(chance.randint(1, 2)):
        value = mutate_json(value, chance)
    text = json.dumps(value).encode()
    return text if name == CONFIG else struct.pack("<Q", len(text)) + text + data[start:]


def plain(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file, read in the plainest way."""
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for key, entry in json.loads(data[8:start]).items():
        if key != "__metadata__":
            begin, end = entry["data_offsets"]
            raw = bytearray(data[start + begin : start + end])
            found[key] = torch.frombuffer(raw, dtype=KINDS[entry["dtype"]]).view(entry["shape"])
    return found


def same(adapter: LoadedAdapter, files: dict[str, bytes]) -> bool:
    """Whether factors and scaling are what the files say."""
    fields = json.loads(files[CONFIG]) if CONFIG in files else None
    left = plain(next(data for name, data in files.items() if name != CONFIG))
    for layer, part in adapter.layers.items():
        rank = part.lora_A.shape[0]
        stems = (f"{PREFIX}{layer}", f"unet.{layer}", f"lora_unet_{layer.replace('.', '_')}")
        stem = next(s for s in stems if any(key.startswith(f"{s}.") for key in left))
        alpha = float(left.pop(f"{stem}.alpha", torch.tensor(float(rank))))
        if fields is not None:
            alpha = fields["lora_alpha"]
            for pattern, value in (fields.get("alpha_pattern") or {}).items():
                if layer == pattern.removeprefix("^") or layer.endswith(f".{pattern}"):
                    alpha = value
                    break
        root = math.sqrt(rank) if fields and fields.get("use_rslora") else rank
        if part.scaling != alpha / root:
            return False
        for name, other in (("lora_A", "lora_down"), ("lora_B", "lora_up")):
            key = next(k for k in (f"{stem}.{name}.weight", f"{stem}.{other}.weight") if k in left)
            if not torch.equal(getattr(part, name), left.pop(key).flatten(1)):
                return False
    return not left


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where the system has such a place: a disk would take most of the time."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


def reader(layout: str, folder: Path) -> Callable[[], LoadedAdapter]:
    """How a mutated adapter is loaded: single files through a model, as kohya's need."""
    if layout == "peft":
        return lambda: load_adapter(folder)
    model = small_model()
    return lambda: load_adapter(folder / "x.safetensors", model)


@pytest.mark.parametrize("layout", MUTATIONS)
def test_random_mutations(layout: str, folder: Path) -> None:
    """A mutated adapter loads to exactly what it says, or raises AdapterFileError."""
    chance = random.Random(20251003)
    good, load = files_of(layout), reader(layout, folder)
    loaded, slowest, memory = 0, 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(MUTATIONS[layout]):
        files = dict(good)
        for name in chance.choice([list(files), list(files)[-1:], list(files)[:1]]):
            files[name] = mutate_file(name, files[name], chance)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        start = time.perf_counter()
        try:
            adapter = load()
        except AdapterFileError:
            continue
        finally:
            slowest = max(slowest, time.perf_counter() - start)
        loaded += 1
        assert same(adapter, files), f"mutation {number}: {files}"
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory)
    print(
        f"{layout}: {MUTATIONS[layout]} mutations, {loaded} still valid, "
        f"{MUTATIONS[layout] - loaded} refused, slowest {1e3 * slowest:.1f} ms, "
        f"{grown / 2**20:.1f} MiB more memory"
    )
    assert 0 < loaded < MUTATIONS[layout] // 2
    assert slowest < SLOWEST
    assert grown < GROWTH


def test_number_of_mutations() -> None:
    assert sum(MUTATIONS.values()) >= 100_000
