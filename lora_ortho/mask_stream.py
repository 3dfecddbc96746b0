"""The mask stream, version 1: every mask as a pure function of its coordinates.

MASK_STREAM.md is the definition. This file is its vectorised form in torch; it runs on any device,
in int64 arithmetic with masks, and is the yardstick for the C++ and GPU kernels.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

VERSION = 1  # of MASK_STREAM.md; files that hold masks say it
ROUNDS = 7
ROW_LIMIT = 1 << 32
COL_LIMIT = 1 << 35
STREAM_LIMIT = 1 << 32
SAMPLE_LIMIT = 1 << 24
MOST_STRATA = 1 << 16
LANE_LIMIT = 1 << 8
UNIT = 1 << 16  # draws lie in [0, UNIT)
SUM_SLACK = 1e-9  # rounding allowed above a sum of 1

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

Indices = Sequence[int] | Tensor


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product; int64 wraps, and the wrapped bits are the right ones."""
    product = word * constant
    return (product >> 32) & _LOW, product & _LOW


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-7 (Salmon et al., SC 2011).

    Args:
        counter: four int64 tensors of 32-bit words, shapes that broadcast together.
        key: two int64 tensors of 32-bit words.
    Returns:
        Four int64 tensors of 32-bit words in the broadcast shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def as_int(name: str, value: Any, wanted: str = "an int") -> int:
    """An integer of any kind (NumPy's too) as Python's, TypeError for anything else."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")
    return operator.index(value)


def check_in_range(name: str, value: int, limit: int) -> int:
    """``value`` as an int if it is one in [0, limit); else TypeError or ValueError naming it."""
    value = as_int(name, value)
    if not 0 <= value < limit:
        raise ValueError(f"{name} must be in [0, 2**{limit.bit_length() - 1}), got {value}")
    return value


def check_strata(strata: int) -> int:
    """``strata`` as an int if it is one in [1, 65536]; else TypeError or ValueError naming it."""
    strata = as_int("strata", strata)
    if not 1 <= strata <= MOST_STRATA:
        raise ValueError(f"strata must be in [1, {MOST_STRATA}], got {strata}")
    return strata


def stratum(sample: int, strata: int) -> tuple[int, int]:
    """Block and rotation of a sample that is one of ``strata`` (MASK_STREAM.md, "Stratified
    samples"): the block is counted in place of the sample, and the rotation in [0, 65536) is added
    to its draws, mod 65536."""
    block, part = divmod(sample, strata)
    return block, part * UNIT // strata


def check_seed(seed: int | Tensor) -> int | Tensor:
    """``seed`` if it is 64 bits, an int or an int64 tensor; else TypeError or ValueError."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int64 tensor, got {seed.dtype}")
        if seed.numel() != 1:
            raise ValueError(f"seed must have one element, got shape {tuple(seed.shape)}")
        return seed
    seed = as_int("seed", seed, "an int or an int64 tensor")
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    return seed


def seed_tensor(seed: int | Tensor, device: torch.device | None = None) -> Tensor:
    """The seed as an int64 tensor of one element (a tensor stays where it is).

    An int may be signed or unsigned 64-bit: a negative one is read as its two's complement.
    """
    seed = check_seed(seed)
    if isinstance(seed, Tensor):
        return seed
    if seed >= 1 << 63:
        seed = seed - (1 << 64)
    return torch.full((), seed, dtype=torch.int64, device=device)


def _indices(name: str, values: Indices, limit: int, device: torch.device) -> Tensor:
    if isinstance(values, range):
        ends = (values[0], values[-1]) if len(values) else ()
        for end in ends:
            check_in_range(name, end, limit)
        return torch.arange(values.start, values.stop, values.step, device=device)
    tensor = torch.as_tensor(values, device=device)
    if tensor.numel() == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {tensor.dtype}")
    if tensor.dim() != 1:
        raise ValueError(f"{name} must have one dimension, got shape {tuple(tensor.shape)}")
    tensor = tensor.to(torch.int64)
    for end in (int(tensor.min()), int(tensor.max())):
        check_in_range(name, end, limit)
    return tensor


def _device_of(*candidates: object) -> torch.device:
    for candidate in candidates:
        if isinstance(candidate, Tensor):
            return candidate.device
    return torch.device("cpu")


def draws(
    seed: int | Tensor,
    rows: Indices,
    cols: Indices,
    *,
    stream: int = 0,
    sample: int = 0,
    strata: int = 1,
    lane_set: int = 0,
) -> Tensor:
    """The 16-bit numbers that decide the masks (MASK_STREAM.md, "One draw").

    Args:
        seed: 64-bit int, or an int64 tensor of one element, whose device then is the result's.
        rows, cols: token and feature indices: ranges, sequences, or 1-D integer tensors;
            rows in [0, 2**32), cols in [0, 2**35).
        stream, sample, lane_set: layer in [0, 2**32), Monte Carlo draw in [0, 2**24), lane set
            in [0, 256).
        strata: how many samples in a row share their elements out in proportion, in [1, 65536].
    Returns:
        int32 tensor (len(rows), len(cols)) with values in [0, 65536).
    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range, by name.
    """
    check_in_range("stream", stream, STREAM_LIMIT)
    check_in_range("sample", sample, SAMPLE_LIMIT)
    check_in_range("lane_set", lane_set, LANE_LIMIT)
    block, rotation = stratum(sample, check_strata(strata))
    device = _device_of(seed, rows, cols)
    key = seed_tensor(seed, device).reshape(()).to(device)
    row = _indices("rows", rows, ROW_LIMIT, device)
    col = _indices("cols", cols, COL_LIMIT, device)
    group, place = _eights(cols, col)
    words = philox(
        (group, row[:, None], key.new_tensor(stream), key.new_tensor(block << 8 | lane_set)),
        (key & _LOW, (key >> 32) & _LOW),
    )
    shape = (row.numel(), group.numel())
    halves = [h + rotation & 0xFFFF for w in words for h in (w, w >> 16)]
    drawn = [half.to(torch.int32).expand(shape) for half in halves]
    return torch.stack(drawn, dim=2).reshape(shape[0], 8 * shape[1])[:, place].contiguous()


def _eights(cols: Indices, col: Tensor) -> tuple[Tensor, slice | Tensor]:
    """The Philox calls that columns need, and where in their output the columns stand."""
    if isinstance(cols, range) and cols.step == 1 and len(cols):
        first = cols.start >> 3
        group = torch.arange(first, ((cols.stop - 1) >> 3) + 1, device=col.device)
        return group, slice(cols.start - 8 * first, cols.stop - 8 * first)
    group, inverse = torch.unique(col >> 3, return_inverse=True)
    return group, 8 * inverse + (col & 7)


def numbers(name: str, values: Iterable[float] | Tensor, what: str = "numbers") -> list[float]:
    """Floats of a sequence; TypeError for what is none, or holds something else than numbers."""
    kind = type(values).__name__
    if isinstance(values, (Mapping, Set)):
        raise TypeError(
            f"{name} must be a sequence of {what}, got {kind}: give them in the order of the "
            f"adapters"
        )
    if isinstance(values, (str, bytes, int, float)) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name} must be a sequence of {what}, got {kind}")
    return [
        float(v) if isinstance(v, (int, float)) else _number(f"{name}[{j}]", v)
        for j, v in enumerate(values)
    ]


def _number(name: str, value: Any) -> float:
    """A float of a number of another library, or of a tensor of one element."""
    numel = value.numel() if isinstance(value, Tensor) else 1
    if numel != 1 or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def rates(p: Sequence[float] | Tensor, name: str = "p") -> list[float]:
    """Dropout rates as floats, each checked to lie in [0, 1)."""
    values = numbers(name, p, "rates")
    for j, value in enumerate(values):
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name}[{j}] must be a dropout rate in [0, 1), got {value}")
    return values


def default_rates(adapters: int) -> list[float]:
    """1 - 1/K for each of K adapters: the smallest equal rates of the orthogonal method."""
    return [1.0 - 1.0 / adapters] * adapters


def thresholds(p: Sequence[float] | Tensor, method: str) -> tuple[list[int], list[float]]:
    """Thresholds T_j on the 16-bit draws, and the keep probabilities that they realise.

    Args:
        p: K dropout rates in [0, 1).
        method: "orthogonal" (cumulative thresholds), "dropout" (one per adapter) or "direct"
            (65536 throughout: nothing is drawn).
    Returns:
        K ints in [1, 65536] and K floats q̂_j (MASK_STREAM.md, "From draws to owners").
    Raises:
        ValueError: a rate outside [0, 1), one too close to 1 to be drawn, or Σ(1 - p_j) > 1 for
            the orthogonal method.
    """
    keep = [1.0 - value for value in rates(p)]
    if method == "direct":
        return [UNIT] * len(keep), [1.0] * len(keep)
    if method == "dropout":
        found = [math.floor(UNIT * q + 0.5) for q in keep]
        widths = found
    elif method == "orthogonal":
        _check_sum(keep)
        sums = [math.fsum(keep[: j + 1]) for j in range(len(keep))]
        found = [min(math.floor(UNIT * total + 0.5), UNIT) for total in sums]
        widths = [high - low for low, high in zip([0, *found[:-1]], found, strict=True)]
    else:
        raise ValueError(f'method must be "orthogonal", "dropout" or "direct", got {method!r}')
    for j, width in enumerate(widths):
        if width == 0:
            raise ValueError(
                f"p[{j}] is too close to 1: 16-bit draws resolve keep probabilities of 2**-16, so "
                f"a rate of at most 1 - 2**-16 = {1.0 - 2.0**-16} works; got {1.0 - keep[j]!r}"
            )
    return found, [width / UNIT for width in widths]


def _check_sum(keep: list[float]) -> None:
    total = math.fsum(keep)
    if total > 1.0 + SUM_SLACK:
        count = len(keep)
        raise ValueError(
            f"p: the orthogonal method needs keep probabilities 1 - p that sum to at most 1, got "
            f"{total:.12g}; the smallest admissible rate for {count} equal adapters is "
            f"1 - 1/{count} = {default_rates(count)[0]:.12g}"
        )


def owners(u: Tensor, thresholds: Sequence[int]) -> Tensor:
    """The first j with ``u < thresholds[j]``, -1 where there is none; int64, shape of ``u``."""
    edges = torch.tensor(thresholds, dtype=u.dtype, device=u.device)
    owner = torch.bucketize(u, edges, right=True)
    return torch.where(owner == len(thresholds), -1, owner)


def winners(
    seed: int | Tensor,
    rows: Indices,
    cols: Indices,
    p: Sequence[float] | Tensor,
    *,
    stream: int = 0,
    sample: int = 0,
    strata: int = 1,
) -> Tensor:
    """Which adapter owns each output element under the orthogonal method.

    Args:
        p: K dropout rates with Σ(1 - p_j) ≤ 1; the others as for :func:`draws`.
    Returns:
        int64 tensor (len(rows), len(cols)): the owner's index, or -1 for nobody.
    """
    edges, _ = thresholds(p, "orthogonal")
    return owners(draws(seed, rows, cols, stream=stream, sample=sample, strata=strata), edges)


def masks(
    seed: int | Tensor,
    rows: Indices,
    cols: Indices,
    thresholds: Sequence[int],
    method: str,
    *,
    stream: int = 0,
    sample: int = 0,
    strata: int = 1,
) -> list[Tensor]:
    """The K masks of a method, as bool tensors (len(rows), len(cols)).

    Args:
        thresholds: K, of the function of that name; the others as for :func:`draws`.
    """
    place = {"stream": stream, "sample": sample, "strata": strata}
    if method == "orthogonal":
        owner = owners(draws(seed, rows, cols, **place), thresholds)
        return [owner == j for j in range(len(thresholds))]
    if method == "dropout":
        return [
            draws(seed, rows, cols, **place, lane_set=j) < threshold
            for j, threshold in enumerate(thresholds)
        ]
    shape = (len(rows), len(cols))
    return [torch.ones(shape, dtype=torch.bool, device=_device_of(seed, rows, cols))] * len(
        thresholds
    )
