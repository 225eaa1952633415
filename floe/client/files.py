"""A file of a model, open for reading, as Python's io has it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection

from floe.client.content import read_into
from floe.client.tree import Entry, TreePaths
from floe.fuse.reader import Reader

BUFFER = 1 << 20  # bytes that small reads take at once: a frame of a model


class ModelFile(io.RawIOBase):
    """Reads the file at `entry`; every byte is verified. For one thread; the store's errors are raised as they are.

    `served` opens a reader of some packs that is this file's own, and is closed with it; where it gives None, `shared` reads.
    `check` raises when neither should any more.
    """

    def __init__(
        self,
        tree: TreePaths,
        entry: Entry,
        served: Callable[[Collection[str]], Reader | None],
        shared: Callable[[], Reader],
        check: Callable[[], None],
    ) -> None:
        super().__init__()
        self._tree, self._open_served, self._shared, self._check_store = tree, served, shared, check
        self._inode = tree.inode(entry)
        self._served: Reader | None = None
        self._pid = 0  # the process that _served reads in
        self._at = 0
        self.name = entry.path
        self.mode = "rb"

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._inode.size

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Where the next read begins, in bytes."""
        self._check()
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; returns the new place. ValueError for one before the beginning."""
        self._check()
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._inode.size}[whence]
        if base + offset < 0:
            raise ValueError(f"cannot seek to byte {base + offset}")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: object) -> int:
        """Fill `buffer`: whole, or up to the file's end, straight into its memory."""
        self._check()
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]  # a buffer, which 3.10 has no name for
        done = read_into(self._tree.image, self._reader(), self._inode, self._at, view)
        self._at += done
        return done

    def close(self) -> None:
        """Close it."""
        if not self.closed and self._served is not None and self._pid == os.getpid():
            self._served.close()
        self._served = None
        super().close()

    def _reader(self) -> Reader:
        self._check_store()
        if self._pid != os.getpid():
            # Of a parent's nothing is closed: its threads stayed there.
            image, inode = self._tree.image, self._inode
            packs = {extent.pack for extent in image.extents(inode, 0, inode.size) if extent.pack is not None}
            self._served, self._pid = self._open_served(packs), os.getpid()
        return self._served or self._shared()

    def read_at(self, offset: int, length: int) -> bytes:
        """Bytes from `offset`, fewer at the file's end; from any thread, and the place of `tell` stays."""
        self._check()
        data = bytearray(max(0, min(length, self._inode.size - offset)))
        read_into(self._tree.image, self._reader(), self._inode, offset, memoryview(data))
        return bytes(data)

    def _check(self) -> None:
        if self.closed:
            raise ValueError("the file is closed")
