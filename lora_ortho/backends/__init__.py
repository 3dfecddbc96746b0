"""Backends: who can serve a problem, and why not.

A backend is a module with ``unavailable() -> str | None`` (why it cannot work on this
machine), ``supports(problem) -> str | None`` (why it cannot serve one problem), ``pack``,
``forward`` and ``backward``; see :mod:`lora_ortho.backends.reference` for their meaning.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from lora_ortho.backends import cpu, cuda, reference, triton

if TYPE_CHECKING:
    from lora_ortho.problem import Problem

_BY_NAME: dict[str, ModuleType] = {
    "reference": reference,
    "cpu": cpu,
    "triton": triton,
    "cuda": cuda,
}
NAMES = tuple(_BY_NAME)
# What backend=None tries for a type of device, best first. "reference" serves every problem.
# Triton's interpreter serves CPU tensors only where it is named.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}


def available() -> dict[str, str | None]:
    """Every backend by name: None where it works on this machine, else the reason why not."""
    return {name: backend.unavailable() for name, backend in _BY_NAME.items()}


def check_name(backend: str | None) -> None:
    """Raise ValueError unless ``backend`` is None or the name of a backend."""
    if backend is not None and backend not in NAMES:
        raise ValueError(f"backend must be None or one of {', '.join(NAMES)}, got {backend!r}")


def get(name: str) -> ModuleType:
    """The backend of a name that :func:`choose` gave."""
    return _BY_NAME[name]


def decline(name: str, problem: Problem) -> str | None:
    """Why a backend cannot serve a problem; None where it can."""
    reason: str | None = get(name).unavailable() or get(name).supports(problem)
    return reason


def choose(backend: str | None, problem: Problem) -> str:
    """The name of the backend that serves a problem.

    Args:
        backend: None for the best that can, or a name that must serve it.
    Raises:
        ValueError: ``backend`` is not a name, or the named backend declines, with its reason.
    """
    check_name(backend)
    if backend is None:
        names = _PREFERENCE.get(problem.device, ("reference",))
        return next(name for name in names if decline(name, problem) is None)
    reason = decline(backend, problem)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot serve this call: {reason}")
    return backend
