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
    64               4         version of what follows up to slot 0: 1; 0: no worker that knows of it has served yet
    68               4         process id of the worker that wrote the next two
    72               8         its pulse: when a thread of it last asked for a request, in nanoseconds of CLOCK_MONOTONIC
    80               8         seconds within which it answers every request; 0: it does not say
    88               8         the marks below are those of this worker, the n-th that served; of another one they say nothing
    96               8         workers that ended without having been told to; the keeper counts
    104              8         of those, how many the keeper killed because they did not answer
    112              8         requests answered with an error because they ended workers
    120              8         requests answered with an error because a worker had not answered them in time
    1024             32 * 32   what ended workers: node id, offset, bytes, when (as above); 0: nothing
    8192             8192      a mark for each slot, see marks.py
    SLOT * (i + 1)   SLOT      slot i: the request as the kernel wrote it; its first 4 bytes, the length, are 0 when free

What is new in the first 16 KiB gets a place that was 0 before: workers and keepers of different versions share a mount for
as long as an upgrade, or the way back, takes. For anything else the magic
changes, after FLOES: a version that does not know it leaves the mount alone.

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
from floe.store.errors import BusyError, UnsupportedError

SLOT = 16384  # bytes; the kernel demands at least 8 KiB for a read of /dev/fuse
COUNT = 8192  # twice max_background: foreground reads of killed readers count on top
MEMFD_NAME = "floe-slots"
COUNTS = ("ended", "silent", "poisonous", "overdue")
_MAGIC = b"FLOESLOT"
_FAMILY = 5  # bytes at its start that every version's has
_HEADER = struct.Struct("<8sII")
_COUNTERS = struct.Struct("<3Q")
_INITIALIZED = 40
_REPLAYS = struct.Struct("<2Q")
_REPLAYS_AT = 48
_VERSION_AT, _VERSION = 64, 1
_VITALS = struct.Struct("<IIQd")
_MARKED_AT = 88
_COUNTS_AT, _COUNTS = 96, struct.Struct("<4Q")
_PAST_AT, _PAST_COUNT = 1024, 32
_PAST = struct.Struct("<4Q")
_MARKS_AT = 8192
_FREE = bytes(4)
_HEAD = struct.Struct("<IIQ")  # of a request: length, opcode, unique
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
    """The device number of the mount these slots belong to; None when `fd` holds no slots.

    UnsupportedError for slots of another version's form.
    """
    data = os.pread(fd, _HEADER.size, 0)
    if len(data) < _HEADER.size or not data.startswith(_MAGIC[:_FAMILY]):
        return None
    magic, major, minor = _HEADER.unpack(data)
    if magic != _MAGIC or os.fstat(fd).st_size != SLOT * (COUNT + 1):
        raise UnsupportedError(
            f"the mount's requests are kept in the form of another Floe, {magic.decode('ascii', 'replace')}",
            hint="start that version again; or end the mount with `floe packfs --force`, and its readers get errors",
        )
    return (major, minor)


def owner_of(fd: int) -> int | None:
    """The process id of the worker that holds the slots now, or None."""
    answer = fcntl.fcntl(fd, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    kind, _, _, _, pid = _FLOCK.unpack(answer)
    return pid if kind != fcntl.F_UNLCK else None


def vitals(fd: int) -> tuple[int, int, float]:
    """What the worker that served last says of itself: (process id, pulse, patience).

    The pulse changes while it serves; its patience is in seconds, 0: it does not say.
    """
    _, pid, pulse, patience = _VITALS.unpack(os.pread(fd, _VITALS.size, _VERSION_AT))
    return pid, pulse, patience


def counts(fd: int) -> dict[str, int]:
    """By the names in COUNTS, how workers and requests ended since the mount; see the table above, from 96 on."""
    return dict(zip(COUNTS, _COUNTS.unpack(os.pread(fd, _COUNTS.size, _COUNTS_AT)), strict=True))


def count(fd: int, name: str) -> None:
    """One more of the count `name`; each has one process that counts."""
    os.pwrite(fd, (counts(fd)[name] + 1).to_bytes(8, "little"), _COUNTS_AT + 8 * COUNTS.index(name))


def occupied(fd: int) -> Iterator[tuple[int, int]]:
    """(slot, `unique` of its request) of all that are not free."""
    size, position = SLOT * (COUNT + 1), SLOT
    while position < size:
        try:
            position = os.lseek(fd, position, os.SEEK_DATA)  # holes were never used
        except OSError:
            return
        index = position // SLOT - 1
        position = SLOT * (index + 2)
        if index >= 0:
            length, _, unique = _HEAD.unpack(os.pread(fd, _HEAD.size, SLOT * (index + 1)))
            if length:
                yield index, unique


def marks(fd: int) -> bytearray:
    """The mark of each slot."""
    return bytearray(os.pread(fd, COUNT, _MARKS_AT))


def set_mark(fd: int, index: int, mark: int) -> None:
    """Change the mark of a slot: for the keeper, while no worker serves."""
    os.pwrite(fd, bytes((mark,)), _MARKS_AT + index)


class Slots:
    """The mapped slots. `view(i)` is slot i's memory; who takes a slot owns it until `release`."""

    def __init__(self, fd: int, *, wait: float = 5.0) -> None:
        """Map and claim the slots of `fd`; BusyError when another live worker holds them after `wait` seconds."""
        self._fd = fd
        self._claim(wait)
        self._map = mmap.mmap(fd, SLOT * (COUNT + 1))
        self._lock = threading.Lock()  # guards the replay counters and the marks
        self._replayed = False
        self._whole = memoryview(self._map)
        self.pulse = self._whole[72:80].cast("Q")  # to be set to perf_counter_ns() by who is about to ask for a request
        self._marks = self._whole[_MARKS_AT : _MARKS_AT + COUNT]
        self.left = [index for index, _ in occupied(fd)]  # slots with requests that a predecessor left
        taken = set(self.left)
        # A stack, low numbers on top: few slots are ever touched, so few pages exist.
        self._free = [index for index in range(COUNT - 1, -1, -1) if index not in taken]
        served, found, requests = _COUNTERS.unpack_from(self._map, 16)
        _COUNTERS.pack_into(self._map, 16, served + 1, found + bool(self.left), requests + len(self.left))
        (marked_by,) = struct.unpack_from("<Q", self._map, _MARKED_AT)
        self._marked = {index for index in self.left if self._marks[index]} if marked_by == served else set()
        for index in range(COUNT):
            if self._marks[index] and index not in self._marked:
                self._marks[index] = 0
        struct.pack_into("<Q", self._map, _MARKED_AT, served + 1)

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

    def begin(self, patience: float) -> None:
        """Show that this process serves from now on; `patience`: seconds within which it answers every request."""
        _VITALS.pack_into(self._map, _VERSION_AT, _VERSION, os.getpid(), time.perf_counter_ns(), patience)

    def mark(self, index: int) -> int:
        """The mark of the request in a slot; 0 when there is none."""
        return self._marks[index]

    def set_mark(self, index: int, mark: int) -> None:
        """Mark the request in a slot, until it is answered. No other thread may know the slot."""
        self._marks[index] = mark
        if mark:
            self._marked.add(index)
        else:
            self._marked.discard(index)

    def change_mark(self, index: int, off: int, on: int) -> None:
        """Take bits `off` out of a mark and put `on` in, if it is there still: its request may be answered at any time."""
        with self._lock:
            if index in self._marked:
                self._marks[index] = self._marks[index] & ~off | on

    def remember(self, node: int, offset: int, nbytes: int) -> None:
        """Keep, in the place of the oldest, what ended workers."""
        places = range(_PAST_AT, _PAST_AT + _PAST.size * _PAST_COUNT, _PAST.size)
        oldest = min(places, key=lambda place: int(_PAST.unpack_from(self._map, place)[3]))
        _PAST.pack_into(self._map, oldest, node, offset, nbytes, time.perf_counter_ns())

    def remembered(self) -> list[tuple[int, int, int, int]]:
        """(node id, offset, bytes, when) of what ended workers."""
        whole = self._whole[_PAST_AT : _PAST_AT + _PAST.size * _PAST_COUNT]
        return [(node, offset, nbytes, when) for node, offset, nbytes, when in _PAST.iter_unpack(whole) if when]

    def count(self, name: str) -> None:
        """One more of the count `name`."""
        count(self._fd, name)

    @property
    def counts(self) -> dict[str, int]:
        """How workers and requests ended."""
        return counts(self._fd)

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
        if index in self._marked:
            with self._lock:
                self.set_mark(index, 0)
        self._free.append(index)

    def close(self) -> None:
        """Unmap. The lock goes with the process, or with the descriptor's closing."""
        for view in (self.pulse, self._marks, self._whole):
            view.release()
        self._map.close()
