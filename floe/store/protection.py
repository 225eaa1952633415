"""Keeps what a push relies on from garbage collection, whatever the two do at the same time.

Object stores delete unconditionally, so nothing could stop a deletion that is decided. Therefore each side first writes what it
is about to do, and then looks what the other has written: a push what it relies on (`gc/pushes/<uuid>`), a collector what it is
about to delete (`gc/removal`). Whoever looked later sees the other: the collector leaves what a push relies on, the push waits
until the collector is done, and looks then whether the object is there. docs/FORMAT.md, "Garbage collection", has the whole of it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, ClassVar

from floe.store import fields, layout
from floe.store.errors import BusyError, ConflictError, FloeError, NotFoundError, StoreMissingError
from floe.store.objects.base import ObjectStore
from floe.store.records import Record

_log = logging.getLogger(__name__)

PATIENCE = 300.0  # seconds that a push waits for a collector that is deleting what it needs
RENEWED_AFTER = 3600.0  # seconds from which on a push says again that it is alive
STALE_AFTER = 86_400.0  # seconds of silence, after which a push no longer believes that it is protected
ABANDONED_AFTER = (
    3 * 86_400.0
)  # seconds of silence, by the store's clock, after which a collector takes a push for dead
_LONGEST_PAUSE = 2.0  # seconds between two looks


@dataclass(frozen=True)
class PushRecord(Record):
    """A push under way: the `keys` it relies on. A pack stands for its index and its chunk table, too."""

    FORMAT: ClassVar[str] = "floe.push"
    REPAIR: ClassVar[str] = "delete it when no push has been running for an hour"

    keys: tuple[str, ...]
    renewed: str

    @classmethod
    def _from_json(cls, value: dict[str, Any]) -> PushRecord:
        return cls(fields.each(value["keys"], "keys", fields.text), fields.text(value["renewed"], "renewed"))


@dataclass(frozen=True)
class Removal(Record):
    """A collector at work: it may delete `keys` at any moment. `turn` grows, so that no two writes are the same bytes."""

    FORMAT: ClassVar[str] = "floe.removal"
    REPAIR: ClassVar[str] = "`floe gc --delete` replaces it after a quarter of an hour"

    owner: str
    host: str
    turn: int
    keys: tuple[str, ...]

    @classmethod
    def _from_json(cls, value: dict[str, Any]) -> Removal:
        return cls(
            fields.text(value["owner"], "owner"),
            fields.text(value["host"], "host"),
            fields.count(value["turn"], "turn"),
            fields.each(value["keys"], "keys", fields.text),
        )


class Protection:
    """What one push relies on in `store`. Thread-safe; calls wait for each other.

    Nothing is written before the first `protect`. `close` ends the protection: after the push has named what it stored.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._key = layout.push_key(str(uuid.uuid4()))
        self._lock = threading.Lock()  # held during I/O: whoever relies on more waits for the record anyway
        self._keys: dict[str, None] = {}
        self._said = 0.0  # CLOCK_BOOTTIME of the last write, tried or done; sleep counts

    def protect(self, keys: Iterable[str]) -> None:
        """From now on no collector removes what is at `keys`; look afterwards whether it is there, or put it.

        Waits for a collector that is removing one of them. BusyError when that takes too long; ConflictError when this
        push stood still for so long that it may have been taken for dead. Raises the store's errors.
        """
        with self._lock:
            new = dict.fromkeys(key for key in keys if key not in self._keys)
            self._check_alive()
            if new:
                self._say({**self._keys, **new})
                self._await_removal(new)
                self._keys |= new

    def renew(self) -> None:
        """Say that the push is alive, if that was not said for an hour; to be called now and then, and before a commit."""
        with self._lock:
            self._check_alive()
            if self._keys and time.clock_gettime(time.CLOCK_BOOTTIME) - self._said > RENEWED_AFTER:
                self._say(self._keys)

    def close(self) -> None:
        """The push has ended, one way or the other."""
        with self._lock:
            if not self._said:
                return
            try:
                self._store.delete(self._key)
            except FloeError as error:
                # Who may not delete says that nothing is needed any more; the next collector removes that.
                _log.debug("%s; it is emptied", error)
                with suppress(FloeError):
                    self._say({})

    def _say(self, keys: Iterable[str]) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")
        self._said = time.clock_gettime(time.CLOCK_BOOTTIME)
        self._store.put(self._key, PushRecord(tuple(keys), now).encode())

    def _check_alive(self) -> None:
        if self._said and time.clock_gettime(time.CLOCK_BOOTTIME) - self._said > STALE_AFTER:
            raise ConflictError(
                "this push stood still for more than a day: what it relies on may have been removed", hint="push again"
            )

    def _await_removal(self, keys: Iterable[str]) -> None:
        until, pause, told = time.monotonic() + PATIENCE, 0.05, False
        wanted = set(keys)
        while (removal := read_removal(self._store)) is not None and not wanted.isdisjoint(removal.keys):
            if time.monotonic() + pause > until:
                key = next(key for key in removal.keys if key in wanted)
                raise BusyError(
                    f"floe gc on {removal.host} is removing {key}, which this push needs",
                    hint="try again when it is done; if it was killed, `floe gc --delete` goes on with it",
                )
            if not told:
                _log.warning("waiting for floe gc on %s, which is removing what this push needs", removal.host)
                told = True
            time.sleep(pause)
            pause = min(_LONGEST_PAUSE, pause * 2)


def read_pushes(store: ObjectStore, since: float = -math.inf) -> Iterator[tuple[str, PushRecord | None]]:
    """The keys and records of pushes; of those that said nothing since `since`, by the store's clock, no record."""
    for info in store.list(layout.PUSHES):
        if info.modified < since:
            yield info.key, None
            continue
        try:
            yield info.key, PushRecord.decode(store.get(info.key), info.key)
        except NotFoundError:  # it has ended
            continue


def read_removal(store: ObjectStore) -> Removal | None:
    """What a collector says it may delete right now; None when there is none."""
    try:
        return Removal.decode(store.get(layout.REMOVAL_KEY), layout.REMOVAL_KEY)
    except StoreMissingError:
        raise
    except NotFoundError:
        return None
