"""Random mutations of a valid adapter: each loads to what it says, or is refused."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import torch
from adapter_files import PREFIX, write

from lora_ortho.adapters import AdapterFileError, LoadedAdapter, load_adapter

MUTATIONS = 4000


def mutate(data: bytes, chance: random.Random) -> bytes:
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


def same(adapter: LoadedAdapter, header: dict[str, Any], file: bytes) -> bool:
    """Whether factors and scaling are what the two files say, read in the plainest way."""
    start = 8 + int.from_bytes(file[:8], "little")
    kinds = {
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F64": torch.float64,
    }
    keys = json.loads(file[8:start])
    keys.pop("__metadata__", None)
    found = 0
    for layer, part in adapter.layers.items():
        rank = part.lora_A.shape[0]
        root = math.sqrt(rank) if header.get("use_rslora") else rank
        if part.scaling != header["lora_alpha"] / root or rank != header["r"]:
            return False
        for name in ("lora_A", "lora_B"):
            entry = keys[f"{PREFIX}{layer}.{name}.weight"]
            begin, end = entry["data_offsets"]
            raw = bytearray(file[start + begin : start + end])
            expected = torch.frombuffer(raw, dtype=kinds[entry["dtype"]]).view(entry["shape"])
            found += 1
            if not torch.equal(getattr(part, name), expected):
                return False
    return found == len(keys)


def test_random_mutations(tmp_path: Path) -> None:
    """A mutated adapter loads to exactly what it says, or raises AdapterFileError."""
    chance = random.Random(20251003)
    folder = write(tmp_path / "x")
    good = {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}
    loaded = 0
    for number in range(MUTATIONS):
        files = dict(good)
        for name in chance.choice([list(files), ["adapter_model.safetensors"], list(files)[:1]]):
            files[name] = mutate(files[name], chance)
        for name, data in files.items():
            (folder / name).unlink()  # some file systems flush a file that is overwritten
            (folder / name).write_bytes(data)
        try:
            adapter = load_adapter(folder)
        except AdapterFileError:
            continue
        loaded += 1
        header = json.loads(files["adapter_config.json"])
        assert same(adapter, header, files["adapter_model.safetensors"]), f"mutation {number}"
    print(f"{MUTATIONS} mutations: {loaded} still valid, {MUTATIONS - loaded} refused")
    assert 0 < loaded < MUTATIONS // 2
