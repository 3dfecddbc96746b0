"""torch.compile: no setting recompiles, any number of tokens, hot swaps; values as in eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lora_ortho import Adapter, FusedOrthoLoRALinear, attach, fused_ortho_lora, inject
from lora_ortho.adapters import LoadedAdapter

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
Change = Callable[..., object]


@pytest.fixture(autouse=True)
def _fresh_compiler(_poisoned: None) -> Iterator[None]:
    torch.use_deterministic_algorithms(False)  # compiled graphs guard on it
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair() -> list[Adapter]:
    return [Adapter(torch.randn(4, 8), torch.randn(8, 4)) for _ in range(2)]


def module() -> tuple[Any, Change]:
    layer = FusedOrthoLoRALinear(nn.Linear(8, 8), pair(), seed=0)

    def change(**settings: Any) -> None:
        for name, value in settings.items():
            setattr(layer, name, value)

    return layer, change


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def attached() -> tuple[Any, Change]:
    config = LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
    model = get_peft_model(network(), config, "one").eval()
    model.add_adapter("two", config)
    model.base_model.set_adapter(["one", "two"])
    return model, attach(model, seed=0).set


def injected() -> tuple[Any, Change]:
    model = network()
    adapters = [LoadedAdapter(n, dict(zip("02", pair(), strict=True)), Path(n)) for n in "ab"]
    return model, inject(model, adapters, seed=0).set


MADE = [module, attached, injected]


class Counted:
    """A compiled model, and how many graphs it took."""

    def __init__(self, model: Any, **settings: Any) -> None:
        self.counter = CompileCounter()
        options = {"backend": self.counter, "fullgraph": True, **settings}
        self.model, self.compiled = model, torch.compile(model, **options)

    @property
    def graphs(self) -> int:
        return int(self.counter.frame_count)

    def check(self, *arguments: Any, **named: Any) -> Tensor:
        """The compiled output, after a look that it is the eager one."""
        expected = self.model(*arguments, **named)
        found: Tensor = self.compiled(*arguments, **named)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        return found


VALUES: dict[str, Sequence[Any]] = {
    "sample": [0, 1, 2, 7, 1000, 2**24 - 1],
    "strata": [1, 2, 3, 65536, 7, 4],
    "seed": [0, 1, -5, 2**63 - 1, 2**64 - 1, 3],
    "weights": [[1.0, 1.0], [0.5, 2.0], [-1.0, 0.25], [3.0, 1e-9], [0.1, 0.2], [7.0, 8.0]],
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("what", list(VALUES))
@pytest.mark.parametrize("make", MADE)
def test_no_setting_compiles_again(make: Any, what: str, grad: bool) -> None:
    model, change = make()
    change(sample=5)
    counted, seen = Counted(model), []
    with torch.set_grad_enabled(grad):
        for value in VALUES[what]:
            change(**{what: value})
            seen.append(counted.check(X))
    assert counted.graphs == 1
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))


def test_layers_of_one_kind_share_their_code() -> None:
    """Blocks that are compiled one by one differ in their streams, and compile once."""
    counter = CompileCounter()
    model, _ = injected()
    blocks = [layer for layer in model if not isinstance(layer, nn.ReLU)]
    expected = [block(X) for block in blocks]
    assert not torch.equal(*expected)
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    assert all(torch.equal(block(X), y) for block, y in zip(blocks, expected, strict=True))
    assert counter.frame_count == 1


def test_a_fresh_seed_in_every_call() -> None:
    model, change = module()
    change(seed=None)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(3)
    first, second = compiled(X), compiled(X)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(compiled(X), first)


@pytest.mark.parametrize("make", MADE)
def test_a_weight_that_becomes_zero_costs_one(make: Any) -> None:
    model, change = make()
    counted = Counted(model)
    for weights, graphs in (([1.0, 2.0], 1), ([1.0, 0.0], 2), ([3.0, 0.0], 2), ([1.0, 4.0], 2)):
        change(weights=weights)
        counted.check(X)
        assert counted.graphs == graphs


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("make", MADE)
def test_any_number_of_tokens_in_one_graph(make: Any, grad: bool) -> None:
    model, _ = make()
    counted = Counted(model, dynamic=True)
    with torch.set_grad_enabled(grad):
        for tokens in (3, 5, 9, 12, 17, 33):
            counted.check(torch.randn(tokens, 8))
        assert counted.graphs == 1
        for lead in ((2, 3), (4, 5)):  # another number of dimensions: once more
            counted.check(torch.randn(*lead, 8))
    assert counted.graphs == 2


@pytest.mark.parametrize("name", ["stream", "sample", "strata", "row_offset", "col_offset", "seed"])
def test_plain_ints_given_to_the_op(name: str) -> None:
    """Once as a constant, once as a number that may change (0 and 1 are torch's own cases)."""
    A, B = torch.randn(4, 8), torch.randn(8, 4)

    def call(x: Tensor, value: int) -> Tensor:
        return fused_ortho_lora(x, [A, A], [B, B], **{"seed": 3, "sample": 7, name: value})

    counted = Counted(call)
    for value in (5, 6, 9, 100, 1000, 12345, 1, *([] if name == "strata" else [0])):
        counted.check(X, value)
    assert counted.graphs <= 3


def test_seed_tensors_and_weight_tensors() -> None:
    A, B = torch.randn(4, 8), torch.randn(8, 4)

    def call(x: Tensor, seed: Tensor, weights: Tensor) -> Tensor:
        return fused_ortho_lora(x, [A, A], [B, B], seed=seed, weights=weights)

    counted = Counted(call)
    for value in range(5):
        counted.check(X, torch.tensor(value), torch.tensor([1.0, value]))
    assert counted.graphs == 1


def test_pefts_scale_becomes_a_number_that_may_change() -> None:
    """PEFT keeps it as a float: as with PEFT alone, one compilation more at the first change."""
    model, _ = attached()
    counted, layer = Counted(model), model.base_model.model[0]
    for scale in (1.0, 2.0, 0.5, 3.25, 0.125):
        layer.set_scale("one", scale)
        counted.check(X)
    assert counted.graphs == 2


def test_a_model_made_ready_for_hot_swaps(tmp_path: Path) -> None:
    """Scalings are tensors there, ranks padded; a swap is seen and compiles nothing."""
    base = network()
    for name, rank in (("one", 3), ("two", 4)):
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank + 1, target_modules=["0", "2"], init_lora_weights=False
        )
        model = get_peft_model(base, config)
        model.save_pretrained(tmp_path / name)
        base = model.unload()
    model = PeftModel.from_pretrained(base, tmp_path / "one").eval()
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    handle = attach(model, seed=0)
    counted = Counted(model)
    with torch.no_grad():
        before = counted.check(X)
        hotswap_adapter(model, tmp_path / "two", adapter_name="default", torch_device="cpu")
        after = counted.check(X)
        handle.detach()
        torch.testing.assert_close(after, model(X), rtol=1e-4, atol=1e-5)  # PEFT itself
    assert counted.graphs == 1
    assert not torch.allclose(before, after, atol=1e-3)


def test_training_in_compiled_code_sees_every_step() -> None:
    """A fused optimiser between calls, which moves no version counter."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        layer = FusedOrthoLoRALinear(nn.Linear(8, 8), pair(), seed=0, trainable=True)
        run: Any = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
        losses = []
        for _ in range(10):
            with torch.no_grad():
                losses.append(float(run(X).square().mean()))
            optimiser.zero_grad()
            run(X).square().mean().backward()
            optimiser.step()
        found.append(losses)
    assert found[0][-1] < 0.5 * found[0][0]
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", MADE)
def test_inductor(make: Any) -> None:
    model, change = make()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for sample in (0, 5):
            change(sample=sample)
            torch.testing.assert_close(compiled(X), model(X), rtol=1e-5, atol=1e-5)
