"""Reads packs from files: those of the node cache that are complete, or those that the pack filesystem serves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from floe.fuse.reader import Done, Ticket
from floe.store.errors import DamagedError, FloeError, UnavailableError
from floe.store.ids import Buffer

_THREADS = 64  # reads under way: those that wait for the store must not hold up the others


class _Ticket:
    def cancel(self) -> None:
        """A read of a file ends by itself."""


class FileReader:
    """A Reader (see floe.fuse.reader) of `files`, pack id -> (file, bytes). OSError when one cannot be opened."""

    def __init__(self, files: Mapping[str, tuple[Path, int]]) -> None:
        self._files: dict[str, tuple[int, int]] = {}
        try:
            for pack, (path, size) in files.items():
                self._files[pack] = os.open(path, os.O_RDONLY | os.O_CLOEXEC), size
        except OSError:
            for fd, _ in self._files.values():  # an open pack keeps the pack filesystem from ending
                os.close(fd)
            raise
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="floe-read")
        self._requests = self._bytes = 0

    def lookup(self, pack_id: str) -> int | None:
        """Bytes of the pack's content."""
        found = self._files.get(pack_id)
        return None if found is None else found[1]

    def read_cached_into(self, pack_id: str, offset: int, buffer: memoryview, *, wait: bool = True) -> bool:
        """Fill `buffer`; with `wait=False` from the page cache alone, else BlockingIOError."""
        if wait:
            _read(self._files[pack_id][0], pack_id, offset, buffer)
            return True
        try:
            got = os.preadv(self._files[pack_id][0], (buffer,), offset, os.RWF_NOWAIT)
        except OSError as error:  # not in memory, or a file system that cannot say
            raise BlockingIOError from error
        if got != len(buffer):
            raise BlockingIOError
        self._requests += 1
        self._bytes += got
        return True

    def on_hand(self, _pack: str, _offset: int, _length: int) -> list[Buffer] | None:
        """Never: the files are all there is."""
        return None

    def submit(self, pack_id: str, offset: int, length: int, done: Done) -> Ticket:
        """Read in another thread."""
        self._threads.submit(self._run, pack_id, offset, length, done)
        return _Ticket()

    def _run(self, pack_id: str, offset: int, length: int, done: Done) -> None:
        buffer = bytearray(length)
        try:
            _read(self._files[pack_id][0], pack_id, offset, memoryview(buffer))
        except FloeError as error:
            done(error)
            return
        except Exception as error:  # whoever waits must hear of it
            done(FloeError(f"pack {pack_id} cannot be read at {offset}: {error!r}"))
            return
        self._requests += 1
        self._bytes += length
        done([buffer])

    def counters(self) -> Mapping[str, Any]:
        """Reads and their bytes."""
        return {"requests": self._requests, "bytes": self._bytes}

    def close(self) -> None:
        """Close the files; reads that wait in the kernel are left to it."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for fd, _ in self._files.values():
            os.close(fd)


def _read(fd: int, pack_id: str, offset: int, buffer: memoryview) -> None:
    try:
        done = 0
        while done < len(buffer):
            got = os.preadv(fd, (buffer[done:],), offset + done)
            if not got:
                raise DamagedError(f"pack {pack_id} ends before byte {offset + len(buffer)}")
            done += got
    except OSError as error:
        raise UnavailableError(f"pack {pack_id} cannot be read at {offset}: {error.strerror}") from error
