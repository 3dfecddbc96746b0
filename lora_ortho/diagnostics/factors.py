"""One update c·B·A through small matrices, and the overlap of two subspaces.

With thin factorisations B = Q R and Aᵀ = P T, an update c·B·A of scaling c is Q C Pᵀ with the small
core C = c R Tᵀ: its norm, its column space and its angle to another update come from r × r
matrices. Nothing of size (d_out, d_in) is ever made. All of it is computed in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_ortho.module import Adapter


@dataclass(frozen=True)
class Factorisation:
    """One update c·B·A as Q C Pᵀ.

    Attributes:
        Q: (d_out, rank of B), orthonormal columns that span the columns of B.
        P: (d_in, rank of A), orthonormal columns that span the rows of A.
        C: the core; Q C Pᵀ is the update.
        outputs: (d_out, rank), an orthonormal basis of the columns of the update.
        inputs: (d_in, rank), one of its rows.
    """

    Q: Tensor
    P: Tensor
    C: Tensor
    outputs: Tensor
    inputs: Tensor

    @property
    def norm(self) -> float:
        """The Frobenius norm of the update."""
        return float(self.C.norm())


def _span(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Q with orthonormal columns that span those of a tall matrix, and R with matrix = Q R."""
    q, r = torch.linalg.qr(matrix)
    u, values, v = torch.linalg.svd(r, full_matrices=False)
    kept = values > _tolerance(values, matrix)
    return q @ u[:, kept], values[kept, None] * v[kept]


def _tolerance(values: Tensor, matrix: Tensor) -> float:
    """Singular values up to this are rounding."""
    largest = float(values.max()) if values.numel() else 0.0
    return largest * max(matrix.shape) * torch.finfo(torch.float64).eps


def factorise(adapter: Adapter) -> Factorisation:
    """An adapter's update in one layer, without its bias, merge weight and rate."""
    Q, R = _span(adapter.lora_B.double())
    P, T = _span(adapter.lora_A.double().T)
    C = adapter.scaling * R @ T.T
    if C.numel() == 0:  # a factor is zero
        return Factorisation(Q, P, C, Q[:, :0], P[:, :0])
    u, values, v = torch.linalg.svd(C, full_matrices=False)
    kept = values > _tolerance(values, C)
    return Factorisation(Q, P, C, Q @ u[:, kept], P @ v[kept].T)


def principal_cosines(first: Tensor, second: Tensor) -> list[float]:
    """Cosines of the principal angles between the spans of two orthonormal bases, largest first.

    As many as the smaller of the two dimensions; [1, …] where one space holds the other.
    """
    if not first.shape[1] or not second.shape[1]:
        return []
    return [min(float(c), 1.0) for c in torch.linalg.svdvals(first.T @ second)]


@dataclass(frozen=True)
class Overlap:
    """How much two subspaces share.

    Attributes:
        cosines: of the principal angles, largest first.
        share: mean squared cosine: 0 for orthogonal spaces, 1 where one holds the other.
        chance: its expectation between random subspaces of these dimensions.
    """

    cosines: tuple[float, ...]
    share: float
    chance: float

    @staticmethod
    def between(first: Tensor, second: Tensor) -> Overlap:
        """The overlap of the spans of two orthonormal bases (d, n) and (d, m)."""
        cosines = tuple(principal_cosines(first, second))
        if not cosines:
            return Overlap((), 0.0, 0.0)
        share = math.fsum(c * c for c in cosines) / len(cosines)
        return Overlap(cosines, share, max(first.shape[1], second.shape[1]) / first.shape[0])
