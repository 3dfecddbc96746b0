"""Adapter folders: what is right loads to the right thing, what is broken is refused by name."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import PREFIX, config, refused, small_model, tensors, write
from safetensors.torch import save
from torch import Tensor, nn

from lora_ortho.adapters import AdapterFileError, load_adapter
from lora_ortho.adapters.files.tensor_file import MAX_FILE, MAX_HEADER, TensorFile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_loads_factors_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = load_adapter(write(tmp_path / "mine", factors=tensors(dtype=dtype)))
    assert adapter.name == "mine"
    assert list(adapter.layers) == ["a", "b.c"]
    for layer, loaded in adapter.layers.items():
        for factor in ("lora_A", "lora_B"):
            expected = tensors(dtype=dtype)[f"{PREFIX}{layer}.{factor}.weight"]
            assert getattr(loaded, factor).dtype == dtype
            assert torch.equal(getattr(loaded, factor), expected)
        assert loaded.scaling == 3.0
        assert loaded.bias is None


def test_name_and_base_model(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", config(base_model_name_or_path="some/model"))
    adapter = load_adapter(str(folder), name="other")
    assert (adapter.name, adapter.base_model) == ("other", "some/model")
    assert {part.name for part in adapter.layers.values()} == {"other"}


def test_rslora(tmp_path: Path) -> None:
    adapter = load_adapter(write(tmp_path / "x", config(use_rslora=True)))
    assert adapter.layers["a"].scaling == 6 / math.sqrt(2)


def test_lora_bias(tmp_path: Path) -> None:
    factors = tensors()
    for layer, size in (("a", 4), ("b.c", 5)):
        factors[f"{PREFIX}{layer}.lora_B.bias"] = torch.arange(size) + 0.5
    adapter = load_adapter(write(tmp_path / "x", config(lora_bias=True), factors))
    bias = adapter.layers["b.c"].bias
    assert bias is not None
    assert torch.equal(bias, torch.arange(5) + 0.5)


def test_fields_without_effect_and_unknown_fields_that_are_off(tmp_path: Path) -> None:
    fields = config(target_modules=["a"], lora_dropout=0.1, init_lora_weights="eva", bias="none")
    fields |= {"field_of_tomorrow": None, "another": False, "use_dora": False}
    assert len(load_adapter(write(tmp_path / "x", fields)).layers) == 2


def test_a_fitting_model_is_accepted(tmp_path: Path) -> None:
    assert len(load_adapter(write(tmp_path / "x"), small_model()).layers) == 2


def test_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "does not exist")


def test_name_that_no_system_takes(tmp_path: Path) -> None:
    refused(tmp_path / ("x" * 5000))


def test_file_in_place_of_a_folder(tmp_path: Path) -> None:
    file = write(tmp_path / "x") / "adapter_model.safetensors"
    refused(file, "PEFT's key", "scaling is in adapter_config.json: load the folder")
    refused(file.rename(tmp_path / "x.txt"), "expected a folder", "or a .safetensors file")


@pytest.mark.parametrize("name", ["x.bin", "x.pt", "x.ckpt", "x.pkl", "x.PTH"])
def test_pickle_by_name(tmp_path: Path, name: str) -> None:
    torch.save({}, tmp_path / name)
    refused(tmp_path / name, "pickles are never loaded")


def test_folder_without_config(tmp_path: Path) -> None:
    os.remove(write(tmp_path / "x") / "adapter_config.json")
    refused(tmp_path / "x", "has no adapter_config.json")


def test_folder_without_tensors(tmp_path: Path) -> None:
    os.remove(write(tmp_path / "x") / "adapter_model.safetensors")
    refused(tmp_path / "x", "has no adapter_model.safetensors")


def test_folder_with_a_pickle_only(tmp_path: Path) -> None:
    os.remove(write(tmp_path / "x") / "adapter_model.safetensors")
    torch.save({}, tmp_path / "x" / "adapter_model.bin")
    refused(tmp_path / "x", "adapter_model.bin is a pickle", "never loaded")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_pipe_does_not_block(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / "x") / name
    file.unlink()
    os.mkfifo(file)
    refused(tmp_path / "x", name, "not a regular file")


def test_wrong_argument_types(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="model must be a torch module"):
        load_adapter(write(tmp_path / "x"), "model")
    with pytest.raises(TypeError, match="path must be a path, got int"):
        load_adapter(3)  # type: ignore[arg-type]


GOOD = save(tensors())
LENGTH = int.from_bytes(GOOD[:8], "little")


def with_header(change: Callable[[dict[str, Any]], None]) -> bytes:
    """A valid file with its header changed, its data left."""
    header = json.loads(GOOD[8 : 8 + LENGTH])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + GOOD[8 + LENGTH :]


A_KEY = f"{PREFIX}a.lora_A.weight"


def changed(**fields: Any) -> bytes:
    return with_header(lambda header: header[A_KEY].update(fields))


@pytest.mark.parametrize(
    ("data", "part", "key"),
    [
        (b"", "empty: 0 bytes", None),
        (GOOD[:5], "too few", None),
        (GOOD[:20], "the header claims", None),
        (GOOD[:-1], "truncated", None),
        (GOOD + b"\0", "1 bytes belong to no tensor", None),
        (struct.pack("<Q", 1 << 62) + GOOD[8:], "the header claims 4611686018427387904", None),
        (b"\xff" * 8 + GOOD[8:], "the header claims", None),
        (struct.pack("<Q", 4) + b"null", "found NoneType", None),
        (struct.pack("<Q", 4) + b"{\xff\xff}", "not valid JSON", None),
        (struct.pack("<Q", 2) + b"{}", "holds no adapter", None),
        (struct.pack("<Q", 20_000) + b"[" * 20_000, "JSON", None),
        (struct.pack("<Q", 15) + b'{"a":{},"a":{}}', "twice", "a"),
        (b"\x80\x04\x95" + GOOD, "pickle", None),
        (b"PK\x03\x04" + GOOD, "pickle", None),
        (changed(dtype="I64"), "'I64' is not one of", A_KEY),
        (changed(dtype=["F32"]), "is not one of", A_KEY),
        (changed(shape=[2, 10**15]), "needs 8000000000000000 bytes", A_KEY),
        (changed(shape=[2, -3]), "not a list of sizes", A_KEY),
        (changed(shape=[2, True]), "not a list of sizes", A_KEY),
        (changed(shape=[2.0, 3]), "not a list of sizes", A_KEY),
        (changed(shape=6), "not a list of sizes", A_KEY),
        (changed(shape=[6]), "expected 2 to 5 dimensions", A_KEY),
        (changed(shape=[3, 2]), "rank 3, but adapter_config.json says 2", A_KEY),
        (changed(data_offsets=[0, 23]), "needs 24 bytes, data_offsets give 23", A_KEY),
        (changed(data_offsets=[-24, 0]), "not two positions", A_KEY),
        (changed(data_offsets=[0]), "not two positions", A_KEY),
        (changed(data_offsets=[24, 48]), "data_offsets start at", None),
        (changed(data_offsets=[10**12, 10**12 + 24]), "data_offsets start at", None),
        (changed(extra=1), "must have dtype, shape and data_offsets", A_KEY),
        (with_header(lambda h: h.update({A_KEY: 3})), "must have dtype, shape", A_KEY),
        (with_header(lambda h: h.update(__metadata__={"a": 1})), "to strings", "__metadata__"),
        (with_header(lambda h: h.update(__metadata__=[])), "to strings", "__metadata__"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_broken_tensor_file(tmp_path: Path, data: bytes, part: str, key: str | None) -> None:
    refused(write(tmp_path / "x", factors=data), "adapter_model.safetensors", part, key=key)


def test_header_over_the_limit(tmp_path: Path) -> None:
    folder = write(tmp_path / "x")
    with open(folder / "adapter_model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER + 1))
        file.truncate(MAX_HEADER + 100)
    refused(folder, f"the limit is {MAX_HEADER}")


def test_terabytes_of_zeros_are_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "x")
    with open(folder / "adapter_model.safetensors", "wb") as file:
        try:
            file.truncate(MAX_FILE + 1)  # sparse
        except OSError as error:
            pytest.skip(f"no sparse file of {MAX_FILE + 1} bytes here: {error}")
    refused(folder, "over the limit")


def replaced(key: str, value: Tensor | None) -> dict[str, Tensor]:
    factors = tensors()
    if value is None:
        del factors[key]
    else:
        factors[key] = value
    return factors


B_KEY = f"{PREFIX}a.lora_B.weight"
BIAS_KEY = f"{PREFIX}a.lora_B.bias"


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        (A_KEY, None, "missing"),
        (B_KEY, None, "missing"),
        (A_KEY, torch.ones(3, 3), "rank 3, but adapter_config.json says 2"),
        (B_KEY, torch.ones(4, 3), "rank 3, but lora_A has 2"),
        (A_KEY, torch.ones(2), "expected 2 to 5 dimensions"),
        (A_KEY, torch.ones(2, 0), "none of them 0"),
        (B_KEY, torch.full((4, 2), math.nan), "holds NaN"),
        (B_KEY, torch.full((4, 2), -math.inf), "holds infinity"),
        (A_KEY, torch.full((2, 3), math.inf, dtype=torch.bfloat16), "holds infinity"),
        (A_KEY, torch.ones(2, 3, dtype=torch.int8), "'I8' is not one of"),
        (BIAS_KEY, torch.ones(4), "lora_bias is off"),
        ("something.else", torch.ones(1), "left over"),
        (f"{PREFIX}a.weight", torch.ones(1), "a whole weight of the base model"),
        (f"{PREFIX}a.lora_A.default.weight", torch.ones(1), "keys of several adapters"),
        (f"{PREFIX}a.lora_magnitude_vector", torch.ones(4), "DoRA is not supported"),
        (f"{PREFIX}a.lora_embedding_A", torch.ones(4), "an adapter of an embedding"),
        (f"{PREFIX}a.modules_to_save.weight", torch.ones(4), "a whole module"),
        (f"{PREFIX}a.hada_w1_a", torch.ones(4), "LoHa is not supported"),
        (f"{PREFIX}{'x.' * 300}a.lora_A.weight", torch.ones(2, 3), "longer than 512"),
    ],
)
def test_wrong_tensors(tmp_path: Path, key: str, value: Tensor | None, part: str) -> None:
    refused(write(tmp_path / "x", factors=replaced(key, value)), part, key=key)


def test_configured_bias_is_missing(tmp_path: Path) -> None:
    refused(write(tmp_path / "x", config(lora_bias=True)), "missing", key=BIAS_KEY)


@pytest.mark.parametrize("bias", [torch.ones(3), torch.ones(4, 1)])
def test_bias_of_wrong_shape(tmp_path: Path, bias: Tensor) -> None:
    factors = replaced(BIAS_KEY, bias) | {f"{PREFIX}b.c.lora_B.bias": torch.ones(5)}
    folder = write(tmp_path / "x", config(lora_bias=True), factors)
    refused(folder, str(list(bias.shape)), key=BIAS_KEY)


def test_model_without_the_layer(tmp_path: Path) -> None:
    model = small_model()
    del model.a
    refused(write(tmp_path / "x"), "the model has no layer 'a'", key=A_KEY, model=model)


@pytest.mark.parametrize(
    ("layer", "part"),
    [
        (nn.Linear(5, 4), "takes 3 features to 4"),
        (nn.Conv1d(3, 4, 2), "kernel of 2"),
        (nn.Embedding(3, 4), "not a linear layer"),
    ],
)
def test_model_with_another_layer(tmp_path: Path, layer: nn.Module, part: str) -> None:
    model = small_model()
    model.a = layer
    refused(write(tmp_path / "x"), part, key=A_KEY, model=model)


def test_read_header_alone(tmp_path: Path) -> None:
    with TensorFile(write(tmp_path / "x") / "adapter_model.safetensors") as opened:
        entries = opened.entries
    assert entries[A_KEY].shape == (2, 3)
    assert entries[A_KEY].dtype == "F32"


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
SOMETHING_ELSE = {
    "LFS": (LFS, "a Git LFS pointer, not the file itself: fetch it with 'git lfs pull'"),
    "HTML": (b"<!DOCTYPE html>\n<html><head><title>404</title>", "an HTML or XML page"),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "HTML or XML page"),
    "JSON": (b'{"error":"Repository not found"}', 'text, not an adapter: it begins \'{"error"'),
    "words": (b"Access to model x is restricted.\n", "it begins 'Access to model x is restricted."),
    "nothing": (b"", "empty: 0 bytes"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(100), "a GGUF file"),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00" + bytes(100), "a gzip file"),
    "pickle": (b"\x80\x02}q\x00X\x01\x00\x00\x00a" + bytes(100), "pickles are never loaded"),
}


@pytest.mark.parametrize("kind", SOMETHING_ELSE)
def test_files_that_are_something_else(tmp_path: Path, kind: str) -> None:
    """One line that says what lies in an adapter's place, of both files of a folder."""
    data, message = SOMETHING_ELSE[kind]
    folder = write(tmp_path / "x", None, data)
    refused(folder, "adapter_model.safetensors", message)
    file = tmp_path / "x.safetensors"
    file.write_bytes(data)
    with pytest.raises(AdapterFileError) as caught:
        load_adapter(file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    if kind != "JSON":
        refused(write(tmp_path / "y", data), "adapter_config.json", message)


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_looks_like_a_pickle(tmp_path: Path, length: int) -> None:
    """Headers of 640 bytes and so on begin as pickles do."""
    data = save(tensors())
    start = 8 + int.from_bytes(data[:8], "little")
    assert start - 8 <= length
    text = data[8:start].ljust(length)
    file = length.to_bytes(8, "little") + text + data[start:]
    assert list(load_adapter(write(tmp_path / "x", None, file)).layers) == ["a", "b.c"]
