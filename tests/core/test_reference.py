"""The reference itself: its formula element by element, and its gradients against autograd's."""

from __future__ import annotations

import pytest
import torch
from cases import METHODS, make, same_rank

from lora_ortho import mask_stream
from lora_ortho.reference import merge, merge_gradients, stick_breaking

CASE = same_rank(3, 4, 5, 2, 2)


def test_formula_element_by_element() -> None:
    """Against sums of Python floats."""
    x, lora_A, lora_B, _, base, _ = make(CASE, torch.float64)
    gains = [1.5, -2.0]
    thresholds, _ = mask_stream.thresholds([0.5, 0.6], "orthogonal")
    masks = mask_stream.masks(5, range(3), range(5), thresholds, "orthogonal")
    y = merge(x, lora_A, lora_B, gains, masks, base)
    for row in range(3):
        for col in range(5):
            expected = float(base[row, col])
            for A, B, gain, mask in zip(lora_A, lora_B, gains, masks, strict=True):
                s = [sum(float(A[i, k] * x[row, k]) for k in range(4)) for i in range(2)]
                delta = sum(float(B[col, i]) * s[i] for i in range(2))
                expected += gain * delta if bool(mask[row, col]) else 0.0
            assert float(y[row, col]) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_written_out_are_autograds(method: str) -> None:
    x, lora_A, lora_B, _, _, grad = make(same_rank(9, 11, 30, 3, 4), torch.float64)
    thresholds, _ = mask_stream.thresholds([2 / 3] * 3, method)
    masks = mask_stream.masks(5, range(9), range(30), thresholds, method)
    gains = torch.tensor([1.5, -2.0, 0.5], dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, gains, *lora_A, *lora_B)]
    y = merge(x, lora_A, lora_B, gains, masks)
    expected = torch.autograd.grad(y, leaves, grad)
    with torch.no_grad():
        grad_x, grad_A, grad_B, grad_gains = merge_gradients(grad, x, lora_A, lora_B, gains, masks)
    for found, wanted in zip((grad_x, grad_gains, *grad_A, *grad_B), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_stick_breaking_never_overlaps_and_keeps_every_rate() -> None:
    """Rates at and beyond what is left of the stick."""
    generator = torch.Generator().manual_seed(0)
    for p in ([0.0], [0.5, 0.5], [2 / 3] * 3, [6 / 7] * 7, [0.9, 0.2]):
        masks = torch.stack(stick_breaking(p, (400, 500), generator))
        assert int(masks.sum(0).max()) == 1
        found = masks.double().mean((1, 2))
        deviation = torch.tensor([(q * (1 - q) / 200000) ** 0.5 for q in p]).double()
        assert bool(((found - (1 - torch.tensor(p)).double()).abs() <= 5 * deviation + 1e-6).all())
