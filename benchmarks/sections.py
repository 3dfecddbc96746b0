"""What is measured: one function for each section of a result, from a case and a dtype to a row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import lora_ortho
from benchmarks import checks, memory, peers
from benchmarks.cases import DTYPES, SEED, Case, Inputs, make
from benchmarks.checks import WrongResult
from benchmarks.harness import Effort, Times, measure
from benchmarks.record import Row
from lora_ortho.backends import cpu
from lora_ortho.mask_stream import thresholds
from lora_ortho.packing import PackedAdapters
from lora_ortho.problem import Problem

_ROWS_OF_PEERS = 128  # so many rows of a slow peer's result are checked

Check = Callable[[Any], None]
Contender = tuple[Callable[[], Any], Check]


@functools.lru_cache(maxsize=2)
def _inputs(case: Case, dtype: str) -> Inputs:
    return make(case, DTYPES[dtype])


@functools.lru_cache(maxsize=2)
def _orthogonal(case: Case) -> checks.Masks:
    return checks.orthogonal(case)


def forward(case: Case, dtype: str, effort: Effort) -> Row:
    """Ours beside direct."""
    inputs = _inputs(case, dtype)
    masks, everything = _orthogonal(case), checks.everything(case)
    contenders: dict[str, Contender] = {
        "ours": (peers.ours(inputs), lambda y: checks.check_forward(y, inputs, masks)),
        "direct": (peers.direct(inputs), lambda y: checks.check_forward(y, inputs, everything)),
    }
    with torch.no_grad():
        return _row(case, dtype, contenders, effort, [("ours", "direct")])


def backward(case: Case, dtype: str, effort: Effort) -> Row:
    """Forward and backward, ours beside direct."""
    inputs = _inputs(case, dtype)
    masks, everything = _orthogonal(case), checks.everything(case)
    contenders: dict[str, Contender] = {
        "ours": (
            peers.ours_training(inputs),
            lambda found: checks.check_training(found, inputs, masks, joined=False),
        ),
        "direct": (
            peers.direct_training(inputs),
            lambda found: checks.check_training(found, inputs, everything, joined=True),
        ),
    }
    return _row(case, dtype, contenders, effort, [("ours", "direct")])


def slow_peers(case: Case, dtype: str, effort: Effort, compiled: bool) -> Row:
    """The other ways to random disjoint masks, beside ours."""
    inputs, masks = _inputs(case, dtype), _orthogonal(case)
    some = _first_rows(inputs)

    def random(y: Tensor) -> None:
        checks.check_random(y[:_ROWS_OF_PEERS], some)

    contenders: dict[str, Contender] = {
        "ours": (peers.ours(inputs), lambda y: checks.check_forward(y, inputs, masks)),
        "paper": (peers.paper(inputs), random),
        "categorical": (peers.categorical(inputs), random),
    }
    if compiled:
        contenders["compiled"] = (peers.compiled(inputs), random)
    with torch.no_grad():
        torch.manual_seed(SEED)
        pairs = [(name, "ours") for name in contenders if name != "ours"]
        return _row(case, dtype, contenders, effort, pairs)


def layer(case: Case, dtype: str, effort: Effort) -> Row:
    """PEFT's adapted layer beside ours, the base layer's product included in both."""
    missing = peers.peft_missing()
    if missing is not None:
        return {"case": str(case), "dtype": dtype, "refused": {"peft": missing}}
    inputs = _inputs(case, dtype)
    some, weight = _first_rows(inputs), peers.plain_linear(inputs).weight
    rows = slice(0, _ROWS_OF_PEERS)
    masks, everything = _orthogonal(case), checks.everything(some.case)
    first = checks.Masks([mask[rows] for mask in masks.masks], masks.gains)
    roundings = 4.0 * case.adapters**0.5  # the base product rounds too, and PEFT at every adapter

    def checker(wanted: checks.Masks) -> Check:
        return lambda y: checks.check_forward(y[rows], some, wanted, weight, roundings=roundings)

    contenders: dict[str, Contender] = {
        "ours": (peers.our_layer(inputs), checker(first)),
        "peft": (peers.peft_layer(inputs), checker(everything)),
    }
    with torch.no_grad():
        return _row(case, dtype, contenders, effort, [("peft", "ours")])


def threads(case: Case, dtype: str, effort: Effort) -> Row:
    """Ours and direct on one core beside all: how many times faster."""
    inputs, count = _inputs(case, dtype), torch.get_num_threads()

    def with_threads(number: int, call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            torch.set_num_threads(number)
            return call()

        return run

    row: Row = {"case": str(case), "dtype": dtype, "threads": count, "speedup": {}}
    try:
        with torch.no_grad():
            for name, make_call in (("ours", peers.ours), ("direct", peers.direct)):
                call = make_call(inputs)
                times = measure(
                    {"one": with_threads(1, call), "all": with_threads(count, call)}, effort
                )
                row["speedup"][name] = times.ratio("one", "all").json()
    finally:
        torch.set_num_threads(count)
    return row


def overhead(case: Case, dtype: str, effort: Effort) -> Row:
    """From call to result: the kernels alone, the prepared call, the public op, direct."""
    inputs = _inputs(case, dtype)
    x, base = inputs.x, inputs.base
    prepared = PackedAdapters(inputs.lora_A, inputs.lora_B, inputs.dtype, backend="cpu")
    limits, _ = thresholds([1 - 1 / case.adapters] * case.adapters, "orthogonal")
    ranks = (case.rank,) * case.adapters
    problem = Problem(
        "orthogonal", tuple(limits), case.d_in, case.d_out, ranks, inputs.dtype, "cpu"
    )
    native = cpu.pack(problem, inputs.lora_A, inputs.lora_B).native
    y, s = torch.empty_like(base), x.new_empty(case.tokens, sum(ranks))
    arguments = (
        (x.data_ptr(), *x.stride()), (base.data_ptr(), *base.stride()), y.data_ptr(), s.data_ptr(),
        case.tokens, prepared.gains.data_ptr(), SEED, 0, 0, 0, 0, torch.get_num_threads(),
    )  # fmt: skip

    def public() -> Tensor:
        return lora_ortho.fused_ortho_lora(
            x, inputs.lora_A, inputs.lora_B, base=base, seed=SEED, backend="cpu"
        )

    calls: dict[str, Callable[[], Any]] = {
        "kernels": lambda: native.forward(*arguments),
        "prepared": lambda: prepared.apply(x, base, SEED),
        "public": public,
        "direct": peers.direct(inputs),
    }
    with torch.no_grad():
        times = measure(calls, effort)
    return {"case": str(case), "dtype": dtype, **_seconds(times)}


def extra_memory(case: Case, dtype: str, contender: str) -> Row:
    """Bytes beyond inputs, output and s."""
    row: Row = {"case": str(case), "dtype": dtype, "contender": contender}
    missing = memory.unavailable()
    return row | ({"refused": missing} if missing else memory.extra(case, dtype, contender))


def _first_rows(inputs: Inputs) -> Inputs:
    rows = slice(0, _ROWS_OF_PEERS)
    x, base, grad = inputs.x[rows], inputs.base[rows], inputs.grad[rows]
    case = inputs.case._replace(tokens=x.shape[0])
    return Inputs(case, x, inputs.lora_A, inputs.lora_B, base, grad)


def _row(
    case: Case,
    dtype: str,
    contenders: Mapping[str, Contender],
    effort: Effort,
    pairs: list[tuple[str, str]],
) -> Row:
    """Check, then time those that passed; a ratio needs both of its contenders."""
    row: Row = {"case": str(case), "dtype": dtype, "refused": {}}
    calls = {}
    for name, (call, check) in contenders.items():
        try:
            check(call())
        except WrongResult as error:
            row["refused"][name] = f"wrong result: {error}"
        else:
            calls[name] = call
    if calls:
        times = measure(calls, effort)
        row |= _seconds(times)
        row["ratios"] = {
            f"{above}/{below}": times.ratio(above, below).json()
            for above, below in pairs
            if above in calls and below in calls
        }
    return row


def _seconds(times: Times) -> Row:
    return {
        "seconds": {name: times.of(name).json() for name in times.seconds},
        "others": None if times.others is None else round(times.others, 3),
    }
