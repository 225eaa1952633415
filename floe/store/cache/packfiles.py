"""The open files of a cached pack, and how its data is read and written."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path

from floe.store.cache.bypass import Bypass
from floe.store.cache.durable import begin_write_back, is_in_memory, write_pieces
from floe.store.ids import Buffer
from floe.store.process import NO_DESCRIPTORS


class Files:
    """Descriptors of a pack's data and bitmap; closed when the last thread that uses them lets go.

    `direct` writes the data past the page cache; it is -1 until `want_direct`, and where that cannot be. `nowait`: whether a
    read of the data can be told not to wait for the disk.
    """

    __slots__ = ("_refused", "bitmap", "data", "direct", "nowait")

    def __init__(self, folder: Path) -> None:
        self.data = self.bitmap = self.direct = -1
        self._refused = False
        self.nowait = True
        self.data = os.open(folder / "data", os.O_RDWR)
        self.bitmap = os.open(folder / "bitmap", os.O_RDWR | os.O_CREAT, 0o600)

    def want_direct(self) -> None:
        """Open `direct` if need be and possible; for one thread at a time."""
        if self.direct < 0 and not self._refused:
            try:
                self.direct = os.open(f"/proc/self/fd/{self.data}", os.O_WRONLY | os.O_DIRECT)
            except OSError as error:
                self._refused = error.errno not in NO_DESCRIPTORS

    def read_timed(self, buffer: memoryview, offset: int, bypass: Bypass) -> int:
        """Read from the data, and tell `bypass` how long that took if it took the disk; the bytes read."""
        began, got = time.perf_counter(), 0
        if self.nowait:
            try:
                got = os.preadv(self.data, (buffer,), offset, os.RWF_NOWAIT)
                if got == len(buffer):
                    return got
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                self.nowait = False
        timed = self.nowait or is_in_memory(self.data, offset, len(buffer)) is False
        got += os.preadv(self.data, (buffer[got:],), offset + got)
        if timed:
            bypass.hit(got, time.perf_counter() - began)
        return got

    def write(self, pieces: Sequence[Buffer], offset: int, *, direct: bool) -> None:
        """Write to the data, past the page cache if `direct` and if that can be: from memory on page boundaries only."""
        if direct and self.direct >= 0 and not self._refused:
            try:
                write_pieces(self.direct, pieces, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._refused = True
            else:
                return
        length = write_pieces(self.data, pieces, offset)
        if direct:
            begin_write_back(self.data, offset, length)

    def __del__(self) -> None:
        for fd in (self.data, self.bitmap, self.direct):
            if fd >= 0:
                os.close(fd)
