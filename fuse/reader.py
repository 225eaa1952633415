"""What the worker needs from whoever reads packs: the seam between the kernel's protocol and the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from floe.store.errors import FloeError
from floe.store.ids import Buffer

Done: TypeAlias = "Callable[[Sequence[Buffer] | FloeError], None]"


def fill(part: memoryview, pieces: Sequence[Buffer]) -> None:
    """Put what a read gave into `part`; ValueError when it is not exactly as long."""
    at = 0
    for piece in pieces:
        view = memoryview(piece).cast("B")
        part[at : at + len(view)] = view
        at += len(view)
    if at != len(part):
        raise ValueError(f"{at} bytes instead of {len(part)}")


class Ticket(Protocol):
    """A submitted read."""

    def cancel(self) -> None:
        """Nobody wants the result any more. May be called at any time, from any thread, more than once.

        `done` is still called exactly once, perhaps with CancelledError.
        """


class Reader(Protocol):
    """Reads packs. Every method may be called from several threads at once; sizes and offsets are bytes."""

    def lookup(self, pack_id: str) -> int | None:
        """The pack's content size, or None when its index is not on this node. Never touches the network."""

    def read_cached_into(self, pack_id: str, offset: int, buffer: memoryview, *, wait: bool = True) -> bool:
        """Fill all of `buffer` with content from `offset`, from local disk alone, or change nothing that counts: False.

        With `wait=False` it may raise BlockingIOError instead of waiting for the disk.
        """

    def on_hand(self, pack_id: str, offset: int, length: int) -> list[Buffer] | None:
        """`length` content bytes from `offset`, in order, when all of them are in memory already."""

    def submit(self, pack_id: str, offset: int, length: int, done: Done) -> Ticket:
        """Read `length` content bytes from `offset`; returns at once.

        `done` is called exactly once, from another thread, with pieces that together have exactly `length`
        bytes, or with the error.
        """

    def counters(self) -> Mapping[str, Any]:
        """Requests and bytes by source, for `floe status` and metrics."""

    def close(self) -> None:
        """Stop fetching and leave the cache consistent; outstanding reads end with CancelledError."""


class LateReader(Reader, Protocol):
    """A reader that notes what was read, and does so after the answer where the caller tells it then: nobody waits for notes."""

    def read_cached_into(
        self, pack_id: str, offset: int, buffer: memoryview, *, wait: bool = True, told: bool = True
    ) -> bool:
        """As `Reader.read_cached_into`; with `told=False` the caller calls `answered`."""

    def on_hand(self, pack_id: str, offset: int, length: int, *, told: bool = True) -> list[Buffer] | None:
        """As `Reader.on_hand`; `told` as above."""

    def answered(self, pack_id: str, offset: int, length: int) -> None:
        """A read has its answer."""
