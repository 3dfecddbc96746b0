"""Wrong arguments: the error names the argument, what it was and what it may be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import make, same_rank
from torch import nn

from lora_ortho import Adapter, FusedOrthoLoRALinear, backends, fused_ortho_lora
from lora_ortho.packing import PackedAdapters

T = make(same_rank(4, 8, 12, 3, 2), torch.float32)
VALUE, TYPE = ValueError, TypeError
TRAINED = torch.ones(3, requires_grad=True)
META = torch.empty(4, 8, device="meta")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        # rates, scalings, weights
        ({"p": [0.5] * 3}, VALUE, r"^p: .* got 1.5; .* smallest admissible rate for 3 .*0.6666"),
        ({"p": [0.5] * 2}, VALUE, "^p must hold 3 values, one for each adapter, got 2"),
        ({"p": 0.5}, TYPE, "^p must be a sequence of rates, got float"),
        ({"p": {"one": 0.5}}, TYPE, "^p must be a sequence of rates, got dict: give them in the"),
        ({"p": {0.5, 0.9, 0.8}}, TYPE, "^p must be a sequence of rates, got set: give them in the"),
        ({"p": ["0.9", 0.9, 0.9]}, TYPE, r"^p\[0\] must be a number, got '0.9'"),
        ({"p": [0.9, None, 0.9]}, TYPE, r"^p\[1\] must be a number, got None"),
        ({"p": [0.9, [0.9], 0.9]}, TYPE, r"^p\[1\] must be a number, got \[0.9\]"),
        ({"p": torch.ones(3, 2)}, TYPE, r"^p\[0\] must be a number, got tensor\(\[1., 1.\]\)"),
        ({"p": [0.9, 1.0, 0.9]}, VALUE, r"^p\[1\] must be a dropout rate in \[0, 1\), got 1.0"),
        ({"p": [0.9, -0.5, 0.9]}, VALUE, r"^p\[1\] must be .* got -0.5"),
        ({"scaling": [1.0]}, VALUE, "^scaling must hold 3 values, .* got 1"),
        ({"scaling": [1.0, 2.0, float("inf")]}, VALUE, r"^scaling\[2\] must be finite, got inf"),
        ({"scaling": 2.0}, TYPE, "^scaling must be a sequence of numbers, got float"),
        ({"scaling": {"one": 2.0}}, TYPE, "^scaling must be a sequence of numbers, got dict: give"),
        ({"weights": ["1", 1, 1]}, TYPE, r"^weights\[0\] must be a number, got '1'"),
        ({"weights": [1.0, float("nan"), 1.0]}, VALUE, r"^weights\[1\] must be finite, got nan"),
        ({"weights": [1.0] * 4}, VALUE, "^weights must hold 3 values, .* got 4"),
        ({"weights": torch.ones(2)}, VALUE, r"^weights must have shape \(3,\), got \(2,\)"),
        ({"weights": torch.ones(3).cfloat()}, TYPE, "^weights must be a floating .*complex64"),
        ({"weights": list(TRAINED)}, TYPE, "^weights must be numbers here, got a tensor that req"),
        ({"scaling": TRAINED}, TYPE, "^scaling must be numbers here, got a tensor that requires"),
        ({"weights": META[0, :3]}, VALUE, "^weights must be on the device of x, cpu, got meta"),
        ({"method": "mean"}, VALUE, "^method must be one of orthogonal, .* got 'mean'"),
        ({"method": ["direct"]}, VALUE, r"^method must be one of orthogonal, .* got \['direct'\]"),
        # tensors
        ({"x": torch.ones(4, 9)}, VALUE, r"^x has 9 features in shape \(4, 9\), but .* takes 8"),
        ({"x": torch.tensor(1.0)}, VALUE, r"^x must have shape \(..., d_in\), got a tensor w"),
        ({"x": torch.ones(4, 8).int()}, TYPE, "^x must be float32, .* got torch.int32"),
        ({"x": torch.ones(4, 8).cfloat()}, TYPE, "^x must be float32, .* got torch.complex64"),
        ({"x": [1.0]}, TYPE, "^x must be a tensor, got list"),
        ({"x": META}, VALUE, r"^lora_A\[0\] must be on the device of x, meta, got cpu"),
        ({"lora_A": T.lora_A[0]}, TYPE, "^lora_A must be a list of tensors, got Tensor"),
        ({"lora_A": []}, VALUE, "^lora_A must hold 1 to 255 tensors, got 0"),
        ({"lora_A": T.lora_A * 86, "lora_B": T.lora_B * 86}, VALUE, "1 to 255 .* got 258"),
        ({"lora_B": T.lora_B[:2]}, VALUE, "^lora_B must hold 3 values, .* got 2"),
        ({"lora_A": [*T.lora_A[:2], None]}, TYPE, r"^lora_A\[2\] must be a tensor, got None"),
        ({"lora_A": [*T.lora_A[:2], torch.ones(2, 7)]}, VALUE,
         r"^lora_A\[2\] must have 8 columns as lora_A\[0\] has, got shape \(2, 7\)"),
        ({"lora_B": [torch.ones(12, 3), *T.lora_B[1:]]}, VALUE,
         r"^lora_B\[0\] must have 2 columns, the rank of lora_A\[0\], got shape \(12, 3\)"),
        ({"lora_B": [*T.lora_B[:1], torch.ones(11, 2), T.lora_B[2]]}, VALUE,
         r"^lora_B\[1\] must have 12 rows as lora_B\[0\] has, got shape \(11, 2\)"),
        ({"lora_A": [torch.ones(0, 8), *T.lora_A[1:]]}, VALUE,
         r"^lora_A\[0\] must have shape \(r, d_in\) without zeros, got \(0, 8\)"),
        ({"lora_A": [torch.ones(8), *T.lora_A[1:]]}, VALUE,
         r"^lora_A\[0\] must have shape \(r, d_in\) without zeros, got \(8,\)"),
        ({"lora_B": [T.lora_B[0].to("meta"), *T.lora_B[1:]]}, VALUE,
         r"^lora_B\[0\] must be on the device of lora_A\[0\], cpu, got meta"),
        ({"lora_A": [T.lora_A[0], T.lora_A[1].to("meta"), T.lora_A[2]],
          "lora_B": [T.lora_B[0], T.lora_B[1].to("meta"), T.lora_B[2]]}, VALUE,
         r"^lora_A\[1\] must be on the device of lora_A\[0\], cpu, got meta"),
        ({"lora_B": [T.lora_B[0].int(), *T.lora_B[1:]]}, TYPE, r"^lora_B\[0\] must be float32"),
        ({"base": torch.ones(12)}, VALUE, r"^base must have shape \(4, 12\), got \(12,\)"),
        ({"base": torch.ones(4, 12).double()}, TYPE,
         "^base must have the dtype of x, torch.float32, got torch.float64"),
        ({"base": torch.ones(4, 12, device="meta")}, VALUE,
         "^base must be on the device of x, cpu, got meta"),
        # coordinates
        ({"seed": "7"}, TYPE, "^seed must be an int or an int64 tensor, got str"),
        ({"seed": 1 << 64}, VALUE, "^seed must fit in 64 bits, got 18446744073709551616"),
        ({"seed": torch.tensor(7, dtype=torch.int32)}, TYPE, "^seed must be an int64 tensor"),
        ({"seed": torch.zeros(2).long()}, VALUE, r"^seed must have one element, got .*\(2,\)"),
        ({"seed": torch.zeros(1, device="meta").long()}, VALUE, "^seed must be on the device"),
        ({"stream": -1}, VALUE, r"^stream must be in \[0, 2\*\*32\), got -1"),
        ({"sample": 1 << 24}, VALUE, r"^sample must be in \[0, 2\*\*24\), got 16777216"),
        ({"sample": 1.5}, TYPE, "^sample must be an int, got float"),
        ({"strata": 0}, VALUE, r"^strata must be in \[1, 65536\], got 0"),
        ({"strata": 65537}, VALUE, r"^strata must be in \[1, 65536\], got 65537"),
        ({"strata": 2.0}, TYPE, "^strata must be an int, got float"),
        ({"row_offset": (1 << 32) - 3}, VALUE,
         r"^row_offset must leave room for 4 tokens below 2\*\*32, got 4294967293"),
        ({"col_offset": (1 << 35) - 11}, VALUE,
         r"^col_offset must leave room for 12 features below 2\*\*35, got 34359738357"),
        ({"col_offset": -8}, VALUE, r"^col_offset must be in \[0, 2\*\*35\), got -8"),
        # backends
        ({"backend": "tpu"}, VALUE, "^backend must be None or one of .*, got 'tpu'"),
        ({"backend": "cuda"}, VALUE, "^backend 'cuda' cannot serve this call: .*(CUDA|GPU)"),
    ],
)  # fmt: skip
def test_op(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"x": T.x, "lora_A": T.lora_A, "lora_B": T.lora_B, "seed": 0, **arguments}
    with pytest.raises(error, match=message):
        fused_ortho_lora(**arguments)


def test_the_last_places_that_fit() -> None:
    """One less than the errors above is served."""
    for place in ({"row_offset": (1 << 32) - 4}, {"col_offset": (1 << 35) - 12}):
        assert fused_ortho_lora(*T[:3], seed=0, **place).shape == (4, 12)


def test_seed_is_required() -> None:
    with pytest.raises(TypeError, match="seed"):
        fused_ortho_lora(*T[:3])


_WITHOUT_EXTENSION = """
import sys
sys.modules["lora_ortho._C"] = None  # importing it fails, as where nothing was compiled
import torch
from cases import make, same_rank
from lora_ortho import backends, fused_ortho_lora
from lora_ortho.backends import cpu
tensors = make(same_rank(4, 8, 12, 3, 2), torch.float32)[:3]
print(backends.available()["cpu"])
print(cpu.instruction_sets())
try:
    fused_ortho_lora(*tensors, seed=0, backend="cpu")
except ValueError as error:
    print(error)
print(torch.equal(
    fused_ortho_lora(*tensors, seed=0), fused_ortho_lora(*tensors, seed=0, backend="reference")
))
"""


def test_the_package_without_its_extension() -> None:
    """It says so, a named backend does not fall back, and backend=None takes the reference."""
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_EXTENSION], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1] / "support")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reason, sets, refused, same = done.stdout.splitlines()
    assert reason.startswith("lora_ortho was installed without its compiled CPU kernels")
    assert sets == "[]"
    assert refused == f"backend 'cpu' cannot serve this call: {reason}"
    assert same == "True"


def test_available_names_every_backend() -> None:
    found = backends.available()
    assert list(found) == ["reference", "cpu", "triton", "cuda"]
    assert found["reference"] is None
    assert all(reason is None or len(reason) > 10 for reason in found.values())


A, B = T.lora_A[0], T.lora_B[0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lora_A": 3}, TYPE, "^lora_A must be a tensor, got int"),
        ({"lora_B": torch.ones(12, 5)}, VALUE, r"^lora_B must have 2 columns, the rank of lora_A"),
        ({"lora_A": A.T}, VALUE, r"^lora_A looks transposed: lora_A must have shape \(r, d_in\), "
         r"lora_B \(d_out, r\), got \(8, 2\) and \(12, 2\)"),
        ({"lora_B": B.T}, VALUE, r"^lora_B looks transposed: .* got \(2, 8\) and \(2, 12\)"),
        ({"lora_A": A.T, "lora_B": B.T}, VALUE, "^lora_A and lora_B look transposed"),
        ({"lora_A": A.int()}, TYPE, "^lora_A must be float32"),
        ({"bias": torch.ones(5)}, VALUE, r"^bias must have shape \(12,\), got \(5,\)"),
        ({"bias": 0.0}, TYPE, "^bias must be a tensor or None, got float"),
        ({"bias": torch.ones(12).int()}, TYPE, "^bias must be floating point, got torch.int32"),
        ({"bias": torch.ones(12, device="meta")}, VALUE, "^bias must be on the device of lora_B"),
    ],
)  # fmt: skip
def test_adapter(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Adapter(**{"lora_A": A, "lora_B": B, **arguments})


ONE = Adapter(A, B)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"base": nn.Linear(9, 12)}, VALUE, "^adapters must take 9 features to 12 .* got 8 to 12"),
        ({"base": nn.ReLU()}, TYPE, "^base must have an integer in_features, got ReLU without"),
        ({"base": torch.ones(3)}, TYPE, "^base must be a module, got Tensor"),
        ({"adapters": []}, VALUE, "^adapters must hold at least one Adapter, got none"),
        ({"adapters": ONE}, TYPE, "^adapters must be a list of Adapter, got Adapter"),
        ({"adapters": 3}, TYPE, "^adapters must be a list of Adapter, got int"),
        ({"adapters": [ONE, A]}, TYPE, r"^adapters\[1\] must be an Adapter, got Tensor"),
        ({"adapters": [Adapter(A, B, p=0.5)] * 3}, VALUE, "^p: .* smallest admissible rate"),
        ({"adapters": [Adapter(A, B, weight=float("nan"))]}, VALUE, r"^weights\[0\] must be fin"),
        ({"adapters": [Adapter(A, B, scaling=float("inf"))]}, VALUE, r"^scaling\[0\] must be fi"),
        ({"method": "mean"}, VALUE, "^method must be one of"),
        ({"seed": 1 << 70}, VALUE, "^seed must fit in 64 bits"),
        ({"seed": "x"}, TYPE, "^seed must be an int"),
        ({"stream": 1 << 32}, VALUE, r"^stream must be in \[0, 2\*\*32\)"),
        ({"backend": "tpu"}, VALUE, "^backend must be None or one of"),
    ],
)  # fmt: skip
def test_module(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FusedOrthoLoRALinear(**{"base": nn.Linear(8, 12), "adapters": [ONE], **arguments})


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("method", "mean", VALUE, "^method must be one of"),
        ("seed", 1 << 70, VALUE, "^seed must fit"),
        ("seed", 0.5, TYPE, "^seed must be an int"),
        ("stream", -1, VALUE, "^stream must be in"),
        ("sample", 1 << 24, VALUE, "^sample must be in"),
        ("weights", [1.0, 2.0], VALUE, "^weights must hold 1 values"),
        ("backend", "cuda", VALUE, "^backend 'cuda' cannot serve"),
    ],
)
def test_module_attributes(name: str, value: object, error: type[Exception], message: str) -> None:
    """What is set later is checked at the latest by the next call, on both of its ways."""
    for grad in (False, True):
        module = FusedOrthoLoRALinear(nn.Linear(8, 12), [ONE], seed=1)
        with torch.set_grad_enabled(grad):
            module(T.x)
            with pytest.raises(error, match=message):  # noqa: PT012
                setattr(module, name, value)
                module(T.x)


def test_prepared_calls() -> None:
    prepared = PackedAdapters(*T[1:3], torch.float32)
    for x, base, message in (
        (torch.ones(4, 7), None, r"^x must have shape \(tokens, 8\).* got \(4, 7\)"),
        (torch.ones(8), None, r"^x must have shape \(tokens, 8\).* got \(8,\)"),
        (T.x.double(), None, "^x must .* torch.float32, on cpu; got .* torch.float64"),
        (T.x, torch.ones(5, 12), r"^base must have shape \(tokens, 12\).* got \(5, 12\)"),
        (META, None, "^x must .* on cpu; got .* on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            prepared.apply(x, base, 0)
    with pytest.raises(ValueError, match=r"^out must have shape"):
        prepared.apply(T.x, None, 0, out=torch.ones(4, 13))
