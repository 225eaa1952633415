"""Which parts of packs are read in the first seconds of trees that were just mounted: notes, no more.

A recording waits for its tree's first read, which may come long after the mount: an image is mounted layer by layer
while it is pulled. Then it lasts WINDOW seconds, or until nothing new was read for QUIET seconds.

Concurrency: readers only look at `packs` and append to lists, which is atomic in CPython; nothing is locked on their way,
and while nothing is recorded they find an empty dict. Everything else is under one lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

WINDOW = 30.0  # seconds from the first read on
QUIET = 8.0  # seconds without anything new that end a recording
WAIT = 900.0  # seconds from the mount to the first read; what is not started by then is not a start
_READS_MAX = 32768  # of one recording
_BYTES_MAX = 1 << 30  # of one recording; what comes then is a stream, which reading ahead serves
_FOLLOWED_MAX = 64  # at a time
_RECORDINGS_MAX = 512  # at a time; packs are looked up in one dict, so many cost readers no more than one


Noted: TypeAlias = "tuple[str, int, int, float]"
"""Pack id, offset and length in bytes of its content, seconds by the recorder's clock. Plain: the garbage collector lets go of it."""


class Recording:
    """What was read of the packs of one tree. `replayed`: frames (pack id, number) that were fetched ahead for it."""

    def __init__(self, tree: str, packs: Iterable[str], now: float) -> None:
        self.tree = tree
        self.packs = tuple(packs)
        self.began = now
        self.reads: list[Noted] = []
        self.size = 0
        self.replayed: set[tuple[str, int]] = set()
        self._known: set[tuple[str, int]] = set()
        self._looked_at = 0
        self.news = now  # when something was read for the first time, as of the last look

    def is_over(self, now: float) -> bool:
        """Whether it is time to evaluate it; to be asked every second or so."""
        if not self.reads:
            return now - self.began >= WAIT
        reads = self.reads[self._looked_at :]
        self._looked_at += len(reads)
        for pack_id, offset, _, when in reads:
            if (pack_id, offset) not in self._known:
                self._known.add((pack_id, offset))
                self.news = max(self.news, when)
        return self.is_full or now - self.began_reading >= WINDOW or now - self.news >= QUIET

    @property
    def began_reading(self) -> float:
        """When the first read came; there must be one."""
        return self.reads[0][3]

    @property
    def is_full(self) -> bool:
        """Whether nothing more is noted."""
        return self.size >= _BYTES_MAX or len(self.reads) >= _READS_MAX


class Recorder:
    """Recordings of several trees at a time. Thread-safe. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.packs: Mapping[str, tuple[Recording, ...]] = {}  # replaced, never changed
        self.counts: dict[str, int] = {}
        self._clock = clock
        self._lock = threading.Lock()
        self._recordings: dict[str, Recording] = {}
        self._followed: list[Recording] = []

    def begin(self, tree: str, packs: Iterable[str]) -> Recording | None:
        """Record the reads of `packs` for `tree`, just mounted; None when it is recorded already, or too many are."""
        with self._lock:
            if tree in self._recordings or len(self._recordings) >= _RECORDINGS_MAX:
                return None
            recording = self._recordings[tree] = Recording(tree, packs, self._clock())
            self._rearrange()
        return recording

    def note(self, pack_id: str, offset: int, length: int) -> None:
        """Content of a pack was asked for. To be called when `pack_id` is among `packs`."""
        noted = (pack_id, offset, length, self._clock())
        for recording in self.packs.get(pack_id, ()):
            reads = recording.reads
            # `is_full`, without a call: each read comes by here.
            if recording.size < _BYTES_MAX and len(reads) < _READS_MAX:
                reads.append(noted)
                recording.size += length  # a race costs exactness only

    def finished(self, *, all_of_them: bool = False) -> list[Recording]:
        """Those that are over, or all of them; they are recorded no further."""
        now = self._clock()
        with self._lock:
            over = [found for found in self._recordings.values() if all_of_them or found.is_over(now)]
            for recording in over:
                del self._recordings[recording.tree]
            if over:
                self._rearrange()
        return over

    def follow(self, name: str, packs: Iterable[str]) -> Recording | None:
        """Note the reads of `packs` beside whatever is recorded, until `unfollow`; None when too many are followed.

        Whoever follows asks the recording itself whether it is over. `name` takes the place of a tree.
        """
        with self._lock:
            if len(self._followed) >= _FOLLOWED_MAX:
                return None
            recording = Recording(name, packs, self._clock())
            self._followed.append(recording)
            self._rearrange()
        return recording

    def unfollow(self, recording: Recording) -> None:
        """Note no more for it; nothing happens when it is not followed any more."""
        with self._lock:
            if recording in self._followed:
                self._followed.remove(recording)
                self._rearrange()

    @property
    def active(self) -> bool:
        """Whether anything is recorded."""
        return bool(self._recordings)

    def _rearrange(self) -> None:
        packs: dict[str, tuple[Recording, ...]] = {}
        for recording in (*self._recordings.values(), *self._followed):
            for pack_id in recording.packs:
                packs[pack_id] = (*packs.get(pack_id, ()), recording)
        self.packs = packs
