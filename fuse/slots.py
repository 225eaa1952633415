"""Request slots: a memfd that outlives the worker, in which every unanswered request lies.

The worker reads each request from /dev/fuse straight into a free slot, and clears the slot once the reply
is written. The keeper holds the memfd, so a successor finds there what a killed worker left unanswered.

    offset           size      what
    0                8         magic "FLOESLOT"
    8                4         major, 12: minor of the mount's device, which binds the slots to their mount
    16               8         workers that served so far
    24               8         of those, how many found requests of their predecessor
    32               8         requests found that way, all together
    40               4         1 once INIT is answered: the kernel asks it only once
    48               8         workers that answered requests of their predecessors
    56               8         those requests: the kernel took the answer
    SLOT * (i + 1)   SLOT      slot i: the request as the kernel wrote it; its first 4 bytes, the length, are 0 when free

Only one live worker uses the slots, shown by a POSIX record lock on the memfd, which ends with its process. A worker that
was killed but hangs in the kernel keeps the lock: its successor serves without, and waits for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator

from floe.store import process
from floe.store.errors import BusyError

SLOT = 16384  # bytes; the kernel demands at least 8 KiB for a read of /dev/fuse
COUNT = 8192  # twice max_background: foreground reads of killed readers count on top
MEMFD_NAME = "floe-slots"
_MAGIC = b"FLOESLOT"
_HEADER = struct.Struct("<8sII")
_COUNTERS = struct.Struct("<3Q")
_INITIALIZED = 40
_REPLAYS = struct.Struct("<2Q")
_REPLAYS_AT = 48
_FREE = bytes(4)
_LENGTH = struct.Struct("<I")
# struct flock, 64-bit: type, whence, padding, start, length, pid
_FLOCK = struct.Struct("<hh4xqqi4x")


def create(device: tuple[int, int]) -> int:
    """A new memfd of empty slots for the mount with this device number; sparse, so small until used."""
    fd = os.memfd_create(MEMFD_NAME, os.MFD_CLOEXEC)
    os.ftruncate(fd, SLOT * (COUNT + 1))
    os.pwrite(fd, _HEADER.pack(_MAGIC, *device), 0)
    return fd


def device_of(fd: int) -> tuple[int, int] | None:
    """The device number of the mount these slots belong to; None when `fd` holds no slots."""
    data = os.pread(fd, _HEADER.size, 0)
    if len(data) < _HEADER.size or os.fstat(fd).st_size != SLOT * (COUNT + 1):
        return None
    magic, major, minor = _HEADER.unpack(data)
    return (major, minor) if magic == _MAGIC else None


def owner_of(fd: int) -> int | None:
    """The process id of the worker that holds the slots now, or None."""
    answer = fcntl.fcntl(fd, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    kind, _, _, _, pid = _FLOCK.unpack(answer)
    return pid if kind != fcntl.F_UNLCK else None


class Slots:
    """The mapped slots. `view(i)` is slot i's memory; who takes a slot owns it until `release`."""

    def __init__(self, fd: int, *, wait: float = 5.0) -> None:
        """Map and claim the slots of `fd`; BusyError when another live worker holds them after `wait` seconds."""
        self._fd = fd
        self._claim(wait)
        self._map = mmap.mmap(fd, SLOT * (COUNT + 1))
        self._lock = threading.Lock()  # guards the replay counters
        self._replayed = False
        self._whole = memoryview(self._map)
        self.left = list(self._scan())  # slots with requests that a predecessor left
        taken = set(self.left)
        # A stack, low numbers on top: few slots are ever touched, so few pages exist.
        self._free = [index for index in range(COUNT - 1, -1, -1) if index not in taken]
        served, found, requests = _COUNTERS.unpack_from(self._map, 16)
        _COUNTERS.pack_into(self._map, 16, served + 1, found + bool(self.left), requests + len(self.left))

    def _claim(self, wait: float) -> None:
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                owner = owner_of(self._fd)
                if owner is not None:
                    if process.is_doomed(owner):
                        # Hanging in the kernel, perhaps for ever. The lock is ours when it is gone at last.
                        threading.Thread(target=self._await_lock, name="floe-slots", daemon=True).start()
                        return
                    if time.monotonic() >= deadline:
                        raise BusyError(f"worker {owner} still serves this pack filesystem") from None
                time.sleep(0.01)
            else:
                return

    def _await_lock(self) -> None:
        with contextlib.suppress(OSError):  # the descriptor was closed
            fcntl.lockf(self._fd, fcntl.LOCK_EX)

    def _scan(self) -> Iterator[int]:
        size, position = SLOT * (COUNT + 1), SLOT
        while position < size:
            try:
                position = os.lseek(self._fd, position, os.SEEK_DATA)  # holes were never used
            except OSError:
                return
            index = position // SLOT - 1
            position = SLOT * (index + 2)
            if index >= 0 and _LENGTH.unpack_from(self._map, SLOT * (index + 1))[0]:
                yield index

    @property
    def counters(self) -> tuple[int, int, int]:
        """(workers so far, of those that found requests, requests found)."""
        served, found, requests = _COUNTERS.unpack_from(self._map, 16)
        return served, found, requests

    def count_replay(self) -> None:
        """The kernel took this worker's answer to a request that a predecessor left."""
        with self._lock:
            replayers, replayed = _REPLAYS.unpack_from(self._map, _REPLAYS_AT)
            _REPLAYS.pack_into(self._map, _REPLAYS_AT, replayers + (not self._replayed), replayed + 1)
            self._replayed = True

    @property
    def replays(self) -> tuple[int, int]:
        """(workers that answered requests of their predecessors, requests so answered) since the mount."""
        replayers, replayed = _REPLAYS.unpack_from(self._map, _REPLAYS_AT)
        return replayers, replayed

    @property
    def initialized(self) -> bool:
        """Whether INIT has been answered, by this worker or an earlier one."""
        return bool(_LENGTH.unpack_from(self._map, _INITIALIZED)[0])

    def set_initialized(self) -> None:
        """INIT has been answered. To be called before its slot is cleared."""
        _LENGTH.pack_into(self._map, _INITIALIZED, 1)

    def take(self) -> int:
        """A free slot's number; IndexError when there is none."""
        index = self._free.pop()
        # Touched before the kernel writes: a page fault during its copy, in a process being killed,
        # would end the request with EIO.
        start = SLOT * (index + 1)
        self._map[start : start + 4] = _FREE
        return index

    def view(self, index: int) -> memoryview:
        """Slot `index`'s 16 KiB."""
        start = SLOT * (index + 1)
        return self._whole[start : start + SLOT]

    def clear(self, index: int) -> None:
        """The request in the slot is answered; the slot stays taken."""
        start = SLOT * (index + 1)
        self._map[start : start + 4] = _FREE

    def release(self, index: int) -> None:
        """Clear the slot and give it back."""
        start = SLOT * (index + 1)
        self._map[start : start + 4] = _FREE
        self._free.append(index)

    def close(self) -> None:
        """Unmap. The lock goes with the process, or with the descriptor's closing."""
        self._whole.release()
        self._map.close()
