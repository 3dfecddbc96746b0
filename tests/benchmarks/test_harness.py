"""Contenders are checked before they are timed, and timed side by side."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import checks, peers, rule, run, sections, tasks
from benchmarks.cases import DTYPES, TINY_CASES, Case, Inputs, Work, make
from benchmarks.device import Host, Rehearsal, Stopwatch
from benchmarks.harness import Bench, Effort, measure
from benchmarks.record import Row, TimedRow

SMALL = Case(24, 64, 160, 3, 4)
BRIEF = Effort(0.0, round_seconds=1e-6, least=1, tries=1)
BENCH = Bench("cpu", Host(), compiled=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_contender_computes_what_it_should(dtype: str) -> None:
    rows: list[TimedRow] = [
        sections.forward(BENCH, SMALL, dtype, BRIEF),
        sections.backward(BENCH, SMALL, dtype, BRIEF),
        sections.slow_peers(BENCH, SMALL, dtype, BRIEF),
        sections.expand(BENCH, SMALL, dtype, BRIEF),
        sections.samples(BENCH, SMALL, dtype, BRIEF),
        sections.scaling(BENCH, SMALL, dtype, BRIEF, "K"),
    ]
    if peers.missing("peft") is None:
        rows.append(sections.layer(BENCH, SMALL, dtype, BRIEF))
    for row in rows:
        assert row.refused == {}
        assert row.ratios


def test_torchs_own_gradients_are_right_where_sums_are_long() -> None:
    """Of 4096 terms a sum: how far off it is differs between processors, ours and torch's."""
    row = sections.backward(BENCH, Case(4096, 640, 640, 2, 32), "float32", BRIEF)
    assert row.refused == {}
    assert set(row.seconds) == {"ours", "direct"}


def _one_element_off(inputs: Inputs) -> peers.Forward:
    """Ours, but for one element, which another adapter owns."""
    call, masks = BENCH.ours(inputs), checks.orthogonal(inputs.case)
    rolled = masks.masks[1:] + masks.masks[:1]
    tensors = (inputs.x, inputs.lora_A, inputs.lora_B, masks.gains, rolled, inputs.base)
    other = rule.formula(*tensors)

    def wrong() -> Tensor:
        y = call()
        at = divmod(int((y - other).abs().flatten().argsort()[y.numel() // 2]), y.shape[1])
        y[at] = other[at]  # half of all elements would change by less
        return y

    return wrong


def test_a_wrong_result_is_refused_and_not_timed() -> None:
    inputs, masks = make(SMALL, torch.float32), checks.orthogonal(SMALL)

    def check(y: Tensor) -> None:
        checks.check_forward(y, inputs, masks)

    contenders = {"ours": (_one_element_off, check), "right": (BENCH.ours, check)}
    with torch.no_grad():
        row = BENCH.compare(inputs, contenders, BRIEF, [("ours", "right"), ("right", "right")])
    assert row.refused.keys() == {"ours"}
    assert row.refused["ours"].startswith("wrong result: y is wrong")
    assert row.seconds.keys() == {"right"}
    assert row.ratios.keys() == {"right/right"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", range(1, 6))
def test_a_wrong_gradient_is_refused(dtype: str, which: int) -> None:
    """One element of those of x, base, A and B with the other sign; as they are, they pass."""
    inputs, masks = make(SMALL, DTYPES[dtype]), checks.orthogonal(SMALL)
    found = [tensor.detach().clone() for tensor in peers.ours_training(inputs, "cpu")()]
    checks.check_training(found, inputs, masks, joined=False)
    flat = found[which].flatten()
    at = int(flat.abs().argsort()[flat.numel() // 2])
    flat[at] *= -1
    found[which] = flat.view_as(found[which])
    with pytest.raises(checks.WrongResult):
        checks.check_training(found, inputs, masks, joined=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_of_another_seed_are_noticed(dtype: str) -> None:
    inputs, masks = make(SMALL, DTYPES[dtype]), checks.orthogonal(SMALL)
    other = replace(inputs, seed=1)
    with torch.no_grad(), pytest.raises(checks.WrongResult):
        checks.check_forward(peers.ours(other, "cpu")(), other, masks)


def test_unequal_shares_are_noticed() -> None:
    inputs = make(SMALL, torch.float32)
    x, A, B = inputs.x, inputs.lora_A, inputs.lora_B
    with pytest.raises(checks.WrongResult, match="shares"):
        checks.check_random(inputs.base + 3 * (x @ A[0].T @ B[0].T), inputs)


def test_a_row_that_fails_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Row:
        raise RuntimeError("out of order\nsecond line")

    monkeypatch.setattr(sections, "forward", broken)
    todo = tasks.choose(BENCH, True, ["forward", "backward"], [SMALL], ["float32"])
    result = run.run(list(todo), BENCH, quick=True, quiet=True)
    assert result.forward == []
    (missing,) = result.unmeasured
    assert missing.reason == "failed: RuntimeError: out of order"
    assert result.backward[0].ratios
    assert run.failures(result) == [f"forward {SMALL} float32 cpu: {missing.reason}"]


class Scripted(Stopwatch):
    """A clock that says what it is told."""

    def __init__(self, seconds: list[float]) -> None:
        super().__init__([lambda: None])
        self._left = iter(seconds)

    def __call__(self, rotations: int) -> float:
        return next(self._left)


def test_ratios_are_taken_round_by_round() -> None:
    watches = {"a": Scripted([1.0, 2.0, 4.0, 9.0]), "b": Scripted([1.0, 1.0, 4.0, 3.0])}
    times = measure(watches, Effort(0.0, round_seconds=1e-9, least=3, tries=1))
    assert times.ratios([("a", "b")])["a/b"].median == 2.0  # of 2, 1, 3; of the medians 4/3
    assert times.seconds["a"].median == 4.0


def test_work_is_counted() -> None:
    case = Case(2, 3, 5, 2, 1)
    #      x  A and B   base, y      products of s, then one of the owner's per element
    assert case.forward("float32") == Work(4 * (6 + 16 + 20), 2 * (2 * 3 * 2 + 2 * 5))
    assert case.expand("bfloat16") == Work(2 * (4 + 10 + 20), 2 * 10)
    assert case.backward("float32").bytes == 4 * (6 + 16 + 20) + 4 * (2 * 6 + 2 * 16 + 10)
    assert case.forward("float32").seconds(84.0, 1e9) == 2.0
    assert case.forward("float32").seconds(1e9, 22.0) == 2.0


def test_gpu_run_goes_through_rotating_buffers() -> None:
    bench = Bench("reference", Rehearsal(), compiled=False)
    row = sections.forward(bench, TINY_CASES[1], "bfloat16", BRIEF)
    assert row.refused == {}
    assert row.buffer_sets == 2
