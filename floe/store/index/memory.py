"""An index in memory: what a push uses when no other index can be reached."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping

from floe.store.index.base import ChunkPlace, Note
from floe.store.packindex import ChunkEntry


class MemoryIndex:
    """The index of one process, gone with it: some 200 bytes of memory for each chunk. Thread-safe."""

    def __init__(self) -> None:
        self.url = "memory"
        self._lock = threading.Lock()
        self._store_uuid: str | None = None
        self._clear()

    def _clear(self) -> None:
        self._packs: dict[str, list[tuple[bytes, int]]] = {}  # pack id -> the keys of its chunks
        self._chunks: dict[tuple[bytes, int], dict[str, int]] = {}  # chunk key -> pack id -> block
        self._refs: dict[str, bytes] = {}
        self._notes: dict[str, dict[str, tuple[bytes, float, float]]] = {}  # topic -> name -> data, written, until

    def bind(self, store_uuid: str) -> None:
        """See Index.bind."""
        with self._lock:
            if self._store_uuid not in (None, store_uuid):
                self._clear()
            self._store_uuid = store_uuid

    def find_chunks(self, keys: Iterable[tuple[bytes, int]]) -> Mapping[tuple[bytes, int], ChunkPlace]:
        """See Index.find_chunks."""
        found = {}
        with self._lock:
            for key in keys:
                for pack_id, block in self._chunks.get(key, {}).items():
                    found[key] = ChunkPlace(pack_id, block)
                    break
        return found

    def pack_ids(self) -> set[str]:
        """See Index.pack_ids."""
        with self._lock:
            return set(self._packs)

    def add_pack(self, pack_id: str, chunks: Iterable[ChunkEntry]) -> None:
        """See Index.add_pack."""
        entries = list(chunks)
        with self._lock:
            self._packs[pack_id] = [(c.digest, c.length) for c in entries]
            for chunk in entries:
                self._chunks.setdefault((chunk.digest, chunk.length), {})[pack_id] = chunk.block

    def remove_packs(self, pack_ids: Iterable[str]) -> None:
        """See Index.remove_packs."""
        with self._lock:
            for pack_id in pack_ids:
                for key in self._packs.pop(pack_id, ()):
                    places = self._chunks.get(key, {})
                    places.pop(pack_id, None)
                    if not places:
                        self._chunks.pop(key, None)

    def get_ref(self, key: str) -> bytes | None:
        """See Index.get_ref."""
        with self._lock:
            return self._refs.get(key)

    def put_ref(self, key: str, data: bytes) -> None:
        """See Index.put_ref."""
        with self._lock:
            self._refs[key] = data

    def delete_ref(self, key: str) -> None:
        """See Index.delete_ref."""
        with self._lock:
            self._refs.pop(key, None)

    def put_note(self, topic: str, name: str, data: bytes, seconds: float) -> None:
        """See Index.put_note."""
        now = time.monotonic()
        with self._lock:
            self._notes.setdefault(topic, {})[name] = (data, now, now + seconds)

    def notes(self, topic: str) -> Mapping[str, Note]:
        """See Index.notes."""
        now = time.monotonic()
        with self._lock:
            kept = {name: note for name, note in self._notes.get(topic, {}).items() if now < note[2]}
            self._notes[topic] = kept
            return {name: Note(data, now - written) for name, (data, written, _) in kept.items()}

    def delete_note(self, topic: str, name: str) -> None:
        """See Index.delete_note."""
        with self._lock:
            self._notes.get(topic, {}).pop(name, None)

    def close(self) -> None:
        """See Index.close."""
