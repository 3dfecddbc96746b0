"""What this package reads of torch that torch does not document, and why.

Which forward pass a call belongs to: activation checkpointing runs a layer again in the backward
pass, when a seed, a sample or a weight may have been set to something else. torch tells a module
nothing of that. Both kinds of ``torch.utils.checkpoint`` keep one object for a pass, in which what
was used can be kept: the frame of the saved-tensor hooks, and the context of ``CheckpointFunction``
(``use_reentrant=True``). Found by the names below, which tests hold to the installed torch.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, TypeVar

import torch
from torch.utils import checkpoint

T = TypeVar("T")

_PACK = "_checkpoint_hook.__init__.<locals>.pack_hook"
_UNPACK = "unpack_hook"
_ATTRIBUTE = "_lora_ortho_settings"  # of the object of a pass: what was used, by owner, in order
_FILE = checkpoint.__file__
_FUNCTION = checkpoint.CheckpointFunction


def is_recomputing() -> bool:
    """True inside a backward pass (0.1 us): a forward call there runs again."""
    return torch._C._current_graph_task_id() != -1


def may_be_run_again() -> bool:
    """False where no gradient can come to depend on a call: under no_grad or inference_mode.

    A custom autograd function, as a reentrant checkpoint is, runs its forward without gradients
    too; it is told by forward-mode differentiation, which it switches off and no_grad does not.
    """
    if torch.is_grad_enabled():
        return True
    return not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()


def settled(owner: object, current: T) -> T | None:
    """What the call of a layer was made with in the pass that it belongs to.

    Args:
        owner: the layer, or what stands for it.
        current: what a first pass uses; it is kept for when the pass is run again.
    Returns:
        ``current`` in a first pass, what was kept in one that is run again, and None where it
        cannot be told which pass is run again.
    """
    if is_recomputing():
        found = _pass_run_again()
        past = None if found is None else getattr(found, _ATTRIBUTE, {}).get(owner)
        return None if past is None else past.again()
    found = _first_pass()
    if found is not None:
        used = getattr(found, _ATTRIBUTE, None)
        if used is None:
            used = {}
            setattr(found, _ATTRIBUTE, used)
        used.setdefault(owner, _Past()).calls.append(current)
    return current


class _Past:
    """What the calls of a layer used in one pass, in their order."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self._task, self._next = -1, 0

    def again(self) -> Any:
        """What the next call of the present backward pass used the first time."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task, self._next = task, 0
        self._next += 1
        return self.calls[min(self._next, len(self.calls)) - 1]


def _first_pass() -> Any:
    """The object of the checkpoint whose first pass this is; None where none is seen."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    pack = hooks[0] if hooks else None
    if getattr(pack, "__qualname__", "") == _PACK and pack.__code__.co_filename == _FILE:
        cells: Any = pack.__closure__
        return cells[pack.__code__.co_freevars.index("frame")].cell_contents
    if torch.is_grad_enabled() or not may_be_run_again():
        return None
    frame = _frame_of((_FUNCTION.forward.__code__,))
    return None if frame is None else frame.f_locals.get("ctx")


def _pass_run_again() -> Any:
    """The object of the checkpoint that runs its pass again; None where none is seen."""
    frame = _frame_of((_FUNCTION.backward.__code__,), _UNPACK)
    if frame is None:
        return None
    return frame.f_locals.get("ctx" if frame.f_code is _FUNCTION.backward.__code__ else "frame")


def _frame_of(codes: tuple[Any, ...], name: str | None = None) -> FrameType | None:
    """The innermost running frame of one of these codes, or of that name in torch's checkpoint.py
    (about 50 ns a frame)."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code in codes or (code.co_name == name and code.co_filename == _FILE):
            return frame
        frame = frame.f_back
    return None
