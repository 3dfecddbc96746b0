"""What adapters do to a model and to one another, worked out from their factors alone."""

from __future__ import annotations

from .factors import Factorisation, Overlap, factorise
from .inputs import Inputs, collect_inputs
from .inspection import inspect
from .records import Interference, Layer, Pair, Report, Summary

__all__ = [
    "Factorisation",
    "Inputs",
    "Interference",
    "Layer",
    "Overlap",
    "Pair",
    "Report",
    "Summary",
    "collect_inputs",
    "factorise",
    "inspect",
]
