"""Memory for frames: on page boundaries, so that disks take it from there by themselves (O_DIRECT), and used again.

Allocators put large buffers 16 bytes behind a page's boundary, and give them back to the kernel each time, which then has to
find and zero others.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref

from floe.store.packindex import MAX_FRAME

_SPARE = 32 << 20  # bytes that may lie unused
_PAGE = mmap.PAGESIZE


class Blocks:
    """Blocks of any size; those of a whole frame are used again once nobody has a view of them. Thread-safe."""

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = {
            1 << n: [] for n in range(_PAGE.bit_length() - 1, MAX_FRAME.bit_length())
        }

    def take(self, size: int) -> memoryview:
        """A block of `size` bytes with arbitrary content; it is free when this view, and all that came of it, are gone."""
        free = self._free.get(size)
        if free is None:  # a pack's last frame: of any size, so few would be asked for again
            return memoryview(mmap.mmap(-1, max(size, 1)))[:size]
        try:
            memory = free.pop()
        except IndexError:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # It dies with the last view, however views were sliced and passed on; that nobody can forget to tell.
        holder = (ctypes.c_ubyte * size).from_buffer(memory)
        weakref.finalize(holder, self._give_back, memory).atexit = False
        return memoryview(holder).cast("B")

    def _give_back(self, memory: mmap.mmap) -> None:
        if self.spare() < _SPARE:
            self._free[len(memory)].append(memory)

    def spare(self) -> int:
        """Bytes that lie unused; at most a few blocks more than are meant to, where threads race."""
        return sum(size * len(free) for size, free in self._free.items())
