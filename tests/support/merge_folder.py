"""A folder with a model, two adapters, a text, and a configuration that merges them."""

from __future__ import annotations

from pathlib import Path

from tiny_models import WORDS, language_model, save_adapter, save_language_model

CONFIG = """
pipe_id = "base"
prompt = "the model"
texts = ["text.txt"]
max_new_tokens = 4
samples = 3
device = "cpu"

[[loras]]
file_path = "one"
dropout_rate = 0.5

[[loras]]
file_path = "."
file_name = "two/adapter_model.safetensors"
adapter_name = "second"
dropout_rate = 0.5
adapter_weight = 0.5
"""


def save_merge(folder: Path) -> Path:
    """Writes all of it; `merge.toml` is the configuration."""
    save_language_model(folder / "base")
    for seed, name in enumerate(["one", "two"], start=1):
        save_adapter(folder / name, language_model(), seed)
    (folder / "text.txt").write_text(" ".join(WORDS * 3), encoding="utf-8")
    (folder / "merge.toml").write_text(CONFIG, encoding="utf-8")
    return folder


def changed(folder: Path, *pairs: tuple[str, str], text: str = CONFIG) -> Path:
    """Another configuration beside it: lines that begin with a pair's first are its second."""
    for old, new in pairs:
        lines = text.splitlines()
        assert any(line.startswith(old) for line in lines), old
        text = "\n".join(new if line.startswith(old) else line for line in lines)
    file = folder / "changed.toml"
    file.write_text(text, encoding="utf-8")
    return file
