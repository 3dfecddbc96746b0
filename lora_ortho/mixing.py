"""How the adapters of one layer are mixed, and the short and the long way to the kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_ortho import backends, mask_stream, packing
from lora_ortho._torch_internals import all_plain, may_be_run_again
from lora_ortho.call import Call
from lora_ortho.gains import constants, gain_dtype
from lora_ortho.op import merge
from lora_ortho.packing import PackedAdapters
from lora_ortho.problem import Place, Rule, check_method
from lora_ortho.recomputation import Passes


@dataclass(frozen=True)
class Mix:
    """How K adapters are mixed; those of weight 0 are off.

    Attributes:
        method: "orthogonal", "dropout" or "direct".
        members: indices of the adapters that take part. Under the dropout method all do, where any
            does: masks are independent there, and each keeps its lane set.
        p: dropout rates of the members.
        rule: of the members; its gains include the merge weights.
    """

    method: str
    members: tuple[int, ...]
    p: tuple[float, ...]
    rule: Rule

    @staticmethod
    def make(
        method: str,
        p: Sequence[float | None],
        scaling: Sequence[float],
        weights: Sequence[float],
        keep_zero_weights: bool = False,
    ) -> Mix:
        """Check the constants of K adapters and work out what follows from them.

        Args:
            p: dropout rates; None is 1 - 1/K among the K adapters whose weight is not 0.
            scaling, weights: finite numbers.
            keep_zero_weights: count adapters of weight 0 too, which then own their share of the
                elements.
        Raises:
            TypeError, ValueError: as for ``fused_ortho_lora``.
        """
        check_method(method)
        key = (method, tuple(p), tuple(scaling), tuple(weights), keep_zero_weights)
        return (_mix if torch.compiler.is_compiling() else _remembered_mix)(*key)


def _mix(
    method: str,
    p: tuple[float | None, ...],
    scaling: tuple[float, ...],
    weights: tuple[float, ...],
    keep_zero_weights: bool,
) -> Mix:
    mask_stream.rates([q for q in p if q is not None])
    on = [j for j, weight in enumerate(weights) if keep_zero_weights or weight != 0.0]
    if not on:
        return Mix(method, (), (), Rule.make(1, None, None, method))
    default = mask_stream.default_rates(len(on))[0]
    members = tuple(range(len(p)) if method == "dropout" else on)
    rates = tuple(default if p[j] is None else float(p[j]) for j in members)  # type: ignore[arg-type]
    rule = Rule.make(len(members), rates, [scaling[j] for j in members], method)
    return Mix(method, members, rates, rule.weighted([weights[j] for j in members]))


_remembered_mix = functools.lru_cache(maxsize=4096)(_mix)


class Choice(NamedTuple):
    """What a user chose for K adapters, from which a :class:`Mix` follows."""

    method: str
    p: tuple[float | None, ...]
    scaling: tuple[float, ...]
    weights: tuple[float, ...]
    keep_zero_weights: bool

    def mix(self) -> Mix:
        """See :meth:`Mix.make`."""
        return Mix.make(*self)


class Settings(NamedTuple):
    """What one forward pass of a layer uses besides its tensors.

    Attributes:
        seed: None for a fresh one at every forward.
    """

    mix: Mix
    seed: int | None
    place: Place
    backend: str | None

    def checked(self, d_out: int) -> Settings:
        """These settings, with integers of other kinds as Python's.

        Raises:
            TypeError, ValueError: by the name of the one that does not fit.
        """
        seed = None if self.seed is None else mask_stream.check_seed(self.seed)
        if isinstance(seed, Tensor):
            raise TypeError("seed must be an int or None, got a tensor")
        backends.check_name(self.backend)
        return Settings(self.mix, seed, self.place.checked(0, d_out), self.backend)


class Traced:
    """A layer's settings for torch.compile: in tensors, on whose values it does not guard.

    Made anew at every change, never written over: a pass keeps what it used.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.members = settings.mix.members
        with torch.inference_mode(False), torch.no_grad():
            coordinates = torch.tensor(settings.place, dtype=torch.int64)
            self.call = Call(settings.mix.rule, Place(), settings.backend, coordinates)
            self.gains = torch.tensor(
                settings.mix.rule.gains, dtype=gain_dtype(device.type), device=device
            )
            seed = settings.seed
            self.seed = None if seed is None else mask_stream.seed_tensor(seed, device)


class Mixer:
    """Adds the share of one layer's adapters to what its base gave; keeps what it packed for that.

    Args:
        biased: which of the adapters have a bias: then its lora_B has one column more, and x one
            feature, which is 1.
    """

    def __init__(self, biased: Sequence[bool]) -> None:
        self.biased = tuple(biased)
        self._kept: tuple[PackedAdapters, Mix, str | None, torch.dtype] | None = None
        self._passes = Passes()

    def add(
        self, x: Tensor, y: Tensor, tensors: Sequence[Tensor], settings: Settings, in_place: bool
    ) -> Tensor:
        """The adapters' share for x, added to y.

        Args:
            x: (..., d_in); y: (..., d_out).
            tensors: all K lora_A, all lora_B, then the biases that there are.
            settings: of now; a pass that is run again uses those of its first time.
            in_place: y belongs to nobody else and may be written over.
        """
        seed: int | Tensor | None = None
        if may_be_run_again():
            drawn: int | Tensor = _drawn(settings.seed, x) if settings.mix.members else 0
            settings, seed = self._passes.of_this(settings, drawn)
        mix = settings.mix
        if not mix.members:
            return y
        trained = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        recorded = trained or (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad))
        if not recorded and x.dtype is y.dtype and all_plain((x, y)):
            return self._apply_prepared(x, y, tensors, settings, seed, in_place)
        if self._kept is not None and trained:
            self._kept[0].expire()  # an optimiser may follow, whose work no counter shows
        seed = _drawn(settings.seed, x) if seed is None else seed
        call = Call(mix.rule, settings.place, settings.backend)
        return self._merge(call, x, y, tensors, mix.members, constants(mix.rule.gains, x), seed)

    def add_traced(
        self,
        x: Tensor,
        y: Tensor,
        tensors: Sequence[Tensor],
        traced: Traced,
        scaling: Tensor | None = None,
    ) -> Tensor:
        """:meth:`add` for torch.compile; a device that was not foreseen costs a copy.

        Args:
            scaling: one for each member, to multiply its gain by.
        """
        if not traced.members:
            return y
        gains = traced.gains if scaling is None else traced.gains * scaling
        gains = gains.to(x.device, gain_dtype(x.device.type))
        seed = _drawn(traced.seed, x)
        return self._merge(traced.call, x, y, tensors, traced.members, gains, seed)

    def refresh(self, tensors: Sequence[Tensor], settings: Settings) -> None:
        """Packs again, after a change that nothing shows."""
        if settings.mix.members:
            lora_A, lora_B = self._factors(tensors, settings.mix.members)
            packing.refresh(lora_A, lora_B)
            kept = self._kept
            if kept is not None and kept[1] is settings.mix:
                kept[0].pack(lora_A, lora_B, tensors)
            elif kept is not None:
                kept[0].expire()

    def _merge(
        self,
        call: Call,
        x: Tensor,
        y: Tensor,
        tensors: Sequence[Tensor],
        members: tuple[int, ...],
        gains: Tensor,
        seed: int | Tensor,
    ) -> Tensor:
        lora_A, lora_B = self._factors(tensors, members)
        x = x.to(y.dtype)
        x = _with_one(x) if self._grows(members) else x
        return merge(call, x, lora_A, lora_B, y, gains, seed)

    def _grows(self, members: tuple[int, ...]) -> bool:
        return any(self.biased) and any(self.biased[j] for j in members)

    def _factors(
        self, tensors: Sequence[Tensor], members: tuple[int, ...]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """lora_A and lora_B of the members, grown by a feature that is 1 where one has a bias."""
        count = len(self.biased)
        lora_A = [tensors[j] for j in members]
        lora_B = [tensors[count + j] for j in members]
        if not self._grows(members):
            return lora_A, lora_B
        lora_A = [nn.functional.pad(A, (0, 1)) for A in lora_A]
        for at, j in enumerate(members):
            if self.biased[j]:
                bias = tensors[2 * count + sum(self.biased[:j])]
                one = torch.zeros_like(lora_A[at][:1])
                one[:, -1] = 1
                lora_A[at] = torch.cat([lora_A[at], one])
                lora_B[at] = torch.cat([lora_B[at], bias[:, None]], dim=1)
        return lora_A, lora_B

    def _apply_prepared(
        self,
        x: Tensor,
        y: Tensor,
        tensors: Sequence[Tensor],
        settings: Settings,
        seed: int | Tensor | None,
        in_place: bool,
    ) -> Tensor:
        prepared = self._packed(y, tensors, settings)
        x = _with_one(x) if self._grows(settings.mix.members) else x
        seed = _drawn(settings.seed, x) if seed is None else seed
        own = in_place and y.is_contiguous()
        if y.dim() == 2:
            return prepared.apply(x, y, seed, settings.place, y if own else None)
        flat = y.reshape(-1, y.shape[-1])
        x = x.reshape(-1, x.shape[-1])
        return prepared.apply(x, flat, seed, settings.place, flat if own else None).view(y.shape)

    def _packed(self, y: Tensor, tensors: Sequence[Tensor], settings: Settings) -> PackedAdapters:
        """What is packed for these settings, tensors and dtype; on a GPU in the memory that it had,
        as long as nothing changed but values."""
        mix, backend, entry = settings.mix, settings.backend, self._kept
        kept = None
        if entry is not None and entry[1] is mix and entry[2:] == (backend, y.dtype):
            kept = entry[0]
        if kept is not None and kept.holds(tensors):
            return kept
        lora_A, lora_B = self._factors(tensors, mix.members)
        if kept is not None and kept.fits(lora_A, lora_B):
            kept.pack(lora_A, lora_B, tensors)
            return kept
        made = PackedAdapters(
            lora_A, lora_B, y.dtype, rule=mix.rule, backend=backend, sources=tensors
        )
        self._kept = (made, mix, backend, y.dtype)
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {"biased": self.biased, "_kept": None, "_passes": Passes()}


def checked_rates(p: Sequence[float | None] | None, count: int) -> tuple[float | None, ...]:
    """``count`` dropout rates, each None or in [0, 1); None stands for so many."""
    if p is None:
        return (None,) * count
    given = mask_stream.rates([0.0 if q is None else q for q in _sequence("p", p)])
    if len(given) != count:
        raise ValueError(f"p must hold {count} values, one for each adapter, got {len(given)}")
    return tuple(None if q is None else rate for q, rate in zip(p, given, strict=True))


def _sequence(name: str, values: Any) -> Any:
    if isinstance(values, (str, bytes, dict)) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name} must be a sequence of numbers, got {type(values).__name__}")
    return values


def _drawn(seed: int | Tensor | None, x: Tensor) -> int | Tensor:
    """The seed, or a fresh one from torch's generator of the device of x."""
    if seed is not None:
        return seed
    return torch.randint(-(1 << 63), (1 << 63) - 1, (), dtype=torch.int64, device=x.device)


def _with_one(x: Tensor) -> Tensor:
    """x with one more feature, which is 1."""
    return nn.functional.pad(x, (0, 1), value=1.0)
