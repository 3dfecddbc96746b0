"""Models that two processes share by FSDP: the masks of the whole, and files of the whole."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.spawn import spawn

import lora_ortho
from lora_ortho import attach, inject
from lora_ortho.adapters import adapters_of

peft = pytest.importorskip("peft", reason="PEFT is not installed: nothing to attach to")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def make() -> Any:
    """Two blocks with two adapters by PEFT, the same in every process."""
    torch.manual_seed(0)
    model: Any = None
    base = nn.Sequential(Block(), Block()).eval()
    for name in ("one", "two"):
        config = peft.LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False)
        if model is None:
            model = peft.get_peft_model(base, config, name)
        else:
            model.add_adapter(name, config)
    model.base_model.set_adapter(["one", "two"])
    return model.eval()


def _first_generation(model: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


def _second_generation(model: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for module in list(model.modules()):
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


ORDERS = [("attach", "before"), ("attach", "after"), ("inject", "before"), ("inject", "after")]
SHARDS = {"fsdp": _first_generation, "fsdp2": _second_generation}


CASES = [(how, order, shards) for how, order in ORDERS for shards in SHARDS]


def _work(rank: int, folder: str) -> None:
    """One process: what it computes in every case, and what it exports, as files."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2
    )
    for case in CASES:
        _case(rank, Path(folder) / "-".join(case), *case)
    torch.distributed.destroy_process_group()


def _case(rank: int, folder: Path, how: str, order: str, shards: str) -> None:
    folder.mkdir(exist_ok=True)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    model = make()
    loaded = adapters_of(model)
    if how == "inject":
        model = model.unload()
    wrap: Any = SHARDS[shards]
    model = wrap(model) if order == "before" else model
    handle: Any = attach(model, seed=0) if how == "attach" else inject(model, loaded, seed=0)
    model = wrap(model) if order == "after" else model
    with torch.no_grad():
        outputs = [model(x), model(x)]
        names = list(handle.layers)
        if how == "attach" and shards == "fsdp2":
            lora_ortho.export(model, folder / f"exported{rank}")
        elif how == "attach":
            with pytest.raises(ValueError, match=r"layer 0\.down: .* inside of FullySharded"):
                lora_ortho.export(model, folder / f"exported{rank}")
            with type(model).summon_full_params(model):
                lora_ortho.export(model, folder / f"exported{rank}")
        handle.detach()
        outputs.append(model(x))
    torch.save((outputs, names), folder / f"found{rank}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left of all cases."""
    folder = tmp_path_factory.mktemp("processes")
    start: Any = spawn
    context = start(_work, (str(folder),), nprocs=2, join=False)
    end = time.monotonic() + 120
    try:
        while not context.join(timeout=5):  # True once all of them have ended
            assert time.monotonic() < end, "the processes did not end"
    finally:
        for process in context.processes:
            process.kill()
    return folder


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_processes(folder: Path, tmp_path: Path, case: tuple[str, str, str]) -> None:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    model = make()
    with torch.no_grad():
        with attach(model, seed=0):
            merged = model(x)
        plain = model(x)
        if case[0] == "inject":
            plain = model.unload()(x)
    for rank in range(2):
        outputs, names = torch.load(folder / "-".join(case) / f"found{rank}")
        for found, expected in zip(outputs, (merged, merged, plain), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert names == ["0.down", "0.up", "1.down", "1.up"]
        if case[0] == "attach":
            lora_ortho.export(make(), tmp_path / f"whole{rank}")
            file = "adapter_model.safetensors"
            written = (folder / "-".join(case) / f"exported{rank}" / file).read_bytes()
            assert written == (tmp_path / f"whole{rank}" / file).read_bytes()
