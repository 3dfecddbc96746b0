"""The passes of one layer that are run again in a backward pass, with what they used at first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lora_ortho._torch_internals import is_custom_forward, settled
from lora_ortho.problem import Place

if TYPE_CHECKING:
    from lora_ortho.mixing import Settings

_MOST_OPEN = 1024  # passes of one layer: of functions that never run one again, no more are kept


class Passes:
    """Which settings and seed a call of one layer uses: those of the pass that it belongs to."""

    def __init__(self) -> None:
        self._open: dict[Settings, list[int | Tensor]] = {}  # those that only a backward can end

    def of_this(self, settings: Settings, drawn: int | Tensor) -> tuple[Settings, int | Tensor]:
        """Settings and seed of the pass that a call belongs to.

        Args:
            settings: of now.
            drawn: the seed that a first pass uses. It is drawn in any case, as torch's dropout does
                when a pass is run again.
        """
        current = (settings, drawn)
        used, told = settled(self, current)
        if used is None:
            return self._reopened(settings, drawn)
        if used is current and not told and is_custom_forward():
            if sum(map(len, self._open.values())) >= _MOST_OPEN:
                self._open.pop(next(iter(self._open)))
            self._open.setdefault(settings, []).append(drawn)
        return used

    def _reopened(self, settings: Settings, drawn: int | Tensor) -> tuple[Settings, int | Tensor]:
        """A call inside a backward pass, with no checkpoint of torch around it: the recomputation
        of another checkpoint, whose passes are told apart as far as their settings and seeds
        differ; or, where none is open, a pass of its own."""
        entries = [(key, seed) for key, seeds in self._open.items() for seed in seeds]
        if len(entries) > 1:
            others = [key for key in self._open if key != settings]
            same = [(key, seed) for key, seed in entries if key == settings and _equal(seed, drawn)]
            if others or not same:
                what = _difference(others[0], settings) if others else "the random seed"
                raise RuntimeError(
                    f"{what} changed between forward passes whose recomputations cannot be told "
                    "apart: use torch.utils.checkpoint, or one backward pass for each forward "
                    "pass; for a seed, a checkpoint that restores torch's generator"
                )
            entries = same
        if not entries:
            return settings, drawn
        key, seed = entries[0]
        seeds = self._open[key]
        del seeds[next(at for at, other in enumerate(seeds) if other is seed)]
        if not seeds:
            del self._open[key]
        return key, seed


def _equal(a: int | Tensor, b: int | Tensor) -> bool:
    return int(a) == int(b)


def _difference(before: Settings, now: Settings) -> str:
    """What was changed, in words."""
    parts = {
        "method": (before.mix.method, now.mix.method),
        "p": (before.mix.p, now.mix.p),
        "weights": (before.mix.rule.gains, now.mix.rule.gains),
        "seed": (before.seed, now.seed),
        **{name: (getattr(before.place, name), getattr(now.place, name)) for name in Place._fields},
        "backend": (before.backend, now.backend),
    }
    changed = [f"{name} ({a!r} to {b!r})" for name, (a, b) in parts.items() if a != b]
    return ", ".join(changed)
