"""What a merge is apart from the values in its tensors, and the one place where it is checked."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ortho import mask_stream

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_ADAPTERS = 255  # an adapter's index is its lane set, one byte

_DTYPE_NAMES = "float32, bfloat16, float16 or float64"


class Draw(str, Enum):
    """What is drawn for an output element, and so which adapters act on it."""

    NONE = "none"  # nothing: every adapter acts on every element
    SHARED = "shared"  # one number; the adapters' intervals are disjoint
    OWN = "own"  # a number for each adapter, from the lane set of its index


_DRAWS = {"orthogonal": Draw.SHARED, "dropout": Draw.OWN, "direct": Draw.NONE}
METHODS = tuple(_DRAWS)
Interval = tuple[int, int]  # first and last, inclusive, of the 16-bit draws


class Place(NamedTuple):
    """Where in the mask stream a call stands (MASK_STREAM.md, "Arguments")."""

    stream: int = 0
    sample: int = 0
    strata: int = 1
    row_offset: int = 0
    col_offset: int = 0

    def checked(self, tokens: int, d_out: int) -> Place:
        """This place, with integers of other kinds as Python's; TypeError or ValueError unless
        every coordinate of the call is in its range."""
        stream, sample, strata, row_offset, col_offset = self
        stream, sample, row_offset, col_offset = map(
            mask_stream.check_in_range,
            _PLACE_LIMITS,
            (stream, sample, row_offset, col_offset),
            _PLACE_LIMITS.values(),
        )
        strata = mask_stream.check_strata(strata)
        _check_room("row_offset", row_offset, tokens, mask_stream.ROW_LIMIT, "tokens")
        _check_room("col_offset", col_offset, d_out, mask_stream.COL_LIMIT, "features")
        return Place(stream, sample, strata, row_offset, col_offset)

    @property
    def block(self) -> int:
        """What the draws count in place of the sample: the number of its block of strata."""
        return mask_stream.stratum(self.sample, self.strata)[0]

    @property
    def rotation(self) -> int:
        """What is added to the draws, mod 65536."""
        return mask_stream.stratum(self.sample, self.strata)[1]


_PLACE_LIMITS = {
    "stream": mask_stream.STREAM_LIMIT,
    "sample": mask_stream.SAMPLE_LIMIT,
    "row_offset": mask_stream.ROW_LIMIT,
    "col_offset": mask_stream.COL_LIMIT,
}


def _check_room(name: str, offset: int, length: int, limit: int, what: str) -> None:
    if offset + length > limit:
        raise ValueError(
            f"{name} must leave room for {length} {what} below 2**{limit.bit_length() - 1}, "
            f"got {offset}"
        )


@dataclass(frozen=True)
class Rule:
    """How the adapters of one layer are mixed: constants, checked once.

    Attributes:
        draw: what is drawn for an element.
        intervals: K intervals; adapter j acts on an element whose draw lies in the j-th.
        gains: K floats, scaling over realised keep probability; times the merge weights where
            :meth:`weighted` made the rule.
    """

    draw: Draw
    intervals: tuple[Interval, ...]
    gains: tuple[float, ...]

    @staticmethod
    def make(
        adapters: int,
        p: Sequence[float] | Tensor | None,
        scaling: Sequence[float] | Tensor | None,
        method: str,
    ) -> Rule:
        """Check p, scaling and method for a number of adapters, and work out their constants."""
        check_method(method)
        rates, scales = None, None
        if p is not None:
            rates = tuple(mask_stream.rates(p))
            _check_length("p", len(rates), adapters)
        if scaling is not None:
            scales = tuple(finite_numbers("scaling", scaling, adapters))
        make = _rule if torch.compiler.is_compiling() else _remembered_rule
        return make(adapters, rates, scales, method)

    def weighted(self, weights: Sequence[float]) -> Rule:
        """This rule with its gains multiplied by K merge weights."""
        gains = tuple(w * gain for w, gain in zip(weights, self.gains, strict=True))
        return Rule(self.draw, self.intervals, gains)


def check_method(method: object) -> None:
    """ValueError unless it is one of ``METHODS``."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


def _rule(
    adapters: int, p: tuple[float, ...] | None, scales: tuple[float, ...] | None, method: str
) -> Rule:
    draw, scales = _DRAWS[method], scales or (1.0,) * adapters
    thresholds, keep = mask_stream.thresholds(p or mask_stream.default_rates(adapters), method)
    firsts = [0, *thresholds[:-1]] if draw is Draw.SHARED else [0] * len(thresholds)
    intervals = tuple((first, T - 1) for first, T in zip(firsts, thresholds, strict=True))
    return Rule(draw, intervals, tuple(s / q for s, q in zip(scales, keep, strict=True)))


_remembered_rule = functools.lru_cache(maxsize=1024)(_rule)


class Problem(NamedTuple):
    """Sizes, dtype, device and masks of one layer's merge; what backends decide and pack by.

    Attributes:
        draw, intervals: those of its :class:`Rule`; the gains are no part of it.
        d_in, d_out: features in and out.
        ranks: K ranks.
        dtype: of x, base and output.
        device: type of the device, "cpu" or "cuda" or another.
    """

    draw: Draw
    intervals: tuple[Interval, ...]
    d_in: int
    d_out: int
    ranks: tuple[int, ...]
    dtype: torch.dtype
    device: str


def check(
    rule: Rule,
    x: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    base: Tensor | None,
    place: Place,
) -> tuple[Problem, Place]:
    """The one check of a call's tensors and of where it stands.

    Returns:
        What the call is, and its place with integers of other kinds as Python's.
    Raises:
        TypeError: not a tensor, or an unsupported dtype.
        ValueError: a shape, a device or a coordinate that does not fit. Each error names its
            argument, what it was and what it may be.
    """
    check_dtype("x", x)
    if x.dim() == 0:
        raise ValueError("x must have shape (..., d_in), got a tensor without dimensions")
    d_in, ranks = x.shape[-1], check_factors(lora_A, lora_B)
    d_out = lora_B[0].shape[0]
    if lora_A[0].shape[1] != d_in:
        raise ValueError(
            f"x has {d_in} features in shape {tuple(x.shape)}, but lora_A takes "
            f"{lora_A[0].shape[1]}"
        )
    for name, tensor in (("lora_A[0]", lora_A[0]), ("base", base)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
    if base is not None:
        _check_base(base, x, d_out)
    problem = Problem(rule.draw, rule.intervals, d_in, d_out, ranks, x.dtype, x.device.type)
    return problem, place.checked(math.prod(x.shape[:-1]), d_out)


def check_dtype(name: str, tensor: Tensor) -> None:
    """TypeError unless it is a tensor of one of ``DTYPES``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be {_DTYPE_NAMES}, got {tensor.dtype}")


def _check_base(base: Tensor, x: Tensor, d_out: int) -> None:
    check_dtype("base", base)
    if base.dtype != x.dtype:
        raise TypeError(f"base must have the dtype of x, {x.dtype}, got {base.dtype}")
    wanted = (*x.shape[:-1], d_out)
    if tuple(base.shape) != wanted:
        raise ValueError(f"base must have shape {wanted}, got {tuple(base.shape)}")


def check_factors(lora_A: Sequence[Tensor], lora_B: Sequence[Tensor]) -> tuple[int, ...]:
    """The ranks of K pairs (r_j, d_in), (d_out, r_j) that agree with one another.

    Raises:
        TypeError, ValueError: by the name of the factor that does not fit.
    """
    adapter_count(lora_A, lora_B)
    for j, (A, B) in enumerate(zip(lora_A, lora_B, strict=True)):
        check_pair(A, B, f"lora_A[{j}]", f"lora_B[{j}]")
        if A.shape[1] != lora_A[0].shape[1]:
            raise ValueError(
                f"lora_A[{j}] must have {lora_A[0].shape[1]} columns as lora_A[0] has, got shape "
                f"{tuple(A.shape)}"
            )
        if B.shape[0] != lora_B[0].shape[0]:
            raise ValueError(
                f"lora_B[{j}] must have {lora_B[0].shape[0]} rows as lora_B[0] has, got shape "
                f"{tuple(B.shape)}"
            )
        if A.device != lora_A[0].device:
            raise ValueError(
                f"lora_A[{j}] must be on the device of lora_A[0], {lora_A[0].device}, "
                f"got {A.device}"
            )
    return tuple(A.shape[0] for A in lora_A)


def adapter_count(lora_A: Sequence[Tensor], lora_B: Sequence[Tensor]) -> int:
    """K, after a check that both are lists of so many."""
    for name, factors in (("lora_A", lora_A), ("lora_B", lora_B)):
        if not isinstance(factors, (list, tuple)):
            raise TypeError(f"{name} must be a list of tensors, got {type(factors).__name__}")
    if not 1 <= len(lora_A) <= MAX_ADAPTERS:
        raise ValueError(f"lora_A must hold 1 to {MAX_ADAPTERS} tensors, got {len(lora_A)}")
    _check_length("lora_B", len(lora_B), len(lora_A))
    return len(lora_A)


def check_pair(A: Tensor, B: Tensor, name_A: str, name_B: str) -> None:
    """Raise unless A is (r, d_in) and B is (d_out, r), floating point, on one device, not empty."""
    for name, tensor, shape in ((name_A, A, "(r, d_in)"), (name_B, B, "(d_out, r)")):
        check_dtype(name, tensor)
        if tensor.dim() != 2 or 0 in tensor.shape:
            raise ValueError(
                f"{name} must have shape {shape} without zeros, got {tuple(tensor.shape)}"
            )
    if B.shape[1] != A.shape[0]:
        problem = (
            f"{name_B} must have {A.shape[0]} columns, the rank of {name_A}, got shape "
            f"{tuple(B.shape)}"
        )
        turned = [
            words
            for words, rank_A, rank_B in (
                (f"{name_A} looks", A.shape[1], B.shape[1]),
                (f"{name_B} looks", A.shape[0], B.shape[0]),
                (f"{name_A} and {name_B} look", A.shape[1], B.shape[0]),
            )
            if rank_A == rank_B
        ]
        if turned:
            problem = (
                f"{turned[0]} transposed: {name_A} must have shape (r, d_in), {name_B} "
                f"(d_out, r), got {tuple(A.shape)} and {tuple(B.shape)}"
            )
        raise ValueError(problem)
    if B.device != A.device:
        raise ValueError(f"{name_B} must be on the device of {name_A}, {A.device}, got {B.device}")


def _check_length(name: str, got: int, wanted: int) -> None:
    if got != wanted:
        raise ValueError(f"{name} must hold {wanted} values, one for each adapter, got {got}")


def finite_numbers(name: str, values: Sequence[float] | Tensor | None, count: int) -> list[float]:
    """``count`` finite floats from a sequence; ones for None. No gradient would reach a tensor."""
    if values is None:
        return [1.0] * count
    parts = values if isinstance(values, (list, tuple)) else (values,)
    if any(isinstance(part, Tensor) and part.requires_grad for part in parts):
        raise TypeError(
            f"{name} must be numbers here, got a tensor that requires a gradient, which would be "
            f"lost: detach it; fused_ortho_lora takes trainable weights, as one tensor"
        )
    numbers = mask_stream.numbers(name, values)
    _check_length(name, len(numbers), count)
    for j, number in enumerate(numbers):
        if not math.isfinite(number):
            raise ValueError(f"{name}[{j}] must be finite, got {number}")
    return numbers
