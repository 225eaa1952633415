"""The index of a fleet, in Redis. Everything in it can be lost at any time, or be lost in part; see keys.py.

Look-ups of refs, which mounts wait for, are bounded by the clock, whatever hangs: READ_SECONDS each, and an index that
fails or is slow raises UnavailableError, after which the catalog leaves it alone for a while. Writes of refs
that the servers refuse are given up silently but for one line. What a push does is repeated for
PUSH_SECONDS, long enough for a fail-over, then it too raises UnavailableError and the push goes on with the bucket.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from floe.store.bounded import Bounded
from floe.store.errors import DeadlineError, UnavailableError
from floe.store.index.base import ChunkPlace, Note
from floe.store.index.redis import chunkmap, notes
from floe.store.index.redis.address import RedisAddress
from floe.store.index.redis.errors import ConnectingError
from floe.store.index.redis.facts import Facts
from floe.store.index.redis.keys import MARKER, Keys
from floe.store.index.redis.link import Link
from floe.store.packindex import ChunkEntry

if TYPE_CHECKING:
    from floe.store.index.redis.connecting import Server

_log = logging.getLogger(__name__)
T = TypeVar("T")

READ_SECONDS = 0.25  # the longest that a look-up of a ref, or writing one back, may take
SLOW_SECONDS, SLOW_READS = 0.1, 3  # so many answers in a row slower than this, and the bucket is asked instead
CONNECT_SECONDS = 10.0  # the longest that a push waits for a connection
PUSH_SECONDS = 10.0  # how long a failing operation of a push is repeated; a fail-over takes some seconds
FIRST_SECONDS = 2.0  # the same as long as the index never answered this process
CHECK_SECONDS = 1.0  # how old the knowledge may be that nothing was lost, while a push looks chunks up
REFUSED_SECONDS = 60.0  # how long no ref is written after one was refused, and how often a miss is asked about
FILLING_SECONDS = 60  # after which a push that said it fills the index, and died, is not believed
_PAUSES = (0.1, 0.2, 0.5, 1.0)  # seconds between attempts, the last one repeated
_PLACES = 16  # look-ups of refs at once


class RedisIndex:
    """The index at `address`. Thread-safe. Nothing is connected before the first use."""

    def __init__(self, address: RedisAddress) -> None:
        self.url = address.shown
        self._address = address
        self._link = Link(address, CONNECT_SECONDS)
        self._bounded = Bounded("index-read", _PLACES)
        self._lock = threading.RLock()  # guards what follows; held while the packs are loaded, by pushes only
        self._keys: Keys | None = None
        self._known: chunkmap.Known | None = None
        self._checked = 0.0  # time.monotonic() of the last look at the markers
        self._filling = False  # this process began a generation, and its sync is not over
        self._answered = False  # a push was connected
        self._slow = 0  # slow answers in a row
        self._refused_until = 0.0
        self._warned = False
        self._looked_at: Server | None = None  # the connection whose INFO was read
        self._empty: bool | None = None  # as it was last seen by a look-up of a ref
        self._empty_checked = -REFUSED_SECONDS

    def bind(self, store_uuid: str) -> None:
        """See Index.bind. Stores have keys of their own here: nothing is emptied, and nothing asked yet."""
        with self._lock:
            if self._keys is None or self._keys.store_uuid != store_uuid:
                self._keys = Keys(self._address.prefix, store_uuid)
                self._known = None

    # Refs: what mounts look up

    def get_ref(self, key: str) -> bytes | None:
        """See Index.get_ref; None also while the connection is being made."""
        keys = self._bound()
        try:
            data = self._quickly(lambda server: server.client.get(keys.ref(key)))
            if data is None:
                self._note_emptiness(keys)
        except ConnectingError:
            return None
        return None if data is None else bytes(data)

    def put_ref(self, key: str, data: bytes) -> None:
        """See Index.put_ref."""
        keys = self._bound()
        self._write_ref(lambda server: server.client.set(keys.ref(key), data))

    def delete_ref(self, key: str) -> None:
        """See Index.delete_ref."""
        keys = self._bound()
        self._write_ref(lambda server: server.client.delete(keys.ref(key)))

    # Chunks: what pushes look up

    def pack_ids(self) -> set[str]:
        """See Index.pack_ids."""
        return set(self._patiently(lambda server: self._load(server).packs.values()))

    def find_chunks(self, keys: Iterable[tuple[bytes, int]]) -> Mapping[tuple[bytes, int], ChunkPlace]:
        """See Index.find_chunks; UnavailableError when the index was emptied, or a part of it, since `pack_ids`."""
        wanted = list(keys)
        if not wanted:
            return {}

        def find(server: Server) -> dict[tuple[bytes, int], ChunkPlace] | None:
            known = self._current(server)
            if self._filling:
                server.client.delete(self._bound().filling)
                self._filling = False
            now = time.monotonic()
            check = now - self._checked >= CHECK_SECONDS
            found = chunkmap.find(server, self._bound(), known, wanted, check=check)
            if check and found is not None:
                self._checked = now
            return found

        found = self._patiently(find)
        if found is None:
            with self._lock:
                self._known = None
            raise UnavailableError(
                f"index {self.url} was emptied or replaced meanwhile",
                hint="nothing is lost: the next push fills it again",
            )
        return found

    def add_pack(self, pack_id: str, chunks: Iterable[ChunkEntry]) -> None:
        """See Index.add_pack; not one transaction, but the pack counts as known only once all chunks are in."""
        entries = list(chunks)

        def add(server: Server) -> None:
            known = self._current(server)
            if self._filling:
                server.client.set(self._bound().filling, b"", ex=FILLING_SECONDS)
            chunkmap.add(server, self._bound(), known, pack_id, entries, url=self.url)

        self._patiently(add)

    def remove_packs(self, pack_ids: Iterable[str]) -> None:
        """See Index.remove_packs; looks at every chunk, which garbage collection can afford."""
        gone = list(pack_ids)
        if gone:
            self._patiently(lambda server: chunkmap.remove(server, self._bound(), self._current(server), gone))

    # Notes: what nodes and operators tell each other

    def put_note(self, topic: str, name: str, data: bytes, seconds: float) -> None:
        """See Index.put_note."""
        self._patiently(lambda server: notes.put(server, self._bound(), (topic, name), data, seconds))

    def notes(self, topic: str) -> Mapping[str, Note]:
        """See Index.notes."""
        return self._patiently(lambda server: notes.read(server, self._bound(), topic))

    def delete_note(self, topic: str, name: str) -> None:
        """See Index.delete_note."""
        self._patiently(lambda server: notes.delete(server, self._bound(), topic, name))

    def close(self) -> None:
        """See Index.close."""
        self._link.close()

    # Shared by the above

    def _bound(self) -> Keys:
        if self._keys is None:
            raise UnavailableError(f"index {self.url} was not bound to a store")
        return self._keys

    def _current(self, server: Server) -> chunkmap.Known:
        with self._lock:
            return self._known or self._load(server)

    def _load(self, server: Server) -> chunkmap.Known:
        with self._lock:
            facts = Facts.of(server.infos())
            self._warn(facts)
            self._known, self._filling = chunkmap.load(server, self._bound(), facts, self.url)
            self._checked = time.monotonic()
            return self._known

    def _warn(self, facts: Facts) -> None:
        warning = facts.warning(self.url)
        if warning and not self._warned:
            self._warned = True
            _log.warning("%s", warning)

    def _quickly(self, work: Callable[[Server], T]) -> T:
        """`work` within READ_SECONDS, connecting included. ConnectingError, or UnavailableError for everything else."""
        server = self._link.server(READ_SECONDS)
        if self._looked_at is not server:
            self._looked_at = server
            self._warn(Facts.of([server.info]))
        late = DeadlineError(
            f"index {self.url} does not answer within {READ_SECONDS} s", hint="check the server and the network"
        )
        asked = time.monotonic()
        result = self._translating(server, lambda: self._bounded.call(lambda: work(server), READ_SECONDS, late))
        took = time.monotonic() - asked
        self._slow = self._slow + 1 if took > SLOW_SECONDS else 0
        if self._slow >= SLOW_READS:
            self._slow = 0
            raise UnavailableError(
                f"index {self.url} takes {took:.2f} s for an answer: the bucket is asked instead",
                hint="check the server and the network",
            )
        return result

    def _write_ref(self, work: Callable[[Server], Any]) -> None:
        from floe.store.index.redis.faults import refuses_to_write  # noqa: PLC0415 - it imports redis

        if time.monotonic() < self._refused_until:
            return
        try:
            self._quickly(work)
        except ConnectingError:
            return
        except UnavailableError as error:
            if not refuses_to_write(error):
                raise
            first = not self._refused_until
            self._refused_until = time.monotonic() + REFUSED_SECONDS
            _log.log(logging.WARNING if first else logging.DEBUG, "%s; refs are not written to it", error)

    def _note_emptiness(self, keys: Keys) -> None:
        """Say once when the index turns out to hold nothing of the store; asked once in a while, after a miss."""
        now = time.monotonic()
        if now - self._empty_checked < REFUSED_SECONDS:
            return
        self._empty_checked = now
        empty = not self._quickly(lambda server: server.client.hexists(keys.packs(0), MARKER))
        if empty and not self._empty:
            _log.warning(
                "index %s is empty or was replaced: layers are looked up in the bucket, the next push fills it again",
                self.url,
            )
        self._empty = empty

    def _patiently(self, work: Callable[[Server], T]) -> T:
        """`work`, repeated for PUSH_SECONDS while it fails; what is repeated must do no harm the second time."""
        began = time.monotonic()
        attempt = 0
        while True:
            try:
                server = self._link.server(CONNECT_SECONDS)
                self._answered = True
                return self._translating(server, lambda: work(server))  # noqa: B023 - called at once
            except UnavailableError as error:
                pause = _PAUSES[min(attempt, len(_PAUSES) - 1)]
                limit = PUSH_SECONDS if self._answered else min(PUSH_SECONDS, FIRST_SECONDS)
                if not error.retryable or time.monotonic() + pause > began + limit:
                    raise
            attempt += 1
            time.sleep(pause)

    def _translating(self, server: Server, work: Callable[[], T]) -> T:
        from floe.store.index.redis.faults import translate  # noqa: PLC0415 - it imports redis

        try:
            return work()
        except Exception as error:  # whatever it is: no mount and no push may end with it
            told = translate(error, self.url)
            if told.retryable and not isinstance(told, DeadlineError):
                self._link.drop(server)
            if told is error:
                raise
            raise told from error
