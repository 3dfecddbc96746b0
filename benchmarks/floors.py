"""The least that a merge costs: bytes that must move, operations that must be done, and ceilings.

Bytes: each input is read once, each output written once. Operations: of the expand step only the
owner's r products per element, since no other adapter's product enters the result; two per
multiply-add. Where a case fits in a cache, less than its bytes reaches memory, and a share of the
floor above 1 says just that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .cases import DTYPES, Case
from .device import Device
from .harness import Effort, measure

_COPY_BYTES = {"cpu": 1 << 28, "gpu": 1 << 32, "rehearsal": 1 << 16}
_MATMUL = {"cpu": 2048, "gpu": 8192, "rehearsal": 64}


class Work(NamedTuple):
    """What a call cannot do without."""

    bytes: int
    operations: int

    def seconds(self, ceilings: dict[str, Any]) -> float:
        """The floor: the longer of the two at the rates measured."""
        moved = self.bytes / float(ceilings["copy_bytes_per_second"])
        return max(moved, self.operations / float(ceilings["matmul_operations_per_second"]))


def forward(case: Case, dtype: str) -> Work:
    """x, A, B, base read; y written."""
    t, d_in, d_out, count, rank = case
    numbers = t * d_in + count * rank * (d_in + d_out) + 2 * t * d_out
    return Work(numbers * DTYPES[dtype].itemsize, 2 * t * rank * (count * d_in + d_out))


def backward(case: Case, dtype: str) -> Work:
    """Forward and backward: of the latter x, A, B, grad read; dx, dA, dB written; base's is grad.

    ds and dB take the owner's r products of an element each; dA and dx all of s.
    """
    t, d_in, d_out, count, rank = case
    numbers = 2 * t * d_in + 2 * count * rank * (d_in + d_out) + t * d_out
    there = forward(case, dtype)
    return Work(
        there.bytes + numbers * DTYPES[dtype].itemsize,
        there.operations + 4 * t * rank * (count * d_in + d_out),
    )


def expand(case: Case, dtype: str) -> Work:
    """Draw, expand, add: s, B, base read; y written."""
    t, _, d_out, count, rank = case
    numbers = t * count * rank + count * rank * d_out + 2 * t * d_out
    return Work(numbers * DTYPES[dtype].itemsize, 2 * t * rank * d_out)


def ceilings(device: Device, dtype: str, effort: Effort) -> dict[str, Any]:
    """Rates of a large copy (bytes read plus bytes written) and of a large matrix product.

    Returns:
        the two rates, and the quartiles of the seconds they come from.
    """
    wide, place = DTYPES[dtype], device.torch_device
    count = _COPY_BYTES[device.label] // wide.itemsize
    source = torch.ones(count, dtype=wide, device=place)
    target = torch.empty_like(source)
    n = _MATMUL[device.label]
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator).to(wide).to(place) for _ in range(2))
    product = torch.empty(n, n, dtype=wide, device=place)
    calls = {
        "copy": lambda: target.copy_(source),
        "matmul": lambda: torch.mm(a, b, out=product),
    }
    with torch.no_grad():
        times = measure({k: device.stopwatch([call]) for k, call in calls.items()}, effort)
    return {
        "copy_bytes_per_second": float(f"{2 * source.nbytes / times.of('copy').median:.4g}"),
        "matmul_operations_per_second": float(f"{2 * n**3 / times.of('matmul').median:.4g}"),
        "seconds": {name: times.of(name).json() for name in calls},
        "others": times.rounded_others(),
    }
