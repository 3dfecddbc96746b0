"""The registry of merges: what each needs, gives and draws, for all that offer them by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from torch import Tensor

from lora_ortho.module import Adapter
from lora_ortho.problem import METHODS as KINDS_OF_MASKS

from .factors import rule_of

# Of a draw; a function that draws takes all of them.
COORDINATES = ("seed", "stream", "sample", "strata")
_PER_TOKEN = ("orthogonal", "dropout")

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Gives(str, Enum):
    """What a merge of one layer is."""

    FACTORS = "factors"  # an Adapter: no matrix (d_out, d_in) is formed
    WEIGHT = "weight"  # the differences of weight (d_out, d_in) and bias (d_out,) or None


@dataclass(frozen=True)
class Method:
    """A merge of the adapters of one layer.

    Attributes:
        name: by which export, the command line and the plug-ins offer it.
        function: takes the adapters, and by keyword the coordinates of the draw, if it draws, and
            its own parameters; it returns what `gives` says, with scaling, weight and mask in it.
        gives: factors, or a dense weight.
        masks: how its masks are drawn, as `mask_stream.thresholds` names it; "direct" where
            nothing is drawn. The adapters' dropout rates must admit it.
        needs: what it needs, in words.
        when: when to use it: a line that goes on after "when".
        source: where it was published, or that it is ours.
    """

    name: str
    function: Callable[..., Any]
    gives: Gives
    masks: str
    needs: str
    when: str
    source: str

    @property
    def draws(self) -> bool:
        """Whether the result depends on where in the mask stream it is drawn."""
        return self.masks != "direct"

    @property
    def parameters(self) -> dict[str, Any]:
        """Defaults of its own parameters, by name."""
        return {
            name: parameter.default
            for name, parameter in inspect.signature(self.function).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and name not in COORDINATES
        }

    def check(self, adapters: Sequence[Adapter], **parameters: Any) -> None:
        """Raises what a merge would: parameters that it does not have, adapters that do not fit
        one another, rates that its masks do not admit."""
        self._check_parameters(parameters)
        rule_of(adapters, self.masks)

    def factors(
        self,
        adapters: Sequence[Adapter],
        *,
        seed: int,
        stream: int,
        sample: int,
        strata: int = 1,
        **parameters: Any,
    ) -> Adapter:
        """The merge as one adapter of scaling 1; ValueError where it is a dense weight."""
        if self.gives is not Gives.FACTORS:
            raise ValueError(
                f"method {self.name!r} gives a dense weight, which no adapter holds; "
                f"lora_ortho.plugins.weights adds it to the weights of a base model"
            )
        merged: Adapter = self._call(adapters, (seed, stream, sample, strata), parameters)
        return merged

    def difference(
        self,
        adapters: Sequence[Adapter],
        *,
        seed: int,
        stream: int,
        sample: int,
        strata: int = 1,
        **parameters: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What the merge adds to weight (d_out, d_in) and bias (d_out,); None for no bias."""
        merged = self._call(adapters, (seed, stream, sample, strata), parameters)
        if self.gives is Gives.FACTORS:
            return merged.lora_B @ merged.lora_A, merged.bias
        weight, bias = merged
        return weight, bias

    def _call(
        self, adapters: Sequence[Adapter], draw: tuple[int, ...], parameters: dict[str, Any]
    ) -> Any:
        self._check_parameters(parameters)
        place = dict(zip(COORDINATES, draw, strict=True)) if self.draws else {}
        return self.function(adapters, **place, **parameters)

    def _check_parameters(self, given: Collection[str]) -> None:
        unknown = sorted(set(given) - set(self.parameters))
        if unknown:
            known = ", ".join(self.parameters) or "none"
            raise TypeError(f"method {self.name!r} has no parameter {unknown[0]!r}; it has {known}")


METHODS: dict[str, Method] = {}


def register(
    *,
    gives: Gives,
    when: str,
    source: str,
    masks: str = "direct",
    needs: str = "the adapters alone",
) -> Callable[[_Function], _Function]:
    """Registers a function under its own name; see `Method` for the arguments.

    Raises:
        TypeError: it takes something else than adapters, by keyword the coordinates if it draws,
            and by keyword its own parameters, each with a default.
        ValueError: a merge of that name is there, or it has none; masks that cannot be drawn.
    """
    if masks not in KINDS_OF_MASKS:
        raise ValueError(f"masks must be one of {', '.join(KINDS_OF_MASKS)}, got {masks!r}")

    def add(function: _Function) -> _Function:
        if not inspect.isfunction(function):
            raise TypeError(f"a merge must be a function, got {type(function).__name__}")
        name = function.__name__
        if not name.isidentifier() or name in _PER_TOKEN:
            raise ValueError(f"a merge must have a name of its own, got {name!r}")
        found = Method(name, function, Gives(gives), masks, needs, when, source)
        if name in METHODS:
            raise ValueError(f"a merge called {name!r} is registered already")
        takes, drawn = list(inspect.signature(function).parameters), COORDINATES * found.draws
        if takes[:1] != ["adapters"] or tuple(x for x in takes if x in COORDINATES) != drawn:
            wanted = ", ".join(["adapters", "*", *drawn])
            raise TypeError(f"{name} must take ({wanted}) and its parameters, got {takes}")
        own = found.parameters
        if inspect.Parameter.empty in own.values() or len(takes) != 1 + len(drawn) + len(own):
            raise TypeError(f"{name} must take its parameters by keyword, each with a default")
        METHODS[name] = found
        return function

    return add


def method_named(name: object) -> Method:
    """The merge of that name; the ValueError for any other lists them, and says where merges that
    are no weight are run."""
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    known = ", ".join(METHODS)
    if name in _PER_TOKEN:
        raise ValueError(
            f"method must be one of {known}, got {name!r}: it draws new masks for every token, so "
            f'it is no weight that could be saved; use "ortho_rows", which draws one mask for all '
            f'tokens, or "direct", its mean, or run it with attach or inject'
        )
    raise ValueError(f"method must be one of {known}, got {name!r}")
