"""How far work has come, told to whoever shows it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told in bytes, from any thread."""

    def total(self, nbytes: int) -> None:
        """All that there is to do."""
        ...

    def advance(self, nbytes: int) -> None:
        """So many more are done."""
        ...
