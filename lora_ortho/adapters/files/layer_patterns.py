"""Patterns of layer names from a stranger's file, matched as PEFT does in bounded time.

PEFT takes regular expressions (Python's `re`) that must match the end of a name, from its start or
after a dot; the first that does counts. Backtracking can take for ever on such a pattern. Here all
starts are followed at once, as bits of a number: an element of the pattern maps the set of places
where it may begin to the set where it may end. So there is nothing to go back to, and a match
costs at most (elements of the pattern) × (length of the name) steps.
"""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

_Value = TypeVar("_Value")
# Python's own parser of patterns, so that a pattern means here what it means there.
_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
MAX_PATTERN = 8192  # characters
MAX_STEPS = 4_000_000  # of all matches of one table; a step is a few hundred nanoseconds
_ANY = "\0"  # stands for any character in what `_plain` gives
_SPELLED: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": lambda character: character.isdecimal(),
    "CATEGORY_SPACE": lambda character: character.isspace(),
    "CATEGORY_WORD": lambda character: character.isalnum() or character == "_",
}


class PatternError(ValueError):
    """A pattern that is none, or that only backtracking could match; or a table of them that
    takes too many steps."""


class LayerPatterns(Generic[_Value]):
    """A table from patterns to values; of those that match a layer the first counts.

    Raises:
        PatternError: names the pattern.
    """

    def __init__(self, patterns: Mapping[str, _Value]) -> None:
        self._values = list(patterns.values())
        # Texts, by whether they stand for whole names, by their length, by where _ANY is.
        self._texts: dict[tuple[bool, int], dict[tuple[int, ...], dict[str, int]]] = {}
        self._others: list[tuple[int, str, Any]] = []
        self._steps = 0
        for index, pattern in enumerate(patterns):
            self._add(index, pattern, _parse(pattern))

    def _add(self, index: int, pattern: str, elements: list[Any]) -> None:
        whole = bool(elements) and str(elements[0][0]) == "AT" and _at(elements[0][1]) == "start"
        text = _plain(elements[1:] if whole else elements)
        if text is None:
            self._others.append((index, pattern, elements))
            return
        holes = tuple(place for place, character in enumerate(text) if character == _ANY)
        tables = self._texts.setdefault((whole, len(text)), {})
        tables.setdefault(holes, {}).setdefault(text, index)

    def find(self, layer: str) -> _Value | None:
        """The value of the first pattern that matches a layer's name; None where none does."""
        found = []
        for whole, start in [(True, 0), *((False, start) for start in _starts(layer))]:
            for holes, table in self._texts.get((whole, len(layer) - start), {}).items():
                self._count(1 + len(holes))
                index = table.get(_with_holes(layer[start:], holes))
                if index is not None:
                    found.append(index)
        best = min(found, default=len(self._values))
        for index, pattern, elements in self._others:
            if index < best and _Match(layer, self._count, pattern).matches(elements):
                best = index
                break
        return self._values[best] if best < len(self._values) else None

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise PatternError(f"patterns that take more than {MAX_STEPS} steps to match")


def _parse(pattern: str) -> list[Any]:
    """A pattern's elements; PatternError for one that is none or cannot be matched so."""
    if len(pattern) > MAX_PATTERN:
        raise PatternError(f"a pattern of {len(pattern)} characters is too long")
    try:
        with warnings.catch_warnings():  # about sets that may mean something else in the future
            warnings.simplefilter("ignore")
            tree = _parser.parse(pattern)
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        why = str(error) or "nested too deeply"
        shown = pattern if len(pattern) <= 80 else f"{pattern[:80]}…"
        raise PatternError(f"pattern {shown!r} is not a regular expression ({why})") from None
    if tree.state.flags & ~re.UNICODE:
        raise PatternError(f"pattern {pattern!r}: flags in a pattern are not supported")
    elements = list(tree)
    try:
        _check(pattern, elements)
    except RecursionError:
        raise PatternError(f"pattern {pattern[:80]!r}… is nested too deeply") from None
    return elements


def _check(pattern: str, elements: Iterable[Any]) -> None:
    for op, value in elements:
        kind = str(op)
        if kind not in _KINDS:
            what = kind.lower().replace("_", " ")
            raise PatternError(f"pattern {pattern!r}: a {what} is not supported")
        if kind == "SUBPATTERN" and (value[1] or value[2]):
            raise PatternError(f"pattern {pattern!r}: flags in a pattern are not supported")
        for inner in _inside(kind, value):
            _check(pattern, inner)


def _inside(kind: str, value: Any) -> list[Any]:
    """The sequences of elements within one."""
    if kind == "BRANCH":
        return list(value[1])
    if kind in ("SUBPATTERN", "MAX_REPEAT", "MIN_REPEAT", "ASSERT", "ASSERT_NOT"):
        return [value[-1]]
    return []


def _plain(elements: Iterable[Any]) -> str | None:
    """The one text that a pattern matches, with _ANY for any character; None for other patterns."""
    text = []
    for op, value in elements:
        kind = str(op)
        if kind == "LITERAL" and value:
            text.append(chr(value))
        elif kind == "ANY":
            text.append(_ANY)
        else:
            return None
    return "".join(text)


def _with_holes(text: str, holes: tuple[int, ...]) -> str:
    if not holes:
        return text
    characters = list(text)
    for place in holes:
        characters[place] = _ANY if characters[place] != "\n" else "\n"
    return "".join(characters)


def _starts(name: str) -> list[int]:
    """Where a pattern may begin: at the start, and after every dot."""
    return [0, *(place + 1 for place, character in enumerate(name) if character == ".")]


def _at(code: Any) -> str:
    """What an anchor asks for."""
    kind = str(code)
    if kind in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
        return "start"
    if kind in ("AT_END", "AT_END_STRING"):
        return "end"
    return "boundary" if kind == "AT_BOUNDARY" else "none"


class _Match:
    """One name, against one pattern; a set of places 0 ... len(name) is the bits of a number."""

    def __init__(self, name: str, count: Callable[[int], None], pattern: str) -> None:
        self.name, self.count, self.pattern = name, count, pattern
        self.places: dict[str, int] = {}  # of each character
        for place, character in enumerate(name):
            self.places[character] = self.places.get(character, 0) | 1 << place

    def matches(self, elements: list[Any]) -> bool:
        """True if the whole of some end of the name, from a start of `_starts`, is matched."""
        starts = sum(1 << place for place in _starts(self.name))
        try:
            ends = self.sequence(elements, starts)
        except RecursionError:
            raise PatternError(f"pattern {self.pattern!r} is nested too deeply") from None
        return bool(ends >> len(self.name) & 1)

    def sequence(self, elements: Iterable[Any], places: int) -> int:
        for op, value in elements:
            if not places:
                break
            self.count(1 + len(self.name) // 64)
            places = _KINDS[str(op)](self, value, places)
        return places

    def _characters(self, fits: Callable[[str], bool], places: int) -> int:
        """One character further, where it fits."""
        found = 0
        for character, where in self.places.items():
            if fits(character):
                found |= where
        return (places & found) << 1

    def literal(self, code: int, places: int) -> int:
        return (places & self.places.get(chr(code), 0)) << 1

    def not_literal(self, code: int, places: int) -> int:
        return self._characters(lambda character: ord(character) != code, places)

    def any(self, _: None, places: int) -> int:
        return self._characters(lambda character: character != "\n", places)

    def one_of(self, items: list[Any], places: int) -> int:
        self.count(len(items))
        return self._characters(lambda character: _in_set(items, character), places)

    def branch(self, value: Any, places: int) -> int:
        found = 0
        for choice in value[1]:
            found |= self.sequence(choice, places)
        return found

    def group(self, value: Any, places: int) -> int:
        return self.sequence(value[-1], places)

    def repeat(self, value: Any, places: int) -> int:
        least, most, inner = value
        for _ in range(min(least, len(self.name) + 1)):
            before, places = places, self.sequence(inner, places)
            if places in (0, before):
                break
        found, fresh = places, places
        for _ in range(min(most - least, len(self.name) + 1)):
            fresh = self.sequence(inner, fresh) & ~found
            if not fresh:
                break
            found |= fresh
        return found

    def at(self, code: Any, places: int) -> int:
        kind = _at(code)
        if kind == "start":
            return places & 1
        if kind == "end":
            return places & 1 << len(self.name)
        word = [False, *map(_SPELLED["CATEGORY_WORD"], self.name), False]
        wanted = kind == "boundary"
        edges = [(word[place] != word[place + 1]) == wanted for place in range(len(word) - 1)]
        return places & sum(1 << place for place, edge in enumerate(edges) if edge)

    def look(self, value: Any, places: int) -> int:
        """Those places from which, or up to which, what is looked for is matched."""
        direction, inner = value
        width = 0 if direction > 0 else inner.getwidth()[0]
        found = 0
        for place in range(width, len(self.name) + 1):
            if places >> place & 1:
                ends = self.sequence(inner, 1 << place - width)
                if ends if direction > 0 else ends >> place & 1:
                    found |= 1 << place
        return found

    def look_not(self, value: Any, places: int) -> int:
        return places & ~self.look(value, places)


def _in_set(items: list[Any], character: str) -> bool:
    negated, code = False, ord(character)
    found = False
    for op, value in items:
        kind = str(op)
        if kind == "NEGATE":
            negated = True
        elif kind == "LITERAL":
            found |= code == value
        elif kind == "RANGE":
            found |= value[0] <= code <= value[1]
        else:
            name = str(value)
            opposite = "_NOT_" in name
            found |= _SPELLED[name.replace("_NOT_", "_")](character) != opposite
    return found != negated


_KINDS: dict[str, Callable[[_Match, Any, int], int]] = {
    "LITERAL": _Match.literal,
    "NOT_LITERAL": _Match.not_literal,
    "ANY": _Match.any,
    "IN": _Match.one_of,
    "BRANCH": _Match.branch,
    "SUBPATTERN": _Match.group,
    "MAX_REPEAT": _Match.repeat,
    "MIN_REPEAT": _Match.repeat,
    "AT": _Match.at,
    "ASSERT": _Match.look,
    "ASSERT_NOT": _Match.look_not,
}
