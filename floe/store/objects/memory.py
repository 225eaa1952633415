"""An object store in memory: for tests, and the reference for what the others must do."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from floe.store.errors import ConflictError, NotFoundError
from floe.store.ids import Buffer
from floe.store.objects.base import ObjectInfo, Range
from floe.store.objects.keys import check_key, check_prefix, check_whole, range_length
from floe.store.objects.source import open_source


class _BytesRange:
    """See Range."""

    def __init__(self, data: Buffer) -> None:
        self._rest = memoryview(data)

    def readinto(self, buffer: memoryview) -> None:
        buffer[:] = self._rest[: len(buffer)]
        self._rest = self._rest[len(buffer) :]

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


class MemoryStore:
    """Objects of this process, gone with it. Thread-safe."""

    def __init__(self) -> None:
        self.url = "memory://"
        self._lock = threading.Lock()
        self._objects: dict[str, tuple[bytes, str]] = {}  # key -> content, version
        self._modified: dict[str, float] = {}
        self._versions = itertools.count(1)

    def _find(self, key: str) -> tuple[bytes, str]:
        with self._lock:
            found = self._objects.get(check_key(key))
        if found is None:
            raise NotFoundError(f"no object {key} in {self.url}")
        return found

    def get(self, key: str, start: int = 0, length: int | None = None) -> Buffer:
        """See ObjectStore.get."""
        data, _ = self._find(key)
        if length is None:
            check_whole(key, len(data) - start)
        return data[start : start + range_length(key, len(data), start, length)]

    def open_range(self, key: str, start: int, length: int) -> Range:
        """See ObjectStore.open_range."""
        return _BytesRange(self.get(key, start, length))

    async def get_async(self, key: str, start: int, length: int) -> Buffer:
        """See ObjectStore.get_async."""
        await asyncio.sleep(0)
        return self.get(key, start, length)

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        """See ObjectStore.get_versioned."""
        data, version = self._find(key)
        check_whole(key, len(data))
        return data, version

    def head(self, key: str) -> ObjectInfo:
        """See ObjectStore.head."""
        data, version = self._find(key)
        with self._lock:
            return ObjectInfo(key, len(data), version, self._modified.get(key, 0.0))

    def put(self, key: str, data: Buffer) -> None:
        """See ObjectStore.put."""
        with self._lock:
            self._objects[check_key(key)] = (bytes(data), str(next(self._versions)))
            self._modified[key] = time.time()

    def put_file(self, key: str, path: Path, progress: Callable[[int], None] | None = None) -> None:
        """See ObjectStore.put_file."""
        check_key(key)
        with open_source(path) as source:
            data = source.read()
        self.put(key, data)
        if progress is not None and data:
            progress(len(data))

    def put_if(self, key: str, data: Buffer, version: str | None) -> str:
        """See ObjectStore.put_if."""
        with self._lock:
            found = self._objects.get(check_key(key))
            if (found[1] if found else None) != version:
                raise ConflictError(f"{key} was changed by somebody else")
            fresh = str(next(self._versions))
            self._objects[key] = (bytes(data), fresh)
            self._modified[key] = time.time()
        return fresh

    def delete(self, key: str) -> None:
        """See ObjectStore.delete."""
        with self._lock:
            self._objects.pop(check_key(key), None)
            self._modified.pop(key, None)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See ObjectStore.list."""
        folder = check_prefix(prefix)
        folder = f"{folder}/" if folder else ""
        with self._lock:
            found = [
                ObjectInfo(k, len(d), v, self._modified[k])
                for k, (d, v) in self._objects.items()
                if k.startswith(folder)
            ]
        return iter(found)

    def close(self) -> None:
        """See ObjectStore.close."""
