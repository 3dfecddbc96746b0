"""Adapters merged inside FusionBench: its program, its configurations, its refusals."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from plugin_models import (
    assert_weights,
    expected,
    needs,
    run_program,
    save_examples,
)
from tiny_models import language_model

pytestmark = needs("fusion-bench", "fusion_bench")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_examples(tmp_path_factory.mktemp("plugins"))


def test_fusion_bench_example_as_it_is(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "work")
    arguments = ["--config-dir", ".", "--config-name", "fusion_bench"]
    done = run_program("fusion_bench.scripts.cli", *arguments, cwd=tmp_path / "work")
    assert done.returncode == 0, done.stderr
    assert_weights(tmp_path / "work" / "merged", expected(folder, "ortho_rows"))


@pytest.mark.parametrize("method", ["direct", "element_disjoint"])
def test_fusion_bench_other_methods(
    method: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusion_bench.modelpool import BaseModelPool
    from fusion_bench.utils import instantiate

    from lora_ortho.plugins.fusion_bench import LoraOrtho

    monkeypatch.chdir(folder)
    source = {"_target_": "transformers.AutoModelForCausalLM.from_pretrained"}
    models: dict[str, Any] = {
        "_pretrained_": {**source, "pretrained_model_name_or_path": "./base"},
        "one": {"_target_": "lora_ortho.load_adapter", "path": "one"},
        "two": {"_target_": "lora_ortho.load_adapter", "path": "two"},
    }
    place: Any = {"seed": 4, "sample": 3, "strata": 2}
    LoraOrtho(method, p=[0.5, 0.5], **place).to_yaml(tmp_path / "method.yaml")
    algorithm = LoraOrtho.from_yaml(tmp_path / "method.yaml")
    assert (algorithm.merge_method, algorithm.p, algorithm.seed) == (method, [0.5, 0.5], 4)
    assert (algorithm.sample, algorithm.strata) == (3, 2)
    found = algorithm.run(BaseModelPool(models)).state_dict()
    for name, tensor in expected(folder, method, **place).items():
        assert torch.equal(found[name], tensor), name
    assert instantiate(algorithm.config).p == [0.5, 0.5]


def test_fusion_bench_refusals(folder: Path) -> None:
    from fusion_bench.modelpool import BaseModelPool

    from lora_ortho.plugins.fusion_bench import LoraOrtho

    with pytest.raises(ValueError, match="method must be one of direct"):
        LoraOrtho("orthogonal")
    with pytest.raises(TypeError, match="unknown key 'sed'; known are merge_method, p, weights"):
        LoraOrtho(sed=3)
    with pytest.raises(ValueError, match="no adapter beside _pretrained_"):
        LoraOrtho().run(BaseModelPool({"_pretrained_": language_model()}))
    pool = BaseModelPool({"_pretrained_": language_model(), "one": language_model()})
    with pytest.raises(TypeError, match="one of the pool must be an adapter"):
        LoraOrtho().run(pool)
