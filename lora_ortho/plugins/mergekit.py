"""mergekit (0.1.5 or newer): the merge method ``lora_ortho``, on LoRA factors.

    python -m lora_ortho.plugins.mergekit CONFIG.yml OUTPUT_FOLDER [options of mergekit-yaml]

mergekit reads adapters by writing a full model for each and takes their difference; here every
weight of the base is read once, and the factors are merged into it. Which adapters, rates and
weights, says a TOML file with the paper's [[loras]] tables, as for ``lora-ortho merge``:

    merge_method: lora_ortho
    base_model: ./base
    models: [{model: ./base}]
    parameters: {loras: merge.toml, method: ortho_rows, seed: 0}

mergekit ignores parameters that a method does not have; the program above refuses them. Of the
TOML file, keys beside [[loras]] are those of ``lora-ortho merge``; another seed there is an error.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import yaml  # type: ignore[import-untyped]
from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.base import BasePolicy, InputContract, TensorGroup
from mergekit.merge_methods.easy_define import merge_method
from mergekit.merge_methods.registry import register, registered_methods

from lora_ortho.adapters import LoadedAdapter, assign_streams
from lora_ortho.adapters.base_weights import lies_transposed
from lora_ortho.adapters.files.tensor_file import open_regular
from lora_ortho.merge_config import read_config
from lora_ortho.merges import method_named
from lora_ortho.messages import one_line
from lora_ortho.module import Adapter

from .weights import left_over, members, merged

NAME = "lora_ortho"


class _Plan(NamedTuple):
    """What one configuration file asks for."""

    adapters: tuple[LoadedAdapter, ...]
    p: list[float] | None
    weights: list[float]
    seed: int
    strata: int


@functools.lru_cache(maxsize=4)
def _plan(path: str, stamp: tuple[int, int]) -> _Plan:
    """The adapters of a TOML file, read once as long as the file does not change."""
    config = read_config(Path(path))
    adapters = tuple(config.load_adapters())
    return _Plan(adapters, config.p, config.weights, config.seed, config.strata)


@functools.lru_cache(maxsize=4)
def _streams(base: Hashable) -> dict[str, int] | None:
    """Stream numbers of the base model's modules, from its tensors' names; None if not known."""
    if not isinstance(base, ModelReference):
        return None
    names = LoaderCache().get(base).index.tensor_paths
    modules = {""}
    for name in names:
        parts = name.split(".")[:-1]
        modules.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return assign_streams(modules)


@functools.lru_cache(maxsize=4)
def _transposed(base: Hashable) -> frozenset[str] | None:
    """The layers whose weights lie as (d_in, d_out); None where the model's class is not known.

    A square weight does not show it, and configurations of adapters do not tell it of each layer:
    the model is built without memory for weights, and its layers are asked.
    """
    if not isinstance(base, ModelReference):
        return None
    try:
        config = base.config()
        with torch.device("meta"):
            model: Any = getattr(transformers, config.architectures[0])(config)
    except Exception:  # whatever a class that transformers does not have, or cannot build, raises
        return None
    found = {name for name, module in model.named_modules() if lies_transposed(module)}
    start = f"{model.base_model_prefix}."  # which some checkpoints leave out
    return frozenset(found | {name.removeprefix(start) for name in found})


def _lies_transposed(base: Hashable, layer: str, weight: torch.Tensor, part: Adapter) -> bool:
    """Whether a layer's weight is (d_in, d_out): as the model has it, else by its sizes."""
    known = _transposed(base)
    if known is not None:
        return layer in known
    own = part.lora_B.shape[0], part.lora_A.shape[1]
    if own[0] == own[1]:
        raise ValueError(
            f"layer {layer}: transformers does not know the base model's class, so whether this "
            f"square weight lies transposed cannot be told"
        )
    return tuple(weight.shape) == own[::-1]


@functools.lru_cache(maxsize=4)
def _check_all_are_used(plan_key: tuple[str, tuple[int, int]], base: Hashable) -> None:
    if not isinstance(base, ModelReference):
        return
    names = LoaderCache().get(base).index.tensor_paths
    layers = {name.removesuffix(".weight"): name for name in names if name.endswith(".weight")}
    adapters = _plan(*plan_key).adapters
    problem = left_over(adapters, layers)
    if problem is not None:
        raise ValueError(f"{plan_key[0]}: {problem}")
    for layer in sorted({name for adapter in adapters for name in adapter.layers}):
        start = f"{layer}."
        found = {n.removeprefix(start) for n in names if n.startswith(start)} - {"weight", "bias"}
        if found:
            raise ValueError(
                f"layer {layer} has {', '.join(sorted(found))} besides its weight, which may scale "
                f"it: a quantised base cannot take a merge"
            )


@merge_method(  # type: ignore[untyped-decorator]
    name=NAME,
    pretty_name="LoRA ortho",
    reference_url="https://arxiv.org/abs/2510.03262",
    contract=InputContract(base=BasePolicy.REQUIRED, max_inputs=1),
)
def lora_ortho(
    group: TensorGroup,
    loras: str,
    method: str = "ortho_rows",
    seed: int = 0,
    sample: int = 0,
    strata: int = 1,
) -> torch.Tensor:
    """A weight of the base with the adapters merged in; weights without adapters as they are.

    A layer's stream is that of its name, so `ortho_rows` and `element_disjoint` give what
    `lora_ortho.export` and the FusionBench algorithm give.

    Args:
        group: one weight of the base model.
        loras: path of a TOML file with [[loras]] tables.
        method: a name of `lora_ortho.merges.METHODS`.
        seed, sample, strata: of the masks.
    Raises:
        ValueError: what does not fit, by name; adapters for layers that the base does not have.
    """
    method_named(method)
    status = os.stat(loras)
    key = (loras, (status.st_mtime_ns, status.st_size))
    plan = _plan(*key)
    for name, own, default, given in (
        ("seed", plan.seed, 0, seed),
        ("strata", plan.strata, 1, strata),
    ):
        if own not in (default, given):  # the default is what a file has that names none
            raise ValueError(f"{loras} has {name} = {own}, the parameters have {given}")
    entry = group.entries[0]
    _check_all_are_used(key, entry.id)
    layer, _, kind = (group.metadata.name or "").rpartition(".")
    parts = members(layer, plan.adapters, plan.p, plan.weights)
    tensor: torch.Tensor = entry.tensor
    if not parts or kind != "weight":
        return tensor
    biased = [part.name for part in parts if part.bias is not None]
    if biased:
        raise ValueError(f"layer {layer}: adapter {biased[0]!r} has a bias (lora_bias)")
    streams = _streams(entry.id) or assign_streams([layer])
    turned = _lies_transposed(entry.id, layer, tensor, parts[0])
    try:
        weight, _ = merged(
            tensor,
            None,
            parts,
            method,
            seed=seed,
            stream=streams[layer],
            sample=sample,
            strata=strata,
            transposed=turned,
        )
    except ValueError as error:
        raise ValueError(f"layer {layer}: {error}") from error
    return weight


if NAME not in {found.spec.name for found in registered_methods()}:
    register(lora_ortho)


def _check_parameters(file: Path) -> None:
    """Raises ValueError for a parameter that the method does not have; mergekit ignores it."""
    with open_regular(file) as opened:
        config = yaml.safe_load(opened.read())
    if not isinstance(config, dict) or config.get("merge_method") != NAME:
        return
    known = [parameter.name for parameter in merge_methods.get(NAME).spec.parameters]
    for given in _parameters(config):
        for key in given:
            if key not in known:
                names = ", ".join(known)
                raise ValueError(f"{file}: unknown parameter {key!r}; known are {names}")


def _parameters(config: Any) -> Iterator[dict[Any, Any]]:
    """Every table called "parameters", at any depth: of the whole, of models, of slices."""
    if isinstance(config, dict) and isinstance(config.get("parameters"), dict):
        yield config["parameters"]
    inside = config.values() if isinstance(config, dict) else config
    for value in inside if isinstance(config, (dict, list)) else ():
        yield from _parameters(value)


def main() -> int:
    """mergekit-yaml with the method registered; the exit status."""
    from mergekit.scripts.run_yaml import main as run_yaml

    try:
        words = sys.argv[1:]
        context = run_yaml.make_context(run_yaml.name, list(words), resilient_parsing=True)
        file = context.params.get("config_file")
        if file is not None:
            _check_parameters(Path(file))
        run_yaml(words)
    except (OSError, ValueError, yaml.YAMLError) as error:
        print(f"lora_ortho.plugins.mergekit: error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
