"""What a call of the merge is made with, as Python has it and as the ops' schemas do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lora_ortho.backends.base import Needs
from lora_ortho.problem import Draw, Interval, Place, Rule


class Call(NamedTuple):
    """How a call merges, apart from its tensors.

    Attributes:
        rule: its draw and intervals; the gains are given beside it.
        place: where in the mask stream.
        backend: None or a name.
        coordinates: a tensor that stands for ``place``, for torch.compile (:class:`Inputs`).
    """

    rule: Rule
    place: Place
    backend: str | None
    coordinates: Tensor | None = None


class Inputs(NamedTuple):
    """The tensors that both kernels take first.

    Attributes:
        coordinates: int64 on the CPU, in place of the ints of a :class:`Place`: what a module keeps
            in a tensor, torch.compile does not guard on.
    """

    x: Tensor
    lora_A: Sequence[Tensor]
    lora_B: Sequence[Tensor]
    gains: Tensor
    seed: Tensor
    coordinates: Tensor | None

    @staticmethod
    def of(
        factors: Sequence[Tensor],
        x: Tensor,
        gains: Tensor,
        seed: Tensor,
        coordinates: Tensor | None,
    ) -> Inputs:
        """With all lora_A and all lora_B in one sequence."""
        half = len(factors) // 2
        return Inputs(x, factors[:half], factors[half:], gains, seed, coordinates)

    @staticmethod
    def split(given: tuple[Any, ...]) -> tuple[Inputs, tuple[Any, ...]]:
        """The first arguments of an op, and the others."""
        return Inputs(*given[:6]), given[6:]


class Constants(NamedTuple):
    """What both kernels take besides tensors.

    Attributes:
        trained: gradients of factors are recorded: they are packed in the call.
    """

    draw: Draw
    intervals: tuple[Interval, ...]
    place: Place
    backend: str
    trained: bool

    def flat(self) -> tuple[Any, ...]:
        """As the schemas have them."""
        ends = [end for interval in self.intervals for end in interval]
        return (self.draw.value, ends, *self.place, self.backend, self.trained)

    @staticmethod
    def of(draw: str, ends: Sequence[int], *rest: Any) -> Constants:
        """The inverse of :meth:`flat`."""
        *place, backend, trained = rest
        intervals = tuple(zip(ends[::2], ends[1::2], strict=True))
        return Constants(Draw(draw), intervals, Place(*place), backend, trained)


_INPUTS = (
    "Tensor x, Tensor[] lora_A, Tensor[] lora_B, Tensor gains, Tensor seed, Tensor? coordinates"
)
_PLACE = ", ".join(f"SymInt {name}" for name in Place._fields)
_CONSTANTS = f"str draw, int[] intervals, {_PLACE}, str backend, bool trained"
_NEEDS = ", ".join(f"bool need_{name}" for name in Needs._fields)

FORWARD = f"({_INPUTS}, Tensor? base, {_CONSTANTS}) -> (Tensor y, Tensor s)"
BACKWARD = (
    f"({_INPUTS}, Tensor grad, Tensor s, {_CONSTANTS}, {_NEEDS})"
    " -> (Tensor grad_x, Tensor grad_A, Tensor grad_B, Tensor grad_gains)"
)
