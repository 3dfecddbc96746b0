"""The TOML file of a merge: the paper's as it is, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_ortho.merge_config import ConfigError, MergeConfig, read_config

# As the paper's reference code has them, values apart.
PAPER = """
save_folder_name = "duck_toy_yarn"

pipe_id = "stabilityai/stable-diffusion-xl-base-1.0"
prompt = "[B] duck, guaguazhenzhi (style), best quality"
neg_prompt = ""
batch_size = 4
num_batches = 1

[[loras]]
file_path = "anonymousrepos/SDXL_LoRA_Models"
file_name = "community/yarn.safetensors"
adapter_name = "yarn"
dropout_rate = 0.5
adapter_weight = 1.0

[[loras]]
file_path = "anonymousrepos/SDXL_LoRA_Models"
file_name = "trained/duck_toy.safetensors"
adapter_name = "duck_toy"
dropout_rate = 0.25
adapter_weight = 0.75
"""


def parse(tmp_path: Path, text: str) -> MergeConfig:
    file = tmp_path / "config.toml"
    file.write_text(text, encoding="utf-8")
    return read_config(file)


def test_the_papers_file_as_it_is(tmp_path: Path) -> None:
    config = parse(tmp_path, PAPER)
    assert config.pipe_id == "stabilityai/stable-diffusion-xl-base-1.0"
    assert (config.batch_size, config.num_batches, config.neg_prompt) == (4, 1, "")
    assert config.save_folder_name == "duck_toy_yarn"
    assert config.names == ["yarn", "duck_toy"]
    assert config.p == [0.5, 0.25]
    assert config.weights == [1.0, 0.75]
    assert config.loras[0].file_name == "community/yarn.safetensors"
    assert (config.steps, config.guidance_scale, config.clip_skip) == (40, 7.0, None)


def test_no_rate_and_no_name(tmp_path: Path) -> None:
    config = parse(tmp_path, '[[loras]]\nfile_path = "x/yarn"\n')
    assert config.p is None
    assert config.names == ["yarn"]
    assert config.weights == [1.0]
    assert (config.samples, config.strata) == (4, 1)
    assert parse(tmp_path, f"strata = 65536\n{LORA}").strata == 65536


LORA = '[[loras]]\nfile_path = "x"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt = ", "not valid TOML"),
        (f"prompt = {'[' * 100000}", "nested too deeply"),
        ('prompt = "\\x00', "not valid TOML"),
        ('prompt = "x"', r"needs at least one \[\[loras\]\] table"),
        ("loras = 3", r"needs at least one \[\[loras\]\] table"),
        ("[[loras]]\n", r"loras\[0\]: file_path is missing"),
        (f"{LORA}rate = 0.5\n", r"loras\[0\]: unknown key 'rate'; known are file_path"),
        (f'colour = "red"\n{LORA}', "unknown key 'colour'; known are pipe_id"),
        (f"{LORA}dropout_rate = 1.0\n", r"loras\[0\]: dropout_rate must be in \[0, 1\), got 1.0"),
        (f"{LORA}dropout_rate = nan\n", r"loras\[0\]: dropout_rate must be finite"),
        (f'{LORA}dropout_rate = "0.5"\n', r"loras\[0\]: dropout_rate must be a number, got '0.5'"),
        (f"{LORA}adapter_weight = true\n", r"adapter_weight must be a number, got True"),
        (f"{LORA}{LORA}", "adapter_name 'x' occurs twice"),
        (
            f'{LORA}dropout_rate = 0.5\n{LORA}adapter_name = "y"\n',
            r"loras\[1\] has no dropout_rate while others have one",
        ),
        (f"batch_size = 0\n{LORA}", "batch_size must be at least 1, got 0"),
        (f"steps = 1.5\n{LORA}", "steps must be an integer, got 1.5"),
        (f"strata = 0\n{LORA}", r"strata must be in \[1, 65536\], got 0"),
        (f"strata = 65537\n{LORA}", r"strata must be in \[1, 65536\], got 65537"),
        (f"strata = 2.0\n{LORA}", "strata must be an integer, got 2.0"),
        (f'kind = "audio"\n{LORA}', "kind must be one of language, image, got 'audio'"),
        (f'methods = ["ortho"]\n{LORA}', "methods must be some of orthogonal, dropout, direct"),
        (f"methods = []\n{LORA}", "methods must be some of"),
        (f"texts = [1]\n{LORA}", "texts must be a list of texts"),
        (f'save_folder_name = "../up"\n{LORA}', "save_folder_name must be the name of a folder"),
    ],
)
def test_refused_files(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'config.toml'}: ")
