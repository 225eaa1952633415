"""Reads that go around a slow cache disk, to the store, and back to the disk when the store does not answer in time.

Part of a fetcher, in its event loop. Whether a disk is gone around is judged elsewhere (cache/bypass.py); a store that refuses or
is silent is left alone for a while, longer each time, and the disk is read meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from floe.store.cache import Writer
from floe.store.completion import Rest
from floe.store.reading import Read

_REST_MAX = 60.0  # seconds


class Around:
    """`read_disk` reads frames of a read from the cache's disk, beside what it waits for."""

    def __init__(
        self, writer: Writer, loop: asyncio.AbstractEventLoop, read_disk: Callable[[Read, list[int]], None]
    ) -> None:
        self._writer = writer
        self._loop = loop
        self._read_disk = read_disk
        self._rest = Rest(_REST_MAX)
        self.reads = 0
        self.returned = 0  # reads that turned to the disk after all

    def is_taken(self, pack_id: str) -> bool:
        """Whether what is on the pack's disk is to be asked of the store now."""
        pack = self._writer.pack(pack_id)
        return pack is not None and pack.bypass.diverts and self._loop.time() >= self._rest.until

    def begin(self, read: Read) -> None:
        """Some frames of the read, which are on the disk, are asked of the store."""
        pack = self._writer.pack(read.pack_id)
        if read.patience is None and pack is not None:
            self.reads += 1
            read.patience = self._loop.call_later(pack.bypass.patience(), self._late, read)

    def _late(self, read: Read) -> None:
        if not read.finished:
            self.give_up(read)
            self._writer.missed(read.length, self._loop.time() - read.began)  # at least

    def give_up(self, read: Read) -> None:
        """The store failed, or is late: a read that went around has the disk asked, too."""
        if read.patience is not None and not read.returned:
            read.returned = True
            self.returned += 1
            self._rest.fail(self._loop.time())
            self._read_disk(read, list(read.flights))

    def finished(self, read: Read, *, well: bool) -> None:
        """A read has ended."""
        if read.patience is not None:
            read.patience.cancel()
        if well and read.fresh and not read.returned:
            self._writer.missed(read.length, self._loop.time() - read.began)
            if read.patience is not None:
                self._rest.succeed()
