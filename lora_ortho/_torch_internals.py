"""Everything of torch that this package reads and torch does not document, and what that is for.

Shortcuts (:func:`all_plain`, :func:`keep_signature`, :func:`child`) name the time that they save,
in microseconds of one thread of an x86-64 server, for three adapters on a layer of 64 features; the
op's kernel itself takes 9 there.

Which forward pass a call belongs to (:func:`settled`): activation checkpointing runs a layer again
in the backward pass, when a seed, a sample or a weight may have been set to something else. torch
tells a module nothing of that. Both kinds of ``torch.utils.checkpoint`` keep one object for a pass,
in which what was used can be kept: the frame of the saved-tensor hooks, and the context of
``CheckpointFunction`` (``use_reentrant=True``). Found by the names below, which tests hold to the
installed torch.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import checkpoint

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])

# torch.mm writes a wider dtype than it reads since 2.8, on GPUs.
WIDE_OUTPUT = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 8)
_PLAIN = (Tensor, torch.nn.Parameter)

_PACK = "_checkpoint_hook.__init__.<locals>.pack_hook"
_UNPACK, _CHECKPOINT = "unpack_hook", "checkpoint"
_ATTRIBUTE = "_lora_ortho_settings"  # of the object of a pass: what was used, by owner, in order
_FILE = checkpoint.__file__
_FORWARD = checkpoint.CheckpointFunction.forward.__code__
_BACKWARD = checkpoint.CheckpointFunction.backward.__code__


def all_plain(tensors: Sequence[Tensor]) -> bool:
    """True if nothing but the kernels needs to see a call: no tracing, modes or subclasses.

    Asking costs 1.3 us for six factors; the op through torch's dispatcher costs 7.5 us more.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or in_forward_mode()
    ):
        return False
    for tensor in tensors:
        if type(tensor) not in _PLAIN or tensor.is_neg() or tensor.is_meta:
            return False
    return True


def in_forward_mode() -> bool:
    """True inside forward-mode differentiation, where any tensor may have a tangent (0.04 us)."""
    return torch.autograd.forward_ad._current_level >= 0


def keep_signature(function: Callable[..., Any]) -> None:
    """torch asks for the signature of an autograd function's forward at every call: 0.8 us where
    it is kept, 9.6 us where it is worked out anew."""
    setattr(function, "__signature__", inspect.signature(function))  # noqa: B010


def constant_in_graphs(function: Function) -> Function:
    """Its result is a constant of what torch.compile makes, which does not follow the call.

    ``torch.compiler.assume_constant_result`` does the same, and imports torch's compiler: seconds.
    """
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010
    return function


def child(module: torch.nn.Module, name: str) -> Any:
    """``getattr(module, name)`` of a child module; 0.06 us in place of 0.54."""
    return module._modules[name]


def own_tensors(modules: torch.nn.ModuleList, trainable: bool) -> list[dict[str, Any]]:
    """The parameters, or the buffers, that each of these modules has itself; as dictionaries."""
    found = modules._modules.values()
    return [m._parameters if trainable else m._buffers for m in found]


def has_forward_hooks(module: torch.nn.Module) -> bool:
    """True if a hook sees the output of a module, its own or one for all modules."""
    return bool(module._forward_hooks or torch.nn.modules.module._global_forward_hooks)


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


def is_custom_forward() -> bool:
    """True inside the forward of an autograd function, where gradients may be asked for later."""
    return not torch.is_grad_enabled() and may_be_run_again()


def settled(owner: object, current: T) -> tuple[T | None, bool]:
    """What the call of a layer was made with in the pass that it belongs to.

    Args:
        owner: the layer, or what stands for it.
        current: what a first pass uses; every checkpoint of torch around the call keeps it for when
            its pass is run again.
    Returns:
        ``current`` in a first pass, what was kept in one that is run again, and None where that
        cannot be told; and whether a checkpoint of torch was seen.
    """
    again = is_recomputing()
    if not again and not is_custom_forward() and _top_hook() is None:
        return current, False
    firsts, rerun = _checkpoints_around()
    used: T | None = current
    if again:
        past = None if rerun is None else getattr(rerun, _ATTRIBUTE, {}).get(owner)
        used = None if past is None else past.again()
    if used is not None:
        for found in firsts:
            kept = getattr(found, _ATTRIBUTE, None)
            if kept is None:
                kept = {}
                setattr(found, _ATTRIBUTE, kept)
            kept.setdefault(owner, _Past()).calls.append(used)
    return used, bool(firsts) or rerun is not None


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


def _top_hook() -> Any:
    """The innermost pack hook for saved tensors; None where there is none (0.1 us)."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks[0] if hooks else None


def _checkpoints_around() -> tuple[list[Any], Any]:
    """The checkpoints of torch that run this call for the first time, the innermost first, and the
    one around them that runs its pass again, or None. Walks the stack: about 50 ns a frame."""
    firsts: list[Any] = []
    pack = _top_hook()  # of a checkpoint whose own function is on no stack: as a module's hooks
    if getattr(pack, "__qualname__", "") == _PACK and pack.__code__.co_filename == _FILE:
        firsts.append(pack.__closure__[pack.__code__.co_freevars.index("frame")].cell_contents)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code, found = frame.f_code, None
        if code is _FORWARD:
            found = frame.f_locals.get("ctx")
        elif code is _BACKWARD:
            return firsts, frame.f_locals.get("ctx")
        elif code.co_filename == _FILE and code.co_name == _UNPACK:
            return firsts, frame.f_locals.get("frame")
        elif code.co_filename == _FILE and code.co_name == _CHECKPOINT:
            generator = frame.f_locals.get("gen")
            inner = None if generator is None else generator.gi_frame
            found = None if inner is None else inner.f_locals.get("new_frame")
        if found is not None and all(found is not first for first in firsts):
            firsts.append(found)
        frame = frame.f_back
    return firsts, None
