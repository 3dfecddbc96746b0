"""What was done to each layer of a model, and the handle that undoes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, TypeVar

from torch import nn

from lora_ortho.module import is_fresh

from .passes import Passes

FUSED = "fused"
DELTA = "base + delta"
CONVOLUTION = "convolution"
SKIPPED = "skipped"
UNREACHED = "not reached"

_Self = TypeVar("_Self", bound="Handle")
_Layer = TypeVar("_Layer", bound=nn.Module)


@dataclass(frozen=True)
class LayerReport:
    """What was done to one layer.

    Attributes:
        name: qualified name in the model; in a pipeline it follows the name of the part.
        stream: number of its mask stream.
        adapters, ranks, p: names, ranks and dropout rates of its adapters, in merge order.
        how: "fused" (added in place to the output of a plain linear layer), "base + delta" (added
            to the output of a quantised or hooked layer), "convolution" (the same, with masks by
            channel and position), "skipped" (left as it is) or "not reached" (a forward pass has
            ended since without calling the layer, or its parent no longer calls it; what
            torch.compile runs may go unnoticed).
        reason: why it is not fused; "" if it is.
    """

    name: str
    stream: int
    adapters: tuple[str, ...]
    ranks: tuple[int, ...]
    p: tuple[float, ...]
    how: str = FUSED
    reason: str = ""

    def __str__(self) -> str:
        parts = (
            f"{a} r={r} p={p:.4g}"
            for a, r, p in zip(self.adapters, self.ranks, self.p, strict=True)
        )
        text = f"{self.name}: {', '.join(parts) or 'no active adapter'}"
        return text if self.how == FUSED else f"{text} [{self.how}: {self.reason}]"


def served_how(base: Any) -> tuple[str, str]:
    """How a layer with this base is served, and why it is not fused."""
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if base.padding_mode == "zeros":
            return CONVOLUTION, "a convolution"
        padded = f"the layer pads with {base.padding_mode!r}, its adapters with zeros as PEFT's do"
        return CONVOLUTION, f"a convolution; {padded}"
    if is_fresh(base):
        return FUSED, ""
    if type(base) is nn.Linear:
        return DELTA, "hooks on the base layer"
    return DELTA, f"the base layer is a {type(base).__name__}"


class Layers(Mapping[str, _Layer]):
    """Layers by qualified name, to be read only; unlike a ``mappingproxy`` copied and pickled."""

    def __init__(self, layers: Mapping[str, _Layer]) -> None:
        self._layers = dict(layers)

    def __getitem__(self, name: str) -> _Layer:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return repr(self._layers)


class Handle(ABC):
    """Something put into a model: a context manager that takes it out at the end.

    Copied or pickled with the model, as an attribute of a module that holds both, it is a handle on
    the copy.
    """

    def __init__(self, report: Iterable[LayerReport], passes: Passes) -> None:
        self._report = tuple(sorted(report, key=lambda entry: entry.name))
        self._passes = passes

    @property
    def report(self) -> tuple[LayerReport, ...]:
        """A `LayerReport` for each layer, and for each one that was skipped, in name order."""
        why = "no call of it was seen in a pass of the model; its parent may read its weights"
        reasons = dict.fromkeys(self._passes.unreached(), why) | self._passes.idle()
        return tuple(
            replace(entry, how=UNREACHED, reason=reasons[entry.name])
            if entry.name in reasons
            else entry
            for entry in self._report
        )

    @abstractmethod
    def detach(self) -> None:
        """Puts the model back as it was; a second call does nothing."""

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()
