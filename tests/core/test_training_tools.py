"""Training an attached PEFT model with what people use: the Trainer as it comes, FSDP2."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import lora_ortho
from lora_ortho import mask_stream
from lora_ortho.adapters import assign_streams
from lora_ortho.reference import merge

STEPS = 50


def llama_with_an_adapter() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    targets = ["q_proj", "v_proj", "down_proj", "lm_head"]
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=targets))


def losses_of_trainer(folder: Path, attached: bool, **settings: Any) -> list[float]:
    model = llama_with_an_adapter()
    if attached:  # one adapter: no masks, so PEFT alone gives the right losses
        lora_ortho.attach(model, seed=0)
    lines = [torch.arange(j, j + 12) % 61 for j in range(8)]
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=8, max_steps=STEPS, learning_rate=1e-2,
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        lr_scheduler_type="constant", **settings,
    )  # fmt: skip
    data: Any = [{"input_ids": line, "labels": line} for line in lines]
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "settings",
    [{}, {"optim": "adamw_torch"}, {"gradient_checkpointing": True},
     {"gradient_accumulation_steps": 2}, {"bf16": True}],
    ids=["as it comes", "adamw_torch", "checkpointing", "accumulation", "bf16"],
)  # fmt: skip
def test_trainer(tmp_path: Path, settings: dict[str, Any]) -> None:
    expected = losses_of_trainer(tmp_path, attached=False, **settings)
    found = losses_of_trainer(tmp_path, attached=True, **settings)
    assert len(expected) == STEPS
    assert expected[-1] < 0.6 * expected[0]
    tolerance = 3e-2 if settings.get("bf16") else 1e-3
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=tolerance, atol=0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)))
        return y


def peft_net() -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False)
    model = get_peft_model(Net(), config, "one")
    model.add_adapter("two", config)
    model.base_model.set_adapter(["one", "two"])
    return model


def batch(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(6, 8, generator=generator), torch.randn(6, 8, generator=generator)


def losses_by_torch(ranks: int) -> list[float]:
    """The same training in one process, by the formula: the mean over the ranks' batches."""
    model = peft_net()
    net = model.base_model.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=0.02)
    streams, names = assign_streams(["", "up", "down"]), ("one", "two")

    def layer(name: str, x: Tensor) -> Tensor:
        peft = net.get_submodule(name)
        base = peft.base_layer(x)
        owner = mask_stream.winners(
            0, range(x.shape[0]), range(base.shape[1]), [0.5, 0.5], stream=streams[name]
        )
        A, B = ([part[n].weight for n in names] for part in (peft.lora_A, peft.lora_B))
        gains = [2 * peft.scaling[n] for n in names]
        return merge(x, A, B, gains, [owner == j for j in range(2)], base)

    losses = []
    for _ in range(STEPS):
        optimiser.zero_grad()
        loss = torch.zeros(())
        for rank in range(ranks):
            x, target = batch(rank)
            loss = loss + (layer("down", torch.tanh(layer("up", x))) - target).square().mean()
        (loss / ranks).backward()
        optimiser.step()
        losses.append(float(loss.detach()) / ranks)
    return losses


def train_sharded(rank: int, ranks: int, folder: str) -> None:
    """One process of FSDP2; writes the losses of its batch."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    mesh = torch.distributed.init_device_mesh("cpu", (ranks,))
    model = peft_net()
    lora_ortho.attach(model, seed=0)
    net = model.base_model.model
    for part in (net.up, net.down, model):
        fully_shard(part, mesh=mesh)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    x, target = batch(rank)
    losses = []
    for _ in range(STEPS):
        optimiser.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    torch.save(losses, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_of_fsdp2(tmp_path: Path) -> None:
    """Parameters are gathered anew for every pass, into memory whose version does not move."""
    context: Any = mp.spawn(train_sharded, (2, str(tmp_path)), nprocs=2, join=False)
    deadline = time.monotonic() + 120
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the processes did not end within two minutes")
    each = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    found = torch.tensor(each).mean(dim=0)
    expected = torch.tensor(losses_by_torch(2))
    assert expected[-1] < 0.8 * expected[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
