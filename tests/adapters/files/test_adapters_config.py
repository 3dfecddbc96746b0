"""adapter_config.json: fields that are honoured, and fields that are refused by name."""

from __future__ import annotations

import math
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import PREFIX, config, refused, tensors, write

from lora_ortho.adapters import load_adapter
from lora_ortho.adapters.files.layer_patterns import LayerPatterns
from lora_ortho.adapters.files.peft_config import PeftConfig


@pytest.mark.parametrize(
    ("pattern", "layer", "matches"),
    [
        ("c", "b.c", True),
        ("b.c", "b.c", True),
        ("^b.c", "b.c", True),
        ("c", "b.xc", False),
        ("b", "b.c", False),
        (r".*\.c", "a.b.c", True),
        ("(c|d)", "b.d", True),
        (r"layers\.[0-9]+\.q", "model.layers.12.q", True),
        (r"layers\.1\.q", "model.layers.12.q", False),
    ],
)
def test_patterns_as_in_peft(pattern: str, layer: str, matches: bool) -> None:
    ranks, alphas = LayerPatterns({pattern: 2}), LayerPatterns({pattern: 3.0})
    settings = PeftConfig(8, 8.0, rank_pattern=ranks, alpha_pattern=alphas)
    assert settings.rank_of(layer) == (2 if matches else 8)
    assert settings.scaling_of(layer) == (1.5 if matches else 1.0)


def test_rank_and_alpha_patterns(tmp_path: Path) -> None:
    factors = tensors(2)
    factors[f"{PREFIX}b.c.lora_A.weight"] = torch.ones(3, 4)
    factors[f"{PREFIX}b.c.lora_B.weight"] = torch.ones(5, 3)
    fields = config(rank_pattern={"b.c": 3}, alpha_pattern={"c": 12})
    adapter = load_adapter(write(tmp_path / "x", fields, factors))
    assert adapter.layers["a"].scaling == 3.0
    assert adapter.layers["b.c"].scaling == 4.0
    assert adapter.layers["b.c"].lora_A.shape == (3, 4)


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("use_dora", True, "DoRA"),
        ("use_qalora", True, "QA-LoRA"),
        ("use_bdlora", {"nblocks": 2}, "BD-LoRA"),
        ("alora_invocation_tokens", [1, 2], "activated LoRA"),
        ("target_parameters", ["experts.w"], "bare parameters"),
        ("layer_replication", [[0, 2], [1, 3]], "repeated layers"),
        ("modules_to_save", ["head"], "whole modules"),
        ("megatron_config", {"a": 1}, "Megatron"),
        ("trainable_token_indices", [1], "embeddings"),
        ("arrow_config", {"top_k": 1}, "Arrow"),
        ("kasa_config", {"beta": 1}, "KaSA"),
        ("monteclora_config", {"num_samples": 1}, "MonteCLoRA"),
        ("bias", "all", "biases would be replaced"),
        ("bias", None, "biases would be replaced"),
        ("init_lora_weights", "pissa", "changed base weights"),
        ("init_lora_weights", "pissa_niter_4", "changed base weights"),
        ("init_lora_weights", "olora", "changed base weights"),
        ("init_lora_weights", "corda", "changed base weights"),
        ("init_lora_weights", "loftq", "changed base weights"),
        ("init_lora_weights", "lora_ga", "changed base weights"),
        ("init_lora_weights", ["eva"], "changed base weights"),
        ("peft_type", "LOHA", "only 'LORA'"),
        ("peft_type", None, "only 'LORA'"),
        ("field_of_tomorrow", 3, "unknown field"),
        ("r", 0, "positive integer"),
        ("r", -2, "positive integer"),
        ("r", 2.0, "positive integer"),
        ("r", True, "positive integer"),
        ("r", "2", "positive integer"),
        ("r", None, "positive integer"),
        ("r", 2**31, "positive integer"),
        ("lora_alpha", "6", "expected a number"),
        ("lora_alpha", None, "expected a number"),
        ("lora_alpha", math.nan, "not finite"),
        ("lora_alpha", math.inf, "not finite"),
        ("lora_alpha", 10**400, "not finite"),
        ("use_rslora", 1, "true or false"),
        ("lora_bias", "yes", "true or false"),
        ("rank_pattern", ["a"], "expected an object"),
        ("rank_pattern", {"(": 2}, "not a regular expression"),
        ("rank_pattern", {r"(a)\1": 2}, "a groupref is not supported"),
        ("rank_pattern", {"(?i)A": 2}, "flags in a pattern are not supported"),
        ("rank_pattern", {"(?i:A)": 2}, "flags in a pattern are not supported"),
        ("rank_pattern", {"a" * 9000: 2}, "too long"),
        ("alpha_pattern", {"(" * 4000 + ")" * 4000: 2}, "recursion"),
    ],
)
def test_refused_fields(tmp_path: Path, name: str, value: Any, part: str) -> None:
    refused(write(tmp_path / "x", config(**{name: value})), part, "adapter_config.json", key=name)


@pytest.mark.parametrize(
    ("name", "value"), [("rank_pattern", {"a": 0}), ("alpha_pattern", {"a": "x"})]
)
def test_bad_pattern_values(tmp_path: Path, name: str, value: Any) -> None:
    refused(write(tmp_path / "x", config(**{name: value})), key=f"{name}.a")


@pytest.mark.parametrize("name", ["r", "lora_alpha"])
def test_missing_fields(tmp_path: Path, name: str) -> None:
    fields = config()
    del fields[name]
    refused(write(tmp_path / "x", fields), "missing", key=name)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"", "empty: 0 bytes"),
        (b"[]", "expected a JSON object"),
        (b'{"r": 2, "r": 2}', "twice"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"r": 1' + b"0" * 5000 + b"}", "JSON"),
        (b'{"a":' * 20_000, "JSON"),
    ],
)
def test_broken_config(tmp_path: Path, text: bytes, part: str) -> None:
    refused(write(tmp_path / "x", text), "adapter_config.json", part)


def test_rank_disagrees_with_the_pattern(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", config(rank_pattern={"c": 4}))
    refused(folder, "rank 2, but adapter_config.json says 4", key=f"{PREFIX}b.c.lora_A.weight")


HOSTILE = [
    "a*.*(a|a|a|a|a)b",
    "(a+)+b",
    "((a*)*)*b",
    "(a|a)*(a|a)*b",
    ".*.*.*.*.*.*.*.*b",
    "(?=(a*)*b)a",
    "((((a?){500}){500}){500}){500}b",
]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_hostile_pattern_is_quick(tmp_path: Path, pattern: str) -> None:
    """Patterns on which `re` would go back and forth for years, on a long name."""
    name = "a" * 250 + "." + "a" * 250
    factors = tensors() | {
        f"{PREFIX}{name}.lora_A.weight": torch.ones(2, 3),
        f"{PREFIX}{name}.lora_B.weight": torch.ones(4, 2),
    }
    folder = write(tmp_path / "x", config(rank_pattern={pattern: 4}), factors)
    start = time.perf_counter()
    assert load_adapter(folder).layers[name].scaling == 3.0
    assert time.perf_counter() - start < 1.0


def test_very_many_hostile_patterns_are_refused() -> None:
    """The cost of a whole table has a bound too."""
    patterns = LayerPatterns({f"(a*)*{j}b*(?=a*)c": 1 for j in range(2000)})
    names = ["a" * 500 + str(j) for j in range(2000)]
    with pytest.raises(ValueError, match="more than 4000000 steps"):
        list(map(patterns.find, names))


ATOMS = ["a", "b", "1", "_", ".", "^", "$", "[ab]", "[^a]", r"[\d_a]"]
ATOMS += [r"\.", r"\d", r"\D", r"\w", r"\b", r"\B", "(?<=a)", "(?<!b.)"]
TIMES = ["*", "+", "?", "{2}", "{1,3}", "*?", "{0,2}?", "{2,}"]


def random_pattern(chance: random.Random, depth: int) -> str:
    kind = chance.choice("aaaa+++|*=!") if depth else "a"
    parts = [random_pattern(chance, depth - 1) for _ in range(2)] if depth else []
    made = {
        "a": lambda: chance.choice(ATOMS),
        "+": lambda: "".join(parts),
        "|": lambda: f"({'|'.join(parts)})",
        "*": lambda: f"(?:{parts[0]}){chance.choice(TIMES)}",
        "=": lambda: f"(?={parts[0]})",
        "!": lambda: f"(?!{parts[0]})",
    }
    return made[kind]()


def test_patterns_mean_what_they_mean_in_re() -> None:
    """Against Python's own engine, with the rule by which PEFT matches names."""
    chance, matched, tried = random.Random(5), 0, 0
    for _ in range(10_000):
        pattern = random_pattern(chance, 4)
        name = "".join(chance.choice("ab.1_") for _ in range(chance.randint(1, 8)))
        try:
            wanted = bool(re.match(rf"(.*\.)?({pattern})$", name))
        except re.error:  # nothing that could be repeated
            continue
        found = LayerPatterns({pattern: 1}).find(name) == 1
        assert found == wanted, (pattern, name)
        matched, tried = matched + wanted, tried + 1
    assert matched > 500
    assert tried > 5000


def test_the_first_pattern_counts() -> None:
    """Among plain names, names with a dot for any character, and expressions."""
    patterns = ["b.c", r"b\.c", "c", r".*\.c", "^a.b.c", "^a\\.b\\.c", "[abc]"]
    for first in patterns:
        for second in patterns:
            table = LayerPatterns({first: 1, second: 2})
            for name in ("a.b.c", "b.c", "bxc", "a.bxc", "c", "d.c", "a.b"):
                hits = [p for p in (first, second) if re.match(rf"(.*\.)?({p})$", name)]
                wanted = None if not hits else 2 if hits[0] != first else 1
                assert table.find(name) == (2 if first == second and hits else wanted), name
