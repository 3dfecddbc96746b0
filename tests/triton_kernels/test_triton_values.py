"""The Triton kernels in the interpreter: values, gradients and masks, as the other backends'."""

from __future__ import annotations

import itertools
from typing import Any

import op_checks
import pytest
import spelled
import stratified
import torch
import value_checks
from cases import CHECKED, METHODS, Case, make, same_rank
from numerics import run
from servers import TRITON, interpreted

from lora_ortho import fused_ortho_lora

pytestmark = interpreted()

NARROW = (torch.float32, torch.bfloat16, torch.float16)
COMBINATIONS = tuple(itertools.product(NARROW, METHODS))


@pytest.fixture(autouse=True)
def _two_threads(_poisoned: None) -> None:
    torch.set_num_threads(2)


@pytest.mark.parametrize("number", range(len(CHECKED)), ids=lambda n: str(CHECKED[n]))
def test_case_table(number: int) -> None:
    """Every case once, with all gradients; dtypes and methods take turns."""
    dtype, method = COMBINATIONS[(number * 4) % len(COMBINATIONS)]
    value_checks.check(TRITON, CHECKED[number], dtype, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", NARROW, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", [same_rank(7, 24, 130, 3, 16), Case(9, 20, 141, (5, 1, 40, 2, 3))])
def test_every_dtype_and_method(case: Case, dtype: torch.dtype, method: str) -> None:
    value_checks.check(TRITON, case, dtype, method)


@pytest.mark.parametrize("ranks", [(256, 1), (64,), (33, 64), (32, 20)], ids=str)
def test_ranks_around_the_ends_of_chunks(ranks: tuple[int, ...]) -> None:
    value_checks.check(TRITON, Case(5, 300, 70, ranks), torch.bfloat16, "orthogonal")


@pytest.mark.parametrize("method", ["orthogonal", "direct"])
def test_wide_factors_on_narrow_inputs(method: str) -> None:
    value_checks.check(
        TRITON, same_rank(29, 40, 150, 3, 8), torch.bfloat16, method, factor_dtype=torch.float32
    )


@pytest.mark.parametrize("dtype", [*NARROW, torch.float64])
def test_gradients_have_the_dtype_of_their_factor(dtype: torch.dtype) -> None:
    value_checks.check_dtypes_of_gradients(TRITON, dtype)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_are_not_asked_for(method: str) -> None:
    value_checks.check_single_gradients(TRITON, method)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_call_gives_the_same_bits(dtype: torch.dtype) -> None:
    case = same_rank(257, 96, 384, 3, 16)
    value_checks.check_same_bits(TRITON, 2, dtype, case)


@pytest.mark.parametrize("number", range(len(spelled.PLACES)))
@pytest.mark.parametrize("method", ["orthogonal", "dropout"])
def test_masks_in_forward_and_backward(method: str, number: int) -> None:
    """Bit for bit, at the corners of every coordinate; K up to 8."""
    dtype, place = NARROW[number % 3], spelled.PLACES[number]
    spelled.check_forward(TRITON, dtype, method, place)
    spelled.check_backward(TRITON, dtype, method, place)


@pytest.mark.parametrize(("method", "adapters", "rate", "strata"), stratified.WHOLE)
def test_the_mean_of_a_block_is_the_direct_merge(
    method: str, adapters: int, rate: float, strata: int
) -> None:
    dtype = NARROW[strata % 3]
    stratified.check_mean_of_integers(TRITON, dtype, method, adapters, rate, strata)


def test_two_halves_are_the_whole() -> None:
    spelled.check_halves(TRITON, torch.bfloat16, "orthogonal")


# block_m, block_n, tiles or group, chunk, hoist or parts
TILES = [(16, 32, 1, 16, True), (32, 64, 3, 16, False), (16, 128, 2, 32, False)]


@pytest.mark.parametrize(
    ("method", "tiles"),
    list(zip(("orthogonal", "dropout", "orthogonal", "direct"), (*TILES, TILES[2]), strict=True)),
)
def test_any_tiles_any_parts(
    monkeypatch: pytest.MonkeyPatch, method: str, tiles: tuple[int, int, int, int, bool]
) -> None:
    """What the launch configuration may choose elsewhere changes no mask and no gradient."""
    from lora_ortho.triton_kernels import launch_config as config

    m, n, count, chunk, hoist = tiles
    expand = config.Expand(m, n, count, chunk, hoist, 4, None)
    backward = config.Backward(m, n, chunk, count, 1 if hoist else 3, 4)
    monkeypatch.setattr(config, "expand", lambda *_: expand)
    monkeypatch.setattr(config, "grad_s", lambda *_: backward)
    monkeypatch.setattr(config, "grad_B", lambda *_: backward)
    ranks = (16, 16, 16) if hoist else (20, 32, 3, 17)
    value_checks.check(TRITON, Case(70, 20, 270, ranks), torch.bfloat16, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_call_is_the_op(method: str, dtype: torch.dtype) -> None:
    op_checks.check_prepared_call(TRITON, method, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(False)
    op_checks.check_ops("triton", dtype)


@pytest.mark.parametrize("method", METHODS)
def test_compiled_op(method: str) -> None:
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    op_checks.check_compiled_op("triton", method)
    torch._dynamo.reset()


def test_autocast_leaves_the_products_alone() -> None:
    """Under autocast to bfloat16, a bfloat16 call gives the bits it gives outside."""
    tensors: Any = make(same_rank(5, 12, 40, 2, 3), torch.bfloat16, factor_dtype=torch.float32)
    outside = run(fused_ortho_lora, tensors, seed=3, backend="triton")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(fused_ortho_lora, tensors, seed=3, backend="triton")
    assert torch.equal(outside.y, inside.y)
    assert all(torch.equal(a, b) for a, b in zip(outside.lora_A, inside.lora_A, strict=True))


def test_the_output_is_rounded_once() -> None:
    """1 + 2**-8 + 2**-17 lies just above the middle between two bfloat16 numbers; neither the sum
    of the last two nor that of the first two shows it once it is rounded."""
    ones = torch.ones(1, 1, dtype=torch.bfloat16)
    lora_B = [torch.full((20, 1), 2.0**e, dtype=torch.bfloat16) for e in (-8, -17)]
    y = fused_ortho_lora(
        ones, [ones, ones], lora_B, method="direct", base=ones.expand(1, 20), seed=0,
        backend="triton",
    )  # fmt: skip
    assert torch.equal(y, torch.full((1, 20), 1 + 2.0**-7, dtype=torch.bfloat16))
