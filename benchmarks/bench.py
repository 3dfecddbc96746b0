"""Whose kernels are measured and where; contenders are checked here, then timed side by side."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import checks, peers
from .cases import DTYPES, Case, Inputs, make
from .checks import WrongResult
from .device import Call, Device, device_of
from .harness import Effort, Times, measure
from .record import Row

Check = Callable[[Any], None]
Contender = tuple[Callable[[Inputs], Call], Check]
Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Bench:
    """Whose kernels are measured, and where.

    Attributes:
        backend: of lora_ortho.
        device: where its tensors lie.
        compiled: whether torch.compile's contender is run.
    """

    backend: str
    device: Device
    compiled: bool = True

    @staticmethod
    def of(backend: str, compiled: bool = True) -> Bench:
        """On this machine's device for a backend."""
        return Bench(backend, device_of(backend), compiled)

    def ours(self, inputs: Inputs) -> peers.Forward:
        """See ``peers.ours``."""
        return peers.ours(inputs, self.backend)

    def inputs(self, case: Case, dtype: str) -> Inputs:
        """The tensors of a case on the device."""
        return _inputs(case, dtype, self.device)

    def masks(self, case: Case) -> checks.Masks:
        """Ours."""
        return _orthogonal(case, self.device)

    def everything(self, case: Case) -> checks.Masks:
        """Those of the direct merge."""
        return checks.everything(case, self.device.torch_device)


@functools.lru_cache(maxsize=2)
def _inputs(case: Case, dtype: str, device: Device) -> Inputs:
    return make(case, DTYPES[dtype], device)


@functools.lru_cache(maxsize=2)
def _orthogonal(case: Case, device: Device) -> checks.Masks:
    return checks.orthogonal(case, device.torch_device)


def head(bench: Bench, case: Case, dtype: str) -> Row:
    """What tells a row apart."""
    return {"case": str(case), "dtype": dtype, "backend": bench.backend}


def compare(
    bench: Bench,
    inputs: Inputs,
    contenders: Mapping[str, Contender],
    effort: Effort,
    pairs: Pairs,
) -> Row:
    """Check, then time those that passed; a ratio needs both of its contenders."""
    dtype = str(inputs.dtype).removeprefix("torch.")
    row = head(bench, inputs.case, dtype) | {"refused": {}}
    device, watches = bench.device, {}
    sets = [inputs, *(inputs.copy() for _ in range(device.sets(inputs.nbytes) - 1))]
    for name, (build, check) in contenders.items():
        try:
            check(build(inputs)())
        except WrongResult as error:
            row["refused"][name] = f"wrong result: {error}"
        else:
            watches[name] = device.stopwatch([build(one) for one in sets])
    if watches:
        times = measure(watches, effort)
        row |= seconds_of(times)
        row["ratios"] = {
            f"{above}/{below}": times.ratio(above, below).json()
            for above, below in pairs
            if above in watches and below in watches
        }
        if device.label != "cpu":
            row["sets"] = len(sets)
            row["launch"] = {name: watch.note for name, watch in watches.items()}
    return row


def time_calls(bench: Bench, calls: Mapping[str, Call], effort: Effort) -> Times:
    """Times calls that need no check, side by side."""
    return measure({name: bench.device.stopwatch([call]) for name, call in calls.items()}, effort)


def seconds_of(times: Times) -> Row:
    """Times as a row holds them."""
    return {
        "seconds": {name: times.of(name).json() for name in times.seconds},
        "others": times.rounded_others(),
    }
