"""What the ingests of one command share: the chunks on their way into the store, and the room in the spool directory.

Layers of an image are read in parallel, each by an Ingest of its own. A chunk that several of them hold is stored by the one
that meets it first; the others take its place over, and publish their trees only when its pack is in the store.

Nobody waits in a circle: an ingest stores all it has claimed (`Ingest.flush`) before it waits for anybody else's, and who
waits for room in the spool directory has handed on for upload what it holds, but for a share (see spool.Room).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from typing import TypeAlias

from floe.ingest.examine import Examiner
from floe.ingest.packinfo import PackInfo
from floe.ingest.spool import SPOOL_BYTES, Room
from floe.store.errors import CancelledError
from floe.store.nodes import Chunk
from floe.store.objects.base import ObjectStore
from floe.store.protection import Protection

ChunkKey: TypeAlias = "tuple[bytes, int]"  # digest, length in bytes


class Claimant:
    """An ingest, as the others see it. `stored` is done when all that it has claimed is in the store."""

    def __init__(self) -> None:
        self.stored: Future[None] = Future()
        self.lends = False  # somebody took over one of its places; guarded by the lock of Claims


Claim: TypeAlias = "tuple[Chunk, Claimant]"
"""The Chunk that knows its place once the claimant's content is stored; the claimant does not move it afterwards."""


class Claims:
    """Chunks that some ingest is storing right now, until they are in the store. Thread-safe."""

    def __init__(self) -> None:
        self._claimed: dict[ChunkKey, Claim] = {}
        self._settled = 0  # how many claimants' chunks have become the store's
        self._lock = threading.Lock()  # guards both, and Claimant.lends

    @property
    def settled(self) -> int:
        """Changes whenever claimed chunks have become stored ones."""
        with self._lock:
            return self._settled

    def claim(self, claimant: Claimant, wanted: Mapping[ChunkKey, Chunk], settled: int) -> dict[ChunkKey, Claim] | None:
        """Claim chunks; returns those of them that somebody else is storing already.

        None, and nothing is claimed, when others' chunks were stored since `settled` was read: look in the store again.
        """
        with self._lock:
            if settled != self._settled:
                return None
            lent = {key: self._claimed[key] for key in wanted if key in self._claimed}
            for _, lender in lent.values():
                lender.lends = True
            self._claimed.update((key, (chunk, claimant)) for key, chunk in wanted.items() if key not in lent)
            return lent

    def stored(self, claimant: Claimant, keys: Iterable[ChunkKey]) -> None:
        """All that `claimant` has claimed is in the store; `keys` has at least its claims."""
        with self._lock:
            self._drop(claimant, keys)
            self._settled += 1
        claimant.stored.set_result(None)

    def withdraw(self, claimant: Claimant, keys: Iterable[ChunkKey]) -> bool:
        """Take back what `claimant` has claimed; False, and nothing happens, when somebody relies on it."""
        with self._lock:
            if claimant.lends:
                return False
            self._drop(claimant, keys)
            return True

    def fail(self, claimant: Claimant, keys: Iterable[ChunkKey]) -> None:
        """`claimant` has ended without storing what it claimed: whoever waits for it gets a CancelledError."""
        if not claimant.stored.done():
            with self._lock:
                self._drop(claimant, keys)
            claimant.stored.set_exception(CancelledError("content shared with another layer was not stored"))

    def _drop(self, claimant: Claimant, keys: Iterable[ChunkKey]) -> None:
        for key in keys:
            found = self._claimed.get(key)
            if found is not None and found[1] is claimant:
                del self._claimed[key]


class Session:
    """Shared by the ingests of one command into one store. `spool_bytes`: the most they spool at a time.

    What they rely on is protected from garbage collection until `close`: after the command has named what it stored.
    """

    def __init__(self, store: ObjectStore, *, spool_bytes: int = SPOOL_BYTES) -> None:
        self.protection = Protection(store)
        self.packs = PackInfo(store, self.protection)
        self.examiner = Examiner(store)
        self.claims = Claims()
        self.room = Room(spool_bytes)
        self._stopping = threading.Event()

    @property
    def stopping(self) -> bool:
        """Whether all ingests are to end."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """Let all ingests end soon, uploads under way included."""
        self._stopping.set()
        self.room.wake()

    def close(self) -> None:
        """Nothing is relied on any more."""
        self.protection.close()
