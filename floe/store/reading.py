"""A read on its way: which frames it waits for, the pieces it has, the memory it may use, and its one answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from floe.store.budget import Asked, Lease
from floe.store.cache import Writer
from floe.store.errors import DeadlineError, FloeError
from floe.store.frames import FrameTable, VerifiedFrame
from floe.store.ids import Buffer

if TYPE_CHECKING:
    from floe.store.fetcher import Fetcher

Done: TypeAlias = "Callable[[Sequence[Buffer] | FloeError], None]"


class Get:
    """One ranged request for frames [first, first + count) of a pack, and the memory it takes.

    `ahead`: nobody asked for it; `streamed`: a stream will, so it stays in memory until then. The memory is given back once the request has ended and all reads that
    got a piece of its buffer were answered.
    """

    __slots__ = (
        *("_holders", "_leases", "ahead", "began", "count", "ended", "error", "first", "frames", "pack_id"),
        *("streamed", "table", "task", "unread"),
    )

    def __init__(
        self,
        pack_id: str,
        table: FrameTable,
        frames: list[Flight],
        leases: list[Lease],
        *,
        ahead: bool,
        streamed: bool = False,
    ) -> None:
        self.pack_id = pack_id
        self.table = table
        self.frames = frames
        self.first = frames[0].number
        self.count = len(frames)
        self.ahead = ahead
        self.streamed = streamed
        self.unread = False  # and nobody will soon: it may go before what was read
        self.error: FloeError | None = None
        self.task: asyncio.Task[None] | None = None
        self.began = 0.0  # in the event loop's seconds
        self.ended = False
        self._leases = leases
        self._holders = 1
        for frame in frames:
            frame.get = self

    @property
    def source(self) -> str:
        """What its requests and bytes count as."""
        return "readahead" if self.ahead else "store"

    @property
    def wanted(self) -> bool:
        """Whether a read waits for any of it."""
        return any(frame.waiters for frame in self.frames)

    def hold(self) -> None:
        """One more read has a piece."""
        self._holders += 1

    def give_back(self, size: int) -> None:
        """`size` bytes of it are no longer held; for a request whose memory no read asked for."""
        self._leases[0].shrink(size)

    def drop(self) -> None:
        """One user less."""
        self._holders -= 1
        if self._holders == 0:
            for lease in self._leases:
                lease.drop()


class Flight:
    """A frame that is being fetched: at most one for each frame of a pack."""

    __slots__ = ("frame", "get", "number", "waiters")

    def __init__(self, number: int) -> None:
        self.number = number
        self.frame: VerifiedFrame | None = None
        self.get: Get | None = None
        self.waiters: set[Read] = set()


class Read:
    """A submitted read of content bytes [offset, offset + length). All but `cancel` belong to the event loop."""

    def __init__(self, fetcher: Fetcher, pack_id: str, offset: int, length: int, done: Done) -> None:
        self._fetcher = fetcher
        self.pack_id = pack_id
        self.offset = offset
        self.length = length
        self.done = done
        self.finished = False
        self.table: FrameTable | None = None
        self.asked: Asked | None = None
        self.lease: Lease | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.flights: dict[int, Flight] = {}
        self.pieces: dict[int, Buffer] = {}
        self.frames = range(0)
        # In the event loop's seconds: when it came, had its pack's index, had its memory.
        self.submitted = self.indexed = self.granted = 0.0
        self.began = 0.0  # to wait for the store, likewise
        self.source: Get | None = None  # of what came last; None: the cache
        self.fresh = False  # all that it waits for was asked of the store for it
        self.patience: asyncio.TimerHandle | None = None  # of one that goes around the cache's disk
        self.returned = False  # to the disk, when that ran out
        self.returning: set[int] = set()  # frames that the disk is being asked for beside the store
        self._holds: list[Get] = []

    def cancel(self) -> None:
        """Nobody wants the result any more; from any thread, at any time."""
        self._fetcher.cancel(self)

    @property
    def what(self) -> str:
        """For messages."""
        return f"bytes {self.offset} to {self.offset + self.length} of pack {self.pack_id}"

    def overdue(self, url: str, deadline: float) -> DeadlineError:
        """That the store at `url` did not answer in `deadline` seconds, and what it said meanwhile."""
        causes = [f.get.error for f in self.flights.values() if f.get is not None and f.get.error is not None]
        cause = f": {causes[0]}" if causes else ""
        hint = (causes[0].hint if causes else "") or "check that the store is reachable and fast enough"
        return DeadlineError(f"{self.what} did not arrive from {url} in {deadline:g} s{cause}", hint=hint)

    def part(self, frame: int) -> tuple[int, int]:
        """(start, stop) of what this read wants of a frame, in content bytes of the pack."""
        assert self.table is not None
        start = frame * self.table.frame_size
        return max(self.offset, start), min(self.offset + self.length, start + self.table.frame_size)

    def take(self, frame: int, content: Buffer, get: Get | None) -> bool:
        """Keep the wanted part of a frame's content; True when nothing is missing any more."""
        assert self.table is not None
        start, stop = self.part(frame)
        base = frame * self.table.frame_size
        piece: Buffer = memoryview(content)[start - base : stop - base]
        last = len(self.pieces) + 1 == len(self.frames)
        if get is not None:
            if last:
                get.hold()
                self._holds.append(get)
            else:
                piece = bytes(piece)  # so that waiting for the rest does not keep a whole download in memory
        return self.keep(frame, piece)

    def keep(self, frame: int, piece: Buffer) -> bool:
        """Keep exactly the wanted part of a frame; True when nothing is missing any more."""
        self.flights.pop(frame, None)
        self.pieces[frame] = piece
        return len(self.pieces) == len(self.frames)

    def result(self) -> list[Buffer]:
        """All pieces in order."""
        return [self.pieces[frame] for frame in self.frames]

    def release(self) -> None:
        """The answer was delivered: give memory back."""
        self.pieces.clear()
        for get in self._holds:
            get.drop()
        self._holds.clear()
        if self.lease is not None:
            self.lease.drop()
            self.lease = None


def read_local(writer: Writer, read: Read, frame: int) -> Buffer | None:
    """What a read wants of a frame on the cache's disk, hashed before that if need be; None when it is not usable."""
    pack, table = writer.pack(read.pack_id), read.table
    assert table is not None
    start, stop = read.part(frame)
    buffer = bytearray(stop - start)
    if pack is not None and pack.read_into(start, memoryview(buffer)):
        return buffer
    verified = writer.recheck(read.pack_id, frame)
    if verified is None:
        return None
    base = frame * table.frame_size
    return memoryview(verified.content)[start - base : stop - base]
