"""How far work has come, told to whoever shows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol


class Progress(Protocol):
    """Told in bytes, from any thread."""

    def total(self, nbytes: int) -> None:
        """All that there is to do."""
        ...

    def advance(self, nbytes: int) -> None:
        """So many more are done."""
        ...


class Adding:
    """Tells `shown`, if there is one, of several works, one after the other, as of one."""

    def __init__(self, shown: Progress | None) -> None:
        self._shown, self._whole = shown, 0

    def total(self, nbytes: int) -> None:
        """So many more bytes are to be done."""
        self._whole += nbytes
        if self._shown is not None:
            self._shown.total(self._whole)

    def advance(self, nbytes: int) -> None:
        """See Progress.advance."""
        if self._shown is not None:
            self._shown.advance(nbytes)

    def passing(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """`pieces`, each told as it passes."""
        for piece in pieces:
            self.advance(len(piece))
            yield piece
