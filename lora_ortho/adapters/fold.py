"""One layer's adapters folded into one: merges that are weights, on low-rank factors.

A merge whose masks differ from token to token is not a weight. These are: the direct merge, which
is a concatenation; `ortho_rows`, which draws one mask for all tokens, so that an output feature
belongs to one adapter; and `element_disjoint`, where an element of the weight does. The first two
stay factors of rank Σ r_j and never form a matrix (d_out, d_in).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_ortho import mask_stream
from lora_ortho.mask_stream import ROW_LIMIT, check_in_range
from lora_ortho.module import Adapter
from lora_ortho.problem import Place, Rule, check_factors, finite_numbers

METHODS = ("direct", "ortho_rows")
# Extra directions and passes of the randomised SVD (Halko, Martinsson, Tropp 2011, section 4.5).
_OVERSAMPLING = 16
_PASSES = 4


def fold(
    method: str, adapters: Sequence[Adapter], *, seed: int = 0, stream: int = 0, sample: int = 0
) -> Adapter:
    """`direct` or `ortho_rows` by name; the draw's coordinates do not matter to the first.

    Raises:
        ValueError: a method that is not a weight, with those that are.
    """
    if method == "direct":
        return direct(adapters)
    if method == "ortho_rows":
        return ortho_rows(adapters, seed=seed, stream=stream, sample=sample)
    if method in ("orthogonal", "dropout"):
        raise ValueError(
            f"method {method!r} draws new masks for every token, so it is no weight that could be "
            f'saved; use "ortho_rows", which draws one mask for all tokens, or "direct", its mean, '
            f"or run it with attach or inject"
        )
    raise ValueError(f'method must be "direct" or "ortho_rows", got {method!r}')


def direct(adapters: Sequence[Adapter]) -> Adapter:
    """Σ_j w_j s_j (B_j A_j x + bias_j) as one adapter of rank Σ r_j: the factors side by side.

    Args:
        adapters: of one layer; their scaling and weight count, p does not.
    Returns:
        lora_A (Σ r, d_in) and lora_B (d_out, Σ r) in float32 (float64 where a factor has it), with
        scaling and weight in lora_B; a bias where an adapter has one.
    Raises:
        TypeError, ValueError: adapters that do not fit one another.
    """
    gains = _gains(adapters, _rule(adapters, "direct"))
    B = adapters[0].lora_B
    rows = [B.new_full(B.shape[:1], gain, dtype=torch.float64) for gain in gains]
    return _concatenate(adapters, rows)


def ortho_rows(
    adapters: Sequence[Adapter], *, seed: int, stream: int = 0, sample: int = 0
) -> Adapter:
    """Σ_j gain_j diag(m_j) (B_j A_j x + bias_j), the masks of row 0 for every token.

    What the orthogonal method adds to the token in row 0, as a weight. Each row of lora_B has
    values in the columns of at most one adapter.

    Args:
        adapters: of one layer; p None is 1 - 1/K.
        seed, stream, sample: coordinates of the draw, see `mask_stream.draws`.
    Returns:
        As for `direct`, with gain and mask in lora_B.
    Raises:
        TypeError, ValueError: adapters that do not fit one another, Σ(1 - p) > 1.
    """
    rule = _rule(adapters, "orthogonal")
    cols = range(adapters[0].lora_B.shape[0])
    owner = mask_stream.winners(
        seed, range(1), cols, rates(adapters), stream=stream, sample=sample
    )[0]
    gains = _gains(adapters, rule)
    device = adapters[0].lora_B.device
    rows = [gain * (owner == j).to(device).double() for j, gain in enumerate(gains)]
    return _concatenate(adapters, rows)


def element_disjoint(
    adapters: Sequence[Adapter], *, seed: int, stream: int = 0, sample: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Σ_j gain_j M_j ⊙ [B_j A_j, bias_j]: every element of the weight belongs to one adapter.

    Row o of the draw is output feature o, column i input feature i; the bias is column d_in. Not of
    low rank.

    Returns:
        The difference of the weight (d_out, d_in), and that of the bias (d_out,) where an adapter
        has one, in float32 (float64 where a factor has it).
    Raises:
        TypeError, ValueError: as for `ortho_rows`.
    """
    rule = _rule(adapters, "orthogonal")
    d_out, d_in = adapters[0].lora_B.shape[0], adapters[0].lora_A.shape[1]
    Place(stream, sample).checked(d_out, d_in + 1)
    dtype, device = _wide(adapters), adapters[0].lora_B.device
    joined = torch.zeros(d_out, d_in + 1, dtype=dtype, device=device)
    owner = mask_stream.winners(
        seed, range(d_out), range(d_in + 1), rates(adapters), stream=stream, sample=sample
    ).to(device)
    for j, (gain, adapter) in enumerate(zip(_gains(adapters, rule), adapters, strict=True)):
        delta = joined.new_zeros(d_out, d_in + 1)
        delta[:, :-1] = adapter.lora_B.to(dtype) @ adapter.lora_A.to(dtype)
        if adapter.bias is not None:
            delta[:, -1] = adapter.bias
        joined += torch.where(owner == j, gain * delta, 0)
    has_bias = any(adapter.bias is not None for adapter in adapters)
    return joined[:, :-1].contiguous(), joined[:, -1].contiguous() if has_bias else None


def reduce_rank(adapter: Adapter, rank: int) -> tuple[Adapter, float]:
    """The best adapter of a given rank, in the sense of the Frobenius norm of B A.

    The factors give the singular values exactly through their QR decompositions and one SVD of
    (r, r), which costs less than a randomised SVD of (d_out, d_in) and has no error of its own.

    Args:
        adapter: its scaling and weight are left as they are, and so is its bias.
        rank: at least 1; an adapter of that rank or less is returned as it is.
    Returns:
        The adapter, and the relative error ‖B A - B' A'‖ / ‖B A‖ in the Frobenius norm.
    """
    check_in_range("rank", rank, ROW_LIMIT)
    if rank == 0:
        raise ValueError("rank must be at least 1, got 0")
    if rank >= adapter.lora_A.shape[0]:
        return adapter, 0.0
    left, core_B = torch.linalg.qr(adapter.lora_B.detach().double())
    right, core_A = torch.linalg.qr(adapter.lora_A.detach().double().T)
    u, sizes, vh = torch.linalg.svd(core_B @ core_A.T, full_matrices=False)
    total, lost = (float(part.square().sum().sqrt()) for part in (sizes, sizes[rank:]))
    lora_A, lora_B = _balanced(left @ u[:, :rank], sizes[:rank], vh[:rank] @ right.T)
    return _like(adapter, lora_A, lora_B), lost / total if total else 0.0


def low_rank(delta: Tensor, rank: int, *, seed: int = 0) -> tuple[Tensor, Tensor, float]:
    """Factors of a dense (d_out, d_in) difference by randomised SVD (Halko et al. 2011).

    Args:
        delta: floating point.
        rank: at least 1; at most min(d_out, d_in) is used.
        seed: of the random directions; the same seed gives the same factors.
    Returns:
        lora_A (r, d_in), lora_B (d_out, r) in the dtype of delta, and the relative error
        ‖delta - B A‖ / ‖delta‖ in the Frobenius norm, measured.
    """
    if not isinstance(delta, Tensor) or not delta.dtype.is_floating_point or delta.dim() != 2:
        raise TypeError("delta must be a floating point tensor (d_out, d_in)")
    check_in_range("rank", rank, ROW_LIMIT)
    if rank == 0:
        raise ValueError("rank must be at least 1, got 0")
    wide = delta.detach().double()
    rank = min(rank, *wide.shape)
    directions = min(rank + _OVERSAMPLING, *wide.shape)
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(wide.shape[1], directions, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(wide @ probe.to(wide.device))[0]
    for _ in range(_PASSES):
        basis = torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ basis)[0])[0]
    u, sizes, vh = torch.linalg.svd(basis.T @ wide, full_matrices=False)
    lora_A, lora_B = _balanced(basis @ u[:, :rank], sizes[:rank], vh[:rank])
    size = float(wide.norm())
    error = float((wide - lora_B @ lora_A).norm()) / size if size else 0.0
    return lora_A.to(delta.dtype), lora_B.to(delta.dtype), error


def rates(adapters: Sequence[Adapter]) -> list[float]:
    """The dropout rates of a layer's K adapters; None among them is 1 - 1/K."""
    return [1.0 - 1.0 / len(adapters) if a.p is None else float(a.p) for a in adapters]


def check(method: str, adapters: Sequence[Adapter]) -> None:
    """Raise whatever a fold of these adapters by a method would; "element_disjoint" is one too."""
    _gains(adapters, _rule(adapters, "direct" if method == "direct" else "orthogonal"))


def is_off(adapter: Adapter) -> bool:
    """True for an adapter of weight 0."""
    return adapter.weight == 0


def _rule(adapters: Sequence[Adapter], method: str) -> Rule:
    for j, adapter in enumerate(adapters):
        if not isinstance(adapter, Adapter):
            raise TypeError(f"adapters[{j}] must be an Adapter, got {type(adapter).__name__}")
    if not adapters:
        raise ValueError("adapters must hold at least one Adapter, got none")
    check_factors([a.lora_A for a in adapters], [a.lora_B for a in adapters])
    return Rule.make(len(adapters), rates(adapters), [a.scaling for a in adapters], method)


def _gains(adapters: Sequence[Adapter], rule: Rule) -> list[float]:
    weights = finite_numbers("weights", [a.weight for a in adapters], len(adapters))
    return [weight * gain for weight, gain in zip(weights, rule.gains, strict=True)]


def _wide(adapters: Sequence[Adapter]) -> torch.dtype:
    """What holds gain times factor without a loss that matters."""
    factors = [t for a in adapters for t in (a.lora_A, a.lora_B)]
    return torch.float64 if any(t.dtype == torch.float64 for t in factors) else torch.float32


def _concatenate(adapters: Sequence[Adapter], rows: Sequence[Tensor]) -> Adapter:
    """One adapter of all: float64 rows[j] (d_out,) times the rows of lora_B_j and the bias."""
    dtype = _wide(adapters)
    lora_A = torch.cat([a.lora_A.detach().to(dtype) for a in adapters])
    pairs = list(zip(rows, adapters, strict=True))
    lora_B = torch.cat([(row[:, None] * a.lora_B.detach()).to(dtype) for row, a in pairs], dim=1)
    biases = [row * a.bias.detach() for row, a in pairs if a.bias is not None]
    bias = torch.stack(biases).sum(dim=0).to(dtype) if biases else None
    names = [a.name for a in adapters if a.name is not None]
    return Adapter(lora_A, lora_B, bias=bias, name="+".join(names) or None)


def _balanced(left: Tensor, sizes: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B of left diag(sizes) right, the singular values shared evenly."""
    root = sizes.sqrt()
    return root[:, None] * right, left * root


def _like(adapter: Adapter, lora_A: Tensor, lora_B: Tensor) -> Adapter:
    dtype_A, dtype_B = adapter.lora_A.dtype, adapter.lora_B.dtype
    return Adapter(
        lora_A.to(dtype_A).contiguous(),
        lora_B.to(dtype_B).contiguous(),
        scaling=adapter.scaling,
        weight=adapter.weight,
        p=adapter.p,
        bias=adapter.bias,
        name=adapter.name,
    )
