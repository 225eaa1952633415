"""An index whose answers are timed: how long it takes, how often it fails, and whether it answered last."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from floe.store.errors import FloeError
from floe.store.histogram import Histogram
from floe.store.index.base import ChunkPlace, Index, Note
from floe.store.packindex import ChunkEntry

UNUSED, OK, FAILING = "unused", "ok", "failing"
STATES = (UNUSED, OK, FAILING)
"""Nothing was asked of it since the start; the last request was answered; it failed."""
T = TypeVar("T")


class MeasuredIndex:
    """`inner`, with requests counted. Thread-safe."""

    def __init__(self, inner: Index) -> None:
        self.inner = inner
        self.url = inner.url
        self._lock = threading.Lock()
        self._seconds = Histogram()
        self._errors = 0
        self._state = UNUSED

    def status(self) -> dict[str, Any]:
        """`kind` (the address's scheme), `state` (STATES), `errors`, and `seconds` as Histogram.encode gives it."""
        with self._lock:
            kind = self.url.partition(":")[0]
            return {"kind": kind, "state": self._state, "errors": self._errors, "seconds": self._seconds.encode()}

    def _timed(self, call: Callable[[], T]) -> T:
        started, failed = time.monotonic(), False
        try:
            return call()
        except FloeError:
            failed = True
            raise
        finally:
            with self._lock:
                self._seconds.add(time.monotonic() - started)
                self._errors += failed
                self._state = FAILING if failed else OK

    def bind(self, store_uuid: str) -> None:
        """See Index.bind; most indexes ask nobody for it."""
        self.inner.bind(store_uuid)

    def find_chunks(self, keys: Iterable[tuple[bytes, int]]) -> Mapping[tuple[bytes, int], ChunkPlace]:
        """See Index.find_chunks."""
        return self._timed(lambda: self.inner.find_chunks(keys))

    def pack_ids(self) -> set[str]:
        """See Index.pack_ids."""
        return self._timed(self.inner.pack_ids)

    def add_pack(self, pack_id: str, chunks: Iterable[ChunkEntry]) -> None:
        """See Index.add_pack."""
        self._timed(lambda: self.inner.add_pack(pack_id, chunks))

    def remove_packs(self, pack_ids: Iterable[str]) -> None:
        """See Index.remove_packs."""
        self._timed(lambda: self.inner.remove_packs(pack_ids))

    def get_ref(self, key: str) -> bytes | None:
        """See Index.get_ref."""
        return self._timed(lambda: self.inner.get_ref(key))

    def put_ref(self, key: str, data: bytes) -> None:
        """See Index.put_ref."""
        self._timed(lambda: self.inner.put_ref(key, data))

    def delete_ref(self, key: str) -> None:
        """See Index.delete_ref."""
        self._timed(lambda: self.inner.delete_ref(key))

    def put_note(self, topic: str, name: str, data: bytes, seconds: float) -> None:
        """See Index.put_note."""
        self._timed(lambda: self.inner.put_note(topic, name, data, seconds))

    def notes(self, topic: str) -> Mapping[str, Note]:
        """See Index.notes."""
        return self._timed(lambda: self.inner.notes(topic))

    def delete_note(self, topic: str, name: str) -> None:
        """See Index.delete_note."""
        self._timed(lambda: self.inner.delete_note(topic, name))

    def close(self) -> None:
        """See Index.close."""
        self.inner.close()
