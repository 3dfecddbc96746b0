"""What is measured: one function for each section of a result, from a case and a dtype to a row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import lora_ortho
from lora_ortho.packing import PackedAdapters

from . import checks, memory, peers
from .cases import DTYPES, SEED, THREADS_CASE, Case, Inputs, size_on
from .device import Call
from .harness import Bench, Check, Contender, Effort, measure
from .record import (
    CeilingsRow,
    MemoryRow,
    Quartiles,
    SamplesRow,
    ScalingRow,
    ThreadsRow,
    TimedRow,
    rounded,
)

_ROWS_OF_PEERS = 128  # so many rows of a slow peer's result are checked
_SAMPLES = 4
_COPY_BYTES = {"cpu": 1 << 28, "gpu": 1 << 32, "rehearsal": 1 << 16}
_MATMUL_SIZE = {"cpu": 2048, "gpu": 8192, "rehearsal": 64}


def forward(bench: Bench, case: Case, dtype: str, effort: Effort) -> TimedRow:
    """Ours beside direct."""
    inputs = bench.inputs(case, dtype)
    contenders = {"ours": _ours(bench, inputs), "direct": _direct(bench, inputs)}
    with torch.no_grad():
        row = bench.compare(inputs, contenders, effort, [("ours", "direct")])
    return replace(row, floor=case.forward(dtype))


def _ours(bench: Bench, inputs: Inputs) -> Contender:
    masks = bench.masks(inputs.case)
    return bench.ours, lambda y: checks.check_forward(y, inputs, masks)


def _direct(bench: Bench, inputs: Inputs) -> Contender:
    everything = bench.everything(inputs.case)
    return peers.direct, lambda y: checks.check_forward(y, inputs, everything)


def _random(inputs: Inputs) -> Check:
    """Of random masks, which no one can draw again; of the first rows."""
    some = inputs.first_rows(_ROWS_OF_PEERS)
    return lambda y: checks.check_random(y[:_ROWS_OF_PEERS], some)


def backward(bench: Bench, case: Case, dtype: str, effort: Effort) -> TimedRow:
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
    row = bench.compare(inputs, contenders, effort, [("ours", "direct")])
    return replace(row, floor=case.backward(dtype))


def slow_peers(bench: Bench, case: Case, dtype: str, effort: Effort) -> TimedRow:
    """The other ways to random masks, beside ours; on a GPU also vLLM's LoRA kernels."""
    inputs = bench.inputs(case, dtype)
    random = _random(inputs)
    contenders: dict[str, Contender] = {
        "ours": _ours(bench, inputs),
        "paper": (peers.paper, random),
        "categorical": (peers.categorical, random),
    }
    absent: dict[str, str] = {}
    if bench.compiled:
        peers.forget_compiled()
        contenders["compiled"] = (peers.compiled, random)
    if bench.device.label != "cpu":
        contenders |= _gpu_peers(bench, inputs, absent)
    with torch.no_grad():
        torch.manual_seed(SEED)
        pairs = [(name, "ours") for name in contenders if name != "ours"]
        row = bench.compare(inputs, contenders, effort, pairs)
    return replace(row, refused=row.refused | absent)


def _gpu_peers(bench: Bench, inputs: Inputs, absent: dict[str, str]) -> dict[str, Contender]:
    """Peers that exist on a GPU only; why one does not is put into ``absent``."""
    contenders: dict[str, Contender] = {}
    missing = peers.missing("triton")
    if missing is None:
        from .stored_mask import KEEP, stored_mask

        contenders["stored mask"] = (
            stored_mask, lambda found: checks.check_stored(found, inputs, KEEP),
        )  # fmt: skip
    else:
        absent["stored mask"] = missing
    missing = peers.missing("vllm")
    if missing is None:
        contenders["vllm"] = (peers.vllm, _direct(bench, inputs)[1])
    else:
        absent["vllm"] = missing
    return contenders


def layer(bench: Bench, case: Case, dtype: str, effort: Effort) -> TimedRow:
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
        "linear": _linear(inputs),
    }
    missing = peers.missing("peft")
    if missing is None:
        contenders["peft"] = (peers.peft_layer, checker(everything))
    with torch.no_grad():
        row = bench.compare(inputs, contenders, effort, [("peft", "ours"), ("ours", "linear")])
    return row if missing is None else replace(row, refused=row.refused | {"peft": missing})


def _linear(inputs: Inputs) -> Contender:
    some, weight = inputs.first_rows(_ROWS_OF_PEERS), peers.plain_linear(inputs).weight
    return peers.linear, lambda y: checks.check_linear(y[:_ROWS_OF_PEERS], some, weight)


def expand(bench: Bench, case: Case, dtype: str, effort: Effort) -> TimedRow:
    """Draw, expand and add, as far as a backend shows that step: d_in is its least, one rank.

    The shrink that remains reads tokens x rank numbers; its launch is in the time.
    """
    inputs = bench.inputs(case._replace(d_in=case.rank), dtype)
    contenders: dict[str, Contender] = {
        "ours": _ours(bench, inputs),
        "copy": (lambda inputs: inputs.base.clone, lambda y: checks.check_copy(y, inputs)),
    }
    with torch.no_grad():
        row = bench.compare(inputs, contenders, effort, [("ours", "copy")])
    return replace(row, case=case, floor=case.expand(dtype))


def threads(bench: Bench, case: Case, dtype: str, effort: Effort) -> ThreadsRow:
    """Ours and direct on one core beside all."""
    inputs, most = bench.inputs(case, dtype), torch.get_num_threads()
    speedup: dict[str, Quartiles] = {}
    try:
        with torch.no_grad():
            for name, make_call in (("ours", bench.ours), ("direct", peers.direct)):
                call = make_call(inputs)
                calls = {"one": _with_threads(1, call), "all": _with_threads(most, call)}
                times = bench.time(calls, effort)
                speedup[name] = times.ratios([("one", "all")])["one/all"]
    finally:
        torch.set_num_threads(most)
    return ThreadsRow(
        case=case, dtype=dtype, backend=bench.backend, threads=most, speedup=speedup
    )  # fmt: skip


def _with_threads(number: int, call: Call) -> Call:
    def run() -> Any:
        torch.set_num_threads(number)
        return call()

    return run


def scaling(bench: Bench, case: Case, dtype: str, effort: Effort, axis: str) -> ScalingRow:
    """One point of an axis; paper beside the others where its time is of interest, in K."""
    inputs = bench.inputs(case, dtype)
    contenders = {"ours": _ours(bench, inputs), "direct": _direct(bench, inputs)}
    if axis == "K":
        contenders["paper"] = (peers.paper, _random(inputs))
    with torch.no_grad():
        row = bench.compare(inputs, contenders, effort, [("ours", "direct")])
    return ScalingRow(**vars(row), axis=axis, size=size_on(axis, case))


def threads_scaling(bench: Bench, dtype: str, effort: Effort) -> list[ScalingRow]:
    """The axis of threads: a row for 1, 2, 4 … and all of them."""
    inputs, most = bench.inputs(THREADS_CASE, dtype), torch.get_num_threads()
    counts = sorted({min(1 << n, most) for n in range(most.bit_length() + 1)})
    call, rows = bench.ours(inputs), []
    try:
        with torch.no_grad():
            checks.check_forward(call(), inputs, bench.masks(THREADS_CASE))
            times = bench.time({str(n): _with_threads(n, call) for n in counts}, effort)
    finally:
        torch.set_num_threads(most)
    row = bench.row(THREADS_CASE, dtype, times)
    for count in counts:
        seconds = {"ours": row.seconds[str(count)]}
        rows.append(ScalingRow(**vars(row) | {"seconds": seconds}, axis="threads", size=count))
    return rows


def samples(bench: Bench, case: Case, dtype: str, effort: Effort) -> SamplesRow:
    """What one Monte Carlo sample more costs, beside the layer's own product.

    Of ours by the difference between four samples and one, shared out; the others draw anew
    whatever they do, so one more costs them one more call.
    """
    inputs = bench.inputs(case, dtype)
    ours, right = _ours(bench, inputs)
    contenders: dict[str, Contender] = {
        "one": (ours, right),
        # The one sample of all that this returns is its last, number 0: that of "one".
        "several": (lambda inputs: peers.ours(inputs, bench.backend, _SAMPLES), right),
        "paper": (peers.paper, _random(inputs)),
        "linear": _linear(inputs),
    }
    with torch.no_grad():
        pairs = [("several", "one"), ("one", "linear"), ("paper", "one")]
        row = bench.compare(inputs, contenders, effort, pairs)
    more = None
    if {"one", "several"} <= row.seconds.keys():
        one, several = (row.seconds[name].median for name in ("one", "several"))
        more = rounded((several - one) / (_SAMPLES - 1))
    return SamplesRow(**vars(row), seconds_per_sample=more)


def overhead(bench: Bench, case: Case, dtype: str, effort: Effort) -> TimedRow:
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
    return bench.row(case, dtype, times)


def _kernels(inputs: Inputs, prepared: PackedAdapters) -> Call:
    """The CPU kernels by the extension's own call, arguments ready."""
    x, base, case = inputs.x, inputs.base, inputs.case
    y, s = torch.empty_like(base), x.new_empty(case.tokens, case.adapters * case.rank)
    arguments = (
        (x.data_ptr(), *x.stride()), (base.data_ptr(), *base.stride()), y.data_ptr(), s.data_ptr(),
        case.tokens, prepared.gains.data_ptr(), int(inputs.seed), 0, 0, 0, 0,
        torch.get_num_threads(),
    )  # fmt: skip
    native = prepared.packed.native
    kept = (x, base, y, s, prepared)  # their addresses are in the arguments

    def call() -> Tensor:
        native.forward(*arguments)
        return kept[2]

    return call


def extra_memory(bench: Bench, case: Case, dtype: str, contender: str) -> MemoryRow:
    """Bytes beyond inputs, output and s."""
    if bench.device.label == "gpu":
        inputs = bench.inputs(case, dtype)
        found = memory.on_gpu(inputs, contender, bench.backend, bench.device)
    else:
        found = memory.beyond(case, dtype, contender, bench.backend)
    return MemoryRow(
        case=case, dtype=dtype, backend=bench.backend, contender=contender, **found._asdict()
    )


def ceilings(bench: Bench, case: Case, dtype: str, effort: Effort) -> CeilingsRow:
    """The rates that floors are reckoned with."""
    wide, place = DTYPES[dtype], bench.device.torch_device
    source = torch.ones(_COPY_BYTES[bench.device.label] // wide.itemsize, dtype=wide, device=place)
    target = torch.empty_like(source)
    n = _MATMUL_SIZE[bench.device.label]
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator).to(wide).to(place) for _ in range(2))
    product = torch.empty(n, n, dtype=wide, device=place)
    calls: dict[str, Call] = {
        "copy": lambda: target.copy_(source),
        "matmul": lambda: torch.mm(a, b, out=product),
    }
    with torch.no_grad():
        row = bench.row(case, dtype, bench.time(calls, effort))
    return CeilingsRow(
        **vars(row),
        copy_bytes_per_second=rounded(2 * source.nbytes / row.seconds["copy"].median),
        matmul_operations_per_second=rounded(2 * n**3 / row.seconds["matmul"].median),
    )
