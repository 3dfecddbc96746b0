"""The one exception that reading adapter files raises."""

from __future__ import annotations

from os import PathLike, fspath


class AdapterFileError(ValueError):
    """An adapter file is not what it claims, or holds something this package does not support.

    Raised before anything of the adapter can be used. The message names the file, and the tensor
    or configuration field where there is one; `file` and `key` hold both for programs.
    """

    def __init__(self, file: str | PathLike[str], problem: str, key: str | None = None) -> None:
        self.file = fspath(file)
        self.key = key
        where = self.file if key is None else f"{self.file}: {key!r}"
        super().__init__(f"{where}: {problem}")
