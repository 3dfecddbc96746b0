"""What adapters do to a model and to one another, worked out from their factors alone."""

from __future__ import annotations

from .factors import Factorisation, Overlap, factorise
from .inputs import Inputs, collect_inputs
from .inspection import inspect
from .records import Interference, Layer, Pair, Report, Summary, by_pair

__all__ = [
    "Factorisation",
    "Inputs",
    "Interference",
    "Layer",
    "Overlap",
    "Pair",
    "Report",
    "Summary",
    "by_pair",
    "collect_inputs",
    "factorise",
    "inspect",
]
