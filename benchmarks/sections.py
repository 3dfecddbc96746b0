"""What is measured: one function for each section of a result, from a case and a dtype to a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import lora_ortho
from lora_ortho import backends
from lora_ortho.packing import PackedAdapters

from . import checks, floors, memory, peers
from .bench import Bench, Check, Contender, compare, head, seconds_of, time_calls
from .cases import SEED, Case, Inputs
from .device import Call
from .harness import Effort, measure
from .record import Row
from .scaling import AXES, THREADS_CASE, thread_counts

_ROWS_OF_PEERS = 128  # so many rows of a slow peer's result are checked
_SAMPLES = 4


def forward(bench: Bench, case: Case, dtype: str, effort: Effort) -> Row:
    """Ours beside direct."""
    inputs = bench.inputs(case, dtype)
    masks, everything = bench.masks(case), bench.everything(case)
    contenders: dict[str, Contender] = {
        "ours": (bench.ours, lambda y: checks.check_forward(y, inputs, masks)),
        "direct": (peers.direct, lambda y: checks.check_forward(y, inputs, everything)),
    }
    with torch.no_grad():
        row = compare(bench, inputs, contenders, effort, [("ours", "direct")])
    return row | floors.forward(case, dtype)._asdict()


def backward(bench: Bench, case: Case, dtype: str, effort: Effort) -> Row:
    """Forward and backward, ours beside direct."""
    inputs = bench.inputs(case, dtype)
    masks, everything = bench.masks(case), bench.everything(case)
    contenders: dict[str, Contender] = {
        "ours": (
            lambda inputs: peers.ours_training(inputs, bench.backend),
            lambda found: checks.check_training(found, inputs, masks, joined=False),
        ),
        "direct": (
            peers.direct_training,
            lambda found: checks.check_training(found, inputs, everything, joined=True),
        ),
    }
    row = compare(bench, inputs, contenders, effort, [("ours", "direct")])
    return row | floors.backward(case, dtype)._asdict()


def slow_peers(bench: Bench, case: Case, dtype: str, effort: Effort) -> Row:
    """The other ways to random masks, beside ours; on a GPU also vLLM's LoRA kernels."""
    inputs, masks = bench.inputs(case, dtype), bench.masks(case)
    some = inputs.first_rows(_ROWS_OF_PEERS)

    def random(y: Tensor) -> None:
        checks.check_random(y[:_ROWS_OF_PEERS], some)

    contenders: dict[str, Contender] = {
        "ours": (bench.ours, lambda y: checks.check_forward(y, inputs, masks)),
        "paper": (peers.paper, random),
        "categorical": (peers.categorical, random),
    }
    refused: dict[str, str] = {}
    if bench.compiled:
        peers.forget_compiled()
        contenders["compiled"] = (peers.compiled, random)
    if bench.device.label != "cpu":
        contenders |= _gpu_peers(bench, inputs, refused)
    with torch.no_grad():
        torch.manual_seed(SEED)
        pairs = [(name, "ours") for name in contenders if name != "ours"]
        row = compare(bench, inputs, contenders, effort, pairs)
    row["refused"] |= refused
    return row


def _gpu_peers(bench: Bench, inputs: Inputs, refused: dict[str, str]) -> dict[str, Contender]:
    """Peers that exist on a GPU only; why one does not is put into ``refused``."""
    contenders: dict[str, Contender] = {}
    missing = peers.missing("triton")
    if missing is None:
        from .stored_mask import KEEP, stored_mask

        contenders["stored mask"] = (
            stored_mask, lambda found: checks.check_stored(found, inputs, KEEP),
        )  # fmt: skip
    else:
        refused["stored mask"] = missing
    missing = peers.missing("vllm")
    if missing is None:
        everything = bench.everything(inputs.case)
        contenders["vllm"] = (
            peers.vllm, lambda y: checks.check_forward(y, inputs, everything)
        )  # fmt: skip
    else:
        refused["vllm"] = missing
    return contenders


def layer(bench: Bench, case: Case, dtype: str, effort: Effort) -> Row:
    """Whole layers: ours and PEFT's adapted ones beside the plain one."""
    inputs = bench.inputs(case, dtype)
    some, weight = inputs.first_rows(_ROWS_OF_PEERS), peers.plain_linear(inputs).weight
    rows = slice(0, _ROWS_OF_PEERS)
    masks, everything = bench.masks(case), bench.everything(some.case)
    first = checks.Masks([mask[rows] for mask in masks.masks], masks.gains)

    def checker(wanted: checks.Masks) -> Check:
        return lambda y: checks.check_forward(y[rows], some, wanted, weight)

    contenders: dict[str, Contender] = {
        "ours": (lambda inputs: peers.our_layer(inputs, bench.backend), checker(first)),
        "linear": (peers.linear, lambda y: checks.check_linear(y[rows], some, weight)),
    }
    missing = peers.missing("peft")
    if missing is None:
        contenders["peft"] = (peers.peft_layer, checker(everything))
    with torch.no_grad():
        row = compare(bench, inputs, contenders, effort, [("peft", "ours"), ("ours", "linear")])
    if missing is not None:
        row["refused"]["peft"] = missing
    return row


def expand(bench: Bench, case: Case, dtype: str, effort: Effort) -> Row:
    """Draw, expand and add, as far as a backend shows that step: d_in is its least, one rank.

    The shrink that remains reads tokens x rank numbers; its launch is in the time.
    """
    narrow = case._replace(d_in=case.rank)
    inputs, masks = bench.inputs(narrow, dtype), bench.masks(narrow)
    contenders: dict[str, Contender] = {
        "ours": (bench.ours, lambda y: checks.check_forward(y, inputs, masks)),
        "copy": (lambda inputs: inputs.base.clone, lambda y: checks.check_copy(y, inputs)),
    }
    with torch.no_grad():
        row = compare(bench, inputs, contenders, effort, [("ours", "copy")])
    return row | {"case": str(case)} | floors.expand(case, dtype)._asdict()


def threads(bench: Bench, case: Case, dtype: str, effort: Effort) -> Row:
    """Ours and direct on one core beside all: how many times faster."""
    inputs, count = bench.inputs(case, dtype), torch.get_num_threads()
    row = head(bench, case, dtype) | {"threads": count, "speedup": {}}
    try:
        with torch.no_grad():
            for name, make_call in (("ours", bench.ours), ("direct", peers.direct)):
                call = make_call(inputs)
                calls = {"one": _with_threads(1, call), "all": _with_threads(count, call)}
                times = time_calls(bench, calls, effort)
                row["speedup"][name] = times.ratio("one", "all").json()
    finally:
        torch.set_num_threads(count)
    return row


def _with_threads(number: int, call: Call) -> Call:
    def run() -> Any:
        torch.set_num_threads(number)
        return call()

    return run


def scaling(bench: Bench, case: Case, dtype: str, effort: Effort, name: str) -> Row:
    """One point of an axis; paper beside the others where its time is of interest, in K."""
    inputs, masks = bench.inputs(case, dtype), bench.masks(case)
    some = inputs.first_rows(_ROWS_OF_PEERS)
    contenders: dict[str, Contender] = {
        "ours": (bench.ours, lambda y: checks.check_forward(y, inputs, masks)),
        "direct": (
            peers.direct, lambda y: checks.check_forward(y, inputs, bench.everything(case)),
        ),
    }  # fmt: skip
    if name == "K":
        contenders["paper"] = (
            peers.paper, lambda y: checks.check_random(y[:_ROWS_OF_PEERS], some),
        )  # fmt: skip
    with torch.no_grad():
        row = compare(bench, inputs, contenders, effort, [("ours", "direct")])
    return row | {"axis": name, "at": AXES[name].at(case)}


def threads_scaling(bench: Bench, dtype: str, effort: Effort) -> list[Row]:
    """The axis of threads: a row for each number of them."""
    inputs, most = bench.inputs(THREADS_CASE, dtype), torch.get_num_threads()
    call, rows = bench.ours(inputs), []
    counts = thread_counts(most)
    try:
        with torch.no_grad():
            checks.check_forward(call(), inputs, bench.masks(THREADS_CASE))
            calls = {str(count): _with_threads(count, call) for count in counts}
            times = time_calls(bench, calls, effort)
    finally:
        torch.set_num_threads(most)
    for count in counts:
        seconds = {"ours": times.of(str(count)).json()}
        row = head(bench, THREADS_CASE, dtype) | {"axis": "threads", "at": count}
        rows.append(row | {"seconds": seconds, "others": times.rounded_others()})
    return rows


def samples(bench: Bench, case: Case, dtype: str, effort: Effort) -> Row:
    """What one Monte Carlo sample more costs, beside the layer's own product.

    Of ours by the difference between four samples and one, shared out; the others draw anew
    whatever they do, so one more costs them one more call.
    """
    inputs, masks = bench.inputs(case, dtype), bench.masks(case)
    some, weight = inputs.first_rows(_ROWS_OF_PEERS), peers.plain_linear(inputs).weight

    def checked(y: Tensor) -> None:
        checks.check_forward(y, inputs, masks)

    contenders: dict[str, Contender] = {
        "one": (bench.ours, checked),
        "several": (lambda inputs: peers.ours(inputs, bench.backend, _SAMPLES), checked),
        "paper": (peers.paper, lambda y: checks.check_random(y[:_ROWS_OF_PEERS], some)),
        "linear": (
            peers.linear,
            lambda y: checks.check_linear(y[:_ROWS_OF_PEERS], some, weight),
        ),
    }
    with torch.no_grad():
        pairs = [("several", "one"), ("one", "linear"), ("paper", "one")]
        row = compare(bench, inputs, contenders, effort, pairs)
    # The one sample of all that "several" returns is its last, number 0: that of "one".
    if {"one", "several"} <= row.get("seconds", {}).keys():
        one, several = (row["seconds"][name]["median"] for name in ("one", "several"))
        row["seconds_per_sample"] = float(f"{(several - one) / (_SAMPLES - 1):.4g}")
    return row


def overhead(bench: Bench, case: Case, dtype: str, effort: Effort) -> Row:
    """From call to result: the prepared call, the public op, direct; and the kernels alone.

    Those are the extension's own call on a processor, a replayed graph on a GPU.
    """
    inputs = bench.inputs(case, dtype)
    x, base = inputs.x, inputs.base
    prepared = PackedAdapters(inputs.lora_A, inputs.lora_B, inputs.dtype, backend=bench.backend)

    def public() -> Tensor:
        return lora_ortho.fused_ortho_lora(
            x, inputs.lora_A, inputs.lora_B, base=base, seed=inputs.seed, backend=bench.backend
        )

    calls: dict[str, Call] = {
        "prepared": lambda: prepared.apply(x, base, inputs.seed),
        "public": public,
        "direct": peers.direct(inputs),
    }
    with torch.no_grad():
        watches = {name: bench.device.latency(call) for name, call in calls.items()}
        if bench.backend == "cpu":
            watches["kernels"] = bench.device.latency(_kernels(inputs, prepared))
        elif bench.device.label != "cpu":
            watches["kernels"] = bench.device.stopwatch([calls["prepared"]])
        times = measure(watches, effort)
    return head(bench, case, dtype) | seconds_of(times)


def _kernels(inputs: Inputs, prepared: PackedAdapters) -> Call:
    """The CPU kernels by the extension's own call, arguments ready."""
    x, base, case = inputs.x, inputs.base, inputs.case
    ranks = (case.rank,) * case.adapters
    native = backends.get("cpu").pack(prepared.problem, inputs.lora_A, inputs.lora_B).native
    y, s = torch.empty_like(base), x.new_empty(case.tokens, sum(ranks))
    arguments = (
        (x.data_ptr(), *x.stride()), (base.data_ptr(), *base.stride()), y.data_ptr(), s.data_ptr(),
        case.tokens, prepared.gains.data_ptr(), int(inputs.seed), 0, 0, 0, 0,
        torch.get_num_threads(),
    )  # fmt: skip
    kept = (x, base, y, s, prepared)  # their addresses are in the arguments

    def call() -> Tensor:
        native.forward(*arguments)
        return kept[2]

    return call


def extra_memory(bench: Bench, case: Case, dtype: str, contender: str) -> Row:
    """Bytes beyond inputs, output and s."""
    row = head(bench, case, dtype) | {"contender": contender}
    if bench.device.label == "gpu":
        inputs = bench.inputs(case, dtype)
        return row | memory.on_gpu(inputs, contender, bench.backend, bench.device)
    missing = memory.unavailable()
    if missing is not None:
        return row | {"refused": missing}
    return row | memory.extra(case, dtype, contender, bench.backend)


def ceilings(bench: Bench, case: Case, dtype: str, effort: Effort) -> Row:
    """The rates that floors are reckoned with."""
    return head(bench, case, dtype) | floors.ceilings(bench.device, dtype, effort)
