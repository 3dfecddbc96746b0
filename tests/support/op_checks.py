"""The op prepared, watched by torch and compiled, against itself in eager."""

from __future__ import annotations

import torch
from cases import make, same_rank
from numerics import run
from servers import Server

from lora_ortho import fused_ortho_lora
from lora_ortho.call import Constants
from lora_ortho.packing import PackedAdapters
from lora_ortho.problem import Draw, Place, Rule

CASE = same_rank(10, 12, 34, 3, 4)


def check_prepared_call(server: Server, method: str, dtype: torch.dtype) -> None:
    tensors = make(CASE, dtype)
    rule = Rule.make(3, [0.7, 0.8, 0.9], [0.5, 1.0, 2.0], method)
    prepared = PackedAdapters(
        *tensors[1:3], dtype, rule=rule, weights=[1.0, -1.0, 0.5], backend=server.backend
    )
    expected = fused_ortho_lora(
        *tensors[:3], p=[0.7, 0.8, 0.9], scaling=[0.5, 1.0, 2.0], weights=[1.0, -1.0, 0.5],
        method=method, base=tensors.base, seed=-5, stream=1, sample=2, strata=3, row_offset=4,
        col_offset=5, backend=server.backend,
    )  # fmt: skip
    place = Place(1, 2, 3, 4, 5)
    assert torch.equal(prepared.apply(tensors.x, tensors.base, -5, place), expected)
    seed = torch.tensor(-5)
    out = torch.empty_like(expected)
    assert prepared.apply(tensors.x, tensors.base, seed, place, out) is out
    assert torch.equal(out, expected)
    in_place = tensors.base.clone()
    assert prepared.apply(tensors.x, in_place, seed, place, in_place) is in_place
    assert torch.equal(in_place, expected)


def check_ops(backend: str, dtype: torch.dtype) -> None:
    """Schema, fakes, autograd registration and dynamic shapes, of both ops."""
    x, lora_A, lora_B, _, base, grad = make(CASE, dtype)
    gains = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    inputs = (x, lora_A, lora_B, gains, torch.tensor(5))
    intervals = ((0, 19999), (20000, 39999), (40000, 59999))
    constants = Constants(Draw.SHARED, intervals, Place(1, 2, 3, 4, 5), backend, False).flat()
    forward, backward = torch.ops.lora_ortho.forward.default, torch.ops.lora_ortho.backward.default
    for base_or_none, coordinates in ((base, None), (None, torch.tensor([1, 2, 3, 4, 5]))):
        torch.library.opcheck(forward, (*inputs, coordinates, base_or_none, *constants))
    s = x @ torch.cat(lora_A).T
    for needs in [(True,) * 4, (True, False, False, False), (False, True, True, False)]:
        torch.library.opcheck(backward, (*inputs, None, grad, s, *constants, *needs))


def check_compiled_op(backend: str, method: str) -> None:
    """fullgraph, forward and backward, bits as in eager; another seed is another draw."""
    tensors = make(CASE, torch.float32)
    compiled = torch.compile(fused_ortho_lora, fullgraph=True, backend="aot_eager")
    for seed in (5, 6, torch.tensor(7), torch.tensor(8)):
        arguments = {"p": [0.7, 0.8, 0.9], "scaling": [2.0, 1.0, 0.5], "method": method}
        arguments |= {"seed": seed, "stream": 3, "backend": backend}
        eager = run(fused_ortho_lora, tensors, **arguments)
        found = run(compiled, tensors, **arguments)
        assert torch.equal(found.y, eager.y)
        assert torch.equal(found.x, eager.x)
        assert torch.equal(found.weights, eager.weights)
        assert all(torch.equal(a, b) for a, b in zip(found.lora_B, eager.lora_B, strict=True))
