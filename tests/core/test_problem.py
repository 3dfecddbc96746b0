"""Rules, and what their draws and intervals become: masks, and words of the C interface."""

from __future__ import annotations

import pytest
import torch
from cases import METHODS

from lora_ortho import mask_stream
from lora_ortho.backends import native
from lora_ortho.problem import Draw, Place, Problem, Rule
from lora_ortho.reference import masks

RATES = {"equal": None, "unequal": [0.9, 0.75, 0.875], "one": [0.0]}


def rule_of(method: str, p: list[float] | None) -> tuple[Rule, list[int]]:
    """A rule, and the thresholds of its rates."""
    count = 3 if p is None else len(p)
    thresholds, _ = mask_stream.thresholds(p or [1 - 1 / 3] * 3, method)
    return Rule.make(count, p, None, method), thresholds


def problem_of(rule: Rule) -> Problem:
    ranks = (2,) * len(rule.intervals)
    return Problem(rule.draw, rule.intervals, 8, 40, ranks, torch.float32, "cpu")


def test_intervals_of_each_draw() -> None:
    p = [0.75, 0.5]
    assert Rule.make(2, p, [1.0, 3.0], "orthogonal") == Rule(
        Draw.SHARED, ((0, 16383), (16384, 49151)), (4.0, 6.0)
    )
    assert Rule.make(2, p, None, "dropout") == Rule(Draw.OWN, ((0, 16383), (0, 32767)), (4.0, 2.0))
    assert Rule.make(2, p, None, "direct") == Rule(Draw.NONE, ((0, 65535),) * 2, (1.0, 1.0))
    assert Rule.make(2, p, None, "orthogonal").weighted([0.5, -1.0]).gains == (2.0, -2.0)


@pytest.mark.parametrize("rates", list(RATES))
@pytest.mark.parametrize("method", METHODS)
def test_masks_are_those_of_the_method(method: str, rates: str) -> None:
    rule, thresholds = rule_of(method, RATES[rates])
    place = Place(stream=3, sample=5, strata=4, row_offset=7, col_offset=13)
    found = masks(problem_of(rule), 50, -9, place, torch.device("cpu"))
    wanted = mask_stream.masks(
        -9, range(7, 57), range(13, 53), thresholds, method, stream=3, sample=5, strata=4
    )
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("sample", "strata", "block", "rotation"),
    [
        (5, 1, 5, 0),
        (5, 2, 2, 32768),
        (5, 3, 1, 43690),
        (65535, 65536, 0, 65535),
        ((1 << 24) - 1, 65535, 256, 255),
    ],
)
def test_block_and_rotation(sample: int, strata: int, block: int, rotation: int) -> None:
    place = Place(sample=sample, strata=strata)
    assert (place.block, place.rotation) == (block, rotation)


@pytest.mark.parametrize("method", METHODS)
def test_the_c_interface_is_told_method_and_thresholds(method: str) -> None:
    rule, thresholds = rule_of(method, None)
    told = native.layer(problem_of(rule))
    assert told == (method, "float32", 8, 40, [2, 2, 2], thresholds)


@pytest.mark.parametrize("adapters", [1, 2, 3, 7, 255])
def test_default_rates_are_the_smallest_that_are_admitted(adapters: int) -> None:
    rates = mask_stream.default_rates(adapters)
    thresholds, _ = mask_stream.thresholds(rates, "orthogonal")
    assert thresholds[-1] == 65536
    if adapters > 1:
        with pytest.raises(ValueError, match="sum to at most 1"):
            mask_stream.thresholds([rate - 1e-6 for rate in rates], "orthogonal")
