"""The rule by which results count as right: what it takes, what it refuses, and its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import rule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def against(dtype: torch.dtype) -> rule.Wanted:
    """A product of normal matrices: exact, in plain torch, and its terms."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=generator).to(dtype) for _ in range(2))
    (wanted,) = rule.wanted(lambda x, y: [x @ y], [a, b])
    return wanted


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_torch_and_the_rounded_result_keep_it(dtype: torch.dtype) -> None:
    wanted = against(dtype)
    assert rule.fault(wanted.plain, wanted) is None
    assert rule.fault(wanted.exact.to(dtype), wanted) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_element_by_its_size(dtype: torch.dtype) -> None:
    wanted = against(dtype)
    found = wanted.exact.to(dtype)
    found[5, 7] += 1.0
    assert "largest error" in str(rule.fault(found, wanted))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_small_errors_by_their_mean(dtype: torch.dtype) -> None:
    """Each as large as the largest one may be, or less."""
    wanted = against(dtype)
    worst = 1.5 * float((wanted.plain.double() - wanted.exact).abs().max())
    found = (wanted.exact + worst).to(dtype)
    assert "root mean square error" in str(rule.fault(found, wanted))


def test_what_is_not_comparable() -> None:
    wanted = against(torch.float32)
    found = wanted.plain.clone()
    assert "(64, 63)" in str(rule.fault(found[:, 1:], wanted))
    assert "torch.float64" in str(rule.fault(found.double(), wanted))
    found[0, 0] = torch.nan
    assert "1 elements that are not finite" in str(rule.fault(found, wanted))
    empty = rule.Wanted(*(tensor[:0] for tensor in wanted))
    assert rule.fault(wanted.plain[:0], empty) is None


def test_formula_element_by_element() -> None:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, base, gains = normal(3, 4), normal(3, 5), [2.0, -0.5]
    A, B = [normal(2, 4), normal(1, 4)], [normal(5, 2), normal(5, 1)]
    masks = [normal(3, 5) > 0 for _ in gains]
    wanted = np.zeros((3, 5))
    for m in range(3):
        for n in range(5):
            wanted[m, n] = base[m, n]
            for a, b, gain, mask in zip(A, B, gains, masks, strict=True):
                if mask[m, n]:
                    ranks, features = a.shape
                    for r in range(ranks):
                        s = sum(float(a[r, i] * x[m, i]) for i in range(features))
                        wanted[m, n] += gain * float(b[n, r]) * s
    found = rule.formula(x, A, B, gains, masks, base)
    assert torch.allclose(found, torch.from_numpy(wanted), rtol=1e-13, atol=1e-13)
