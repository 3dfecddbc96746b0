"""Where contenders run, and by which clock: this processor, a GPU, or a stand-in for one.

A contender comes as one call for each of its buffer sets. On a GPU there are enough sets that a
round goes through more memory than the last-level cache holds, so every call finds it cold.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

REHEARSAL = "LORA_ORTHO_GPU_REHEARSAL"
_MOST_SETS = 32
_COLD = 3  # times the cache that a round goes through
_GRANULE = 512  # bytes to which CUDA's caching allocator rounds

Call = Callable[[], Any]


class Stopwatch(ABC):
    """Times the calls of one contender.

    Attributes:
        sets: calls in one rotation.
        note: how calls were launched, where that is not plain; None otherwise.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self.sets = len(calls)
        self.note: str | None = None

    @abstractmethod
    def __call__(self, rotations: int) -> float:
        """Seconds per call over so many rotations."""


class _HostStopwatch(Stopwatch):
    def __init__(self, calls: Sequence[Call]) -> None:
        super().__init__(calls)
        self._calls = list(calls)

    def __call__(self, rotations: int) -> float:
        start = time.perf_counter()
        for _ in range(rotations):
            for call in self._calls:
                call()
        return (time.perf_counter() - start) / (rotations * self.sets)


class _CudaStopwatch(Stopwatch):
    """Events around replays of one graph that holds a whole rotation, or around plain calls."""

    def __init__(self, calls: Sequence[Call]) -> None:
        super().__init__(calls)
        self._calls = list(calls)
        self._kept: list[Any] = []
        event: Any = torch.cuda.Event
        self._start, self._end = event(enable_timing=True), event(enable_timing=True)
        self._replay: Call = self._in_turn
        try:
            self._replay = self._capture()
            self.note = "graph"
        except RuntimeError as error:
            torch.cuda.synchronize()
            self.note = f"no graph: {str(error).splitlines()[0]}"

    def _in_turn(self) -> None:
        for call in self._calls:
            call()

    def _capture(self) -> Call:
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._in_turn()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._kept = [call() for call in self._calls]  # alive: each set writes its own output
        return graph.replay

    def __call__(self, rotations: int) -> float:
        self._start.record()
        for _ in range(rotations):
            self._replay()
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) / 1e3 / (rotations * self.sets)


class Device(ABC):
    """Where contenders run.

    Attributes:
        torch_device: where their tensors lie.
        label: "cpu", "gpu" or "rehearsal", the first word of a result's kind.
    """

    torch_device: torch.device
    label: str

    @abstractmethod
    def stopwatch(self, calls: Sequence[Call]) -> Stopwatch:
        """For the calls of one contender, a call for each buffer set."""

    @abstractmethod
    def latency(self, call: Call) -> Stopwatch:
        """For one call, from its beginning on this processor until its result is there."""

    @abstractmethod
    def sets(self, bytes_of_one: int) -> int:
        """How many buffer sets make a rotation cold."""

    @abstractmethod
    def seed(self, value: int) -> int | Tensor:
        """A seed as its users would hold it here."""

    @abstractmethod
    def peak(self, call: Call) -> int | None:
        """Bytes that a call needed at its peak beyond its result; None where nobody counts."""


class Host(Device):
    """This processor."""

    torch_device = torch.device("cpu")
    label = "cpu"

    def stopwatch(self, calls: Sequence[Call]) -> Stopwatch:
        return _HostStopwatch(calls)

    def latency(self, call: Call) -> Stopwatch:
        return _HostStopwatch([call])

    def sets(self, bytes_of_one: int) -> int:
        return 1

    def seed(self, value: int) -> int | Tensor:
        return value

    def peak(self, call: Call) -> int | None:
        return None


class Rehearsal(Host):
    """CPU tensors in the place of a GPU's: every step of a GPU run, and no figure of one."""

    label = "rehearsal"

    def sets(self, bytes_of_one: int) -> int:
        return 2

    def seed(self, value: int) -> int | Tensor:
        return torch.tensor(value, dtype=torch.int64)


class Cuda(Device):
    """The current GPU."""

    label = "gpu"

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self._properties = torch.cuda.get_device_properties(self.torch_device)

    def stopwatch(self, calls: Sequence[Call]) -> Stopwatch:
        return _CudaStopwatch(calls)

    def latency(self, call: Call) -> Stopwatch:
        def to_the_end() -> None:
            call()
            torch.cuda.synchronize()

        return _HostStopwatch([to_the_end])

    def sets(self, bytes_of_one: int) -> int:
        cache = int(getattr(self._properties, "L2_cache_size", 0)) or 64 << 20
        return max(2, min(_MOST_SETS, -(-_COLD * cache // max(1, bytes_of_one))))

    def seed(self, value: int) -> int | Tensor:
        return torch.tensor(value, dtype=torch.int64, device=self.torch_device)

    def peak(self, call: Call) -> int | None:
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        before = torch.cuda.memory_allocated(self.torch_device)
        result = call()
        torch.cuda.synchronize()
        made = [result] if isinstance(result, Tensor) else list(result)
        kept = sum(-(-t.nbytes // _GRANULE) * _GRANULE for t in made)
        return int(torch.cuda.max_memory_allocated(self.torch_device)) - before - kept


def rehearsing() -> bool:
    """True if the environment asks for a rehearsal of the GPU run."""
    return os.environ.get(REHEARSAL, "") not in ("", "0")


def device_of(backend: str) -> Device:
    """Where a backend's tensors lie on this machine."""
    if backend in ("cpu", "reference"):
        return Rehearsal() if rehearsing() else Host()
    return Rehearsal() if rehearsing() or not torch.cuda.is_available() else Cuda()
