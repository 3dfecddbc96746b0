"""Backends: who can serve a problem, and why not.

A backend is a file of this folder, or whatever is given to :func:`register`, that has the names of
:class:`lora_ortho.backends.base.Backend`.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from lora_ortho.backends.base import Backend
from lora_ortho.problem import Problem

_registered: dict[str, Backend[Any]] = {}
_ranked: tuple[Backend[Any], ...] = ()  # the highest preference first


def available() -> dict[str, str | None]:
    """Every backend by name: None where it works on this machine, else the reason why not."""
    return {name: backend.unavailable() for name, backend in _registered.items()}


def register(backend: Backend[Any]) -> None:
    """Adds a backend, which then serves every function and module of this package.

    Args:
        backend: a module or an object with the names of ``lora_ortho.backends.base.Backend``.
            ``backend=None`` takes it where its ``devices`` and ``preference`` say so.
    Raises:
        TypeError: it lacks one of the names, or its name or preference is of no use.
        ValueError: another backend of its name is registered.
    """
    words = [word for word in vars(Backend) if not word.startswith("_")]
    missing = [word for word in words if not hasattr(backend, word)]
    if missing:
        raise TypeError(f"backend must have {', '.join(words)}; it lacks {', '.join(missing)}")
    if not isinstance(backend.name, str) or not backend.name.isidentifier():
        raise TypeError(f"backend must have a word as its name, got {backend.name!r}")
    if not isinstance(backend.preference, int):
        raise TypeError(f"backend must have an int as its preference, got {backend.preference!r}")
    if backend.name in _registered:
        raise ValueError(f"backend must have a new name, got {backend.name!r}, which is registered")
    _registered[backend.name] = backend
    _rank()


def unregister(name: str) -> None:
    """Takes a backend out again; ValueError where there is none of that name."""
    if name not in _registered:
        raise ValueError(f"name must be one of {', '.join(names())}, got {name!r}")
    del _registered[name]
    _rank()


def names() -> tuple[str, ...]:
    """The names that ``backend=`` takes."""
    return tuple(_registered)


def preferred(device: str) -> list[str]:
    """The names that ``backend=None`` tries for a type of device, in that order."""
    return [b.name for b in _ranked if b.devices is None or device in b.devices]


def check_name(backend: str | None) -> None:
    """Raise ValueError unless ``backend`` is None or the name of a backend."""
    if backend is not None and backend not in names():
        raise ValueError(f"backend must be None or one of {', '.join(names())}, got {backend!r}")


def get(name: str) -> Backend[Any]:
    """The backend of a name that :func:`choose` gave."""
    return _registered[name]


def decline(name: str, problem: Problem) -> str | None:
    """Why a backend cannot serve a problem; None where it can."""
    backend = _registered[name]
    return backend.unavailable() or backend.supports(problem)


def choose(backend: str | None, problem: Problem) -> str:
    """The name of the backend that serves a problem.

    Args:
        backend: None for the best that can, or a name that must serve it.
    Raises:
        ValueError: ``backend`` is not a name, or the named backend declines, with its reason.
    """
    check_name(backend)
    if backend is None:
        return next(name for name in preferred(problem.device) if decline(name, problem) is None)
    reason = decline(backend, problem)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot serve this call: {reason}")
    return backend


def _rank() -> None:
    global _ranked
    _ranked = tuple(sorted(_registered.values(), key=lambda backend: -backend.preference))


def _find() -> None:
    """Registers every backend that is a file of this folder: by device, the best of each first."""
    files = [
        importlib.import_module(f"{__name__}.{f.name}") for f in pkgutil.iter_modules(__path__)
    ]
    found: list[Any] = [file for file in files if hasattr(file, "preference")]
    for backend in sorted(found, key=lambda backend: (backend.devices or (), -backend.preference)):
        register(backend)


_find()
