"""Errors as one line, for all that print them."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, or its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
