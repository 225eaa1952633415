"""Files to buckets in parts: several at once, and resumed when an earlier upload of the same file was cut off.

What a server keeps of an interrupted upload is asked of the server, nothing is noted on this machine: so it does not
matter which machine goes on, or what it lost. A part that is there is used only when its checksum is that of the local
bytes. docs/FORMAT.md says what an interrupted upload leaves.

At most `AT_ONCE` parts are in memory, and on their way: those are what a killed upload has to send again.
"""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import BinaryIO, Protocol

from floe.store.errors import (
    AccessDeniedError,
    CancelledError,
    FloeError,
    NotFoundError,
    SourceChangedError,
    StoreMissingError,
    UnavailableError,
    UnsupportedError,
)
from floe.store.objects.base import ObjectStore

try:
    from isal.isal_zlib import crc32  # a tenth of zlib's time
except ImportError:  # it is not built for this processor
    from zlib import crc32

_log = logging.getLogger(__name__)

PART = 8 << 20  # bytes; files above this go up in parts of it
AT_ONCE = 8
_MIB = 1 << 20
_MAX_PARTS = 10_000  # S3's and Google's limit
_CANDIDATES = 4  # interrupted uploads of one key that are looked into
ABANDONED = timedelta(days=3)  # an upload that began before that is nobody's any more


@dataclass(frozen=True)
class Upload:
    """A multipart upload that is neither completed nor aborted; `key` relative to the store's root."""

    key: str
    id: str
    begun: datetime


@dataclass(frozen=True)
class StoredPart:
    """A part that the server has: `number` from 1, `size` in bytes, checksums as far as the server tells them.

    `etag` without quotes, often the MD5 in hex; `sha256` in Base64, or empty.
    """

    number: int
    size: int
    etag: str
    sha256: str = ""


class Uploads(Protocol):
    """A server's multipart uploads. Thread-safe; raises FloeErrors: NotFoundError for an upload that is gone."""

    def find(self, prefix: str) -> list[Upload]:
        """Those of keys that begin with `prefix`; a server may tell only those of the very key."""
        ...

    def create(self, key: str) -> str:
        """Begin one; its id."""
        ...

    def parts(self, key: str, upload: str) -> list[StoredPart]:
        """What it has."""
        ...

    def put(self, key: str, upload: str, number: int, body: Body) -> StoredPart:
        """Send a part, replacing one of the same number."""
        ...

    def complete(self, key: str, upload: str, parts: list[StoredPart]) -> None:
        """Make the object of `parts`, which are in order."""
        ...

    def abort(self, key: str, upload: str) -> None:
        """Drop it."""
        ...

    def close(self) -> None:
        """Release connections."""
        ...


class Body(io.BytesIO):
    """A part's bytes on their way; reading them fails once `stop` is set, so that nobody waits for a slow line."""

    def __init__(self, data: bytes, stop: threading.Event | None = None) -> None:
        super().__init__(data)
        self.size = len(data)
        self._stop = stop

    def read(self, size: int | None = -1, /) -> bytes:
        """See io.BytesIO. CancelledError: stopped."""
        if self._stop is not None and self._stop.is_set():
            raise CancelledError("the upload was stopped")
        return super().read(-1 if size is None else size)

    def __len__(self) -> int:
        return self.size

    def md5(self) -> bytes:
        """The MD5 of all bytes: what servers check a part by, not a safeguard."""
        return hashlib.md5(self.getbuffer(), usedforsecurity=False).digest()

    def sha256(self) -> str:
        """The SHA-256 of all bytes in Base64, as S3 writes it."""
        return base64.b64encode(hashlib.sha256(self.getbuffer()).digest()).decode()

    def crc32(self) -> str:
        """The CRC-32 of all bytes in Base64, as S3 writes it: against damage on the way, no name for what they are."""
        return base64.b64encode(crc32(self.getbuffer()).to_bytes(4, "big")).decode()

    def matches(self, part: StoredPart) -> bool:
        """Whether `part` is known to be these bytes."""
        if part.size != self.size:
            return False
        return part.sha256 == self.sha256() if part.sha256 else part.etag == self.md5().hex()


def uploads_of(store: ObjectStore) -> Uploads | None:
    """The multipart uploads of a store; None when it has none."""
    multipart = getattr(getattr(store, "inner", store), "multipart", None)
    return None if multipart is None else multipart.uploads


class Multipart:
    """The multipart uploads of one store; `open_uploads` is called when the first is wanted. Thread-safe."""

    def __init__(self, open_uploads: Callable[[], Uploads]) -> None:
        self._open_uploads = open_uploads
        self._lock = threading.Lock()
        self._uploads: Uploads | None = None
        self._swept = False

    @property
    def uploads(self) -> Uploads:
        """The server's uploads."""
        with self._lock:
            if self._uploads is None:
                self._uploads = self._open_uploads()
            return self._uploads

    def close(self) -> None:
        """Release connections."""
        with self._lock:
            if self._uploads is not None:
                self._uploads.close()

    def put_file(self, key: str, source: BinaryIO, path: Path, progress: Callable[[int], None] | None = None) -> None:
        """Store the open file `source`, called `path`; see ObjectStore.put_file.

        After any error but SourceChangedError the upload stays, for the next call with the same bytes to go on with.
        """
        uploads = self.uploads
        if not self._swept:
            self._swept = True
            with suppress(FloeError):  # a server may not list them, and we may not be allowed to ask
                drop_abandoned(uploads, key.partition("/")[0] + "/")
        _Transfer(uploads, key, source, path, progress).run()


class _Transfer:
    """One file on its way. Its own thread runs it; parts are read and sent by a pool."""

    def __init__(
        self, uploads: Uploads, key: str, source: BinaryIO, path: Path, progress: Callable[[int], None] | None
    ) -> None:
        self._uploads = uploads
        self._key = key
        self._source = source.fileno()
        self._path = path
        self._progress = progress or (lambda _: None)
        self._size = os.fstat(self._source).st_size
        least = -(-self._size // _MAX_PARTS)
        self._part_size = max(PART, -(-least // _MIB) * _MIB)
        self._numbers = range(1, -(-self._size // self._part_size) + 1)
        self._stop = threading.Event()

    def run(self) -> None:
        upload = ""
        pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="floe-part")
        try:
            upload, done = self._resume(pool)
            for part in done.values():
                self._progress(part.size)
            self._send(pool, upload, done)
            if os.fstat(self._source).st_size != self._size:
                raise self._shrunk()
            self._complete(upload, [done[number] for number in self._numbers])
        except SourceChangedError:
            with suppress(FloeError):  # of what is no longer there nobody can make use
                self._uploads.abort(self._key, upload)
            raise
        finally:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _body(self, number: int) -> Body:
        start = (number - 1) * self._part_size
        wanted = min(self._part_size, self._size - start)
        data = os.pread(self._source, wanted, start)
        while len(data) < wanted:
            more = os.pread(self._source, wanted - len(data), start + len(data))
            if not more:
                raise self._shrunk()
            data += more
        return Body(data, self._stop)

    def _shrunk(self) -> SourceChangedError:
        return SourceChangedError(f"{self._path} changed its size while it was stored")

    def _resume(self, pool: ThreadPoolExecutor) -> tuple[str, dict[int, StoredPart]]:
        """The upload to go on with, and those of its parts that are as they should be, by number."""
        try:
            found = [upload for upload in self._uploads.find(self._key) if upload.key == self._key]
            found.sort(key=lambda upload: upload.begun, reverse=True)
            checked = [(upload, self._usable(pool, upload)) for upload in found[:_CANDIDATES]]
        except StoreMissingError:
            raise
        except (AccessDeniedError, UnsupportedError, NotFoundError) as error:
            _log.info("no interrupted upload can be looked for, so all of %s is sent: %s", self._key, error)
            found, checked = [], []
        best, parts = max(checked, key=lambda item: len(item[1]), default=(None, {}))
        for upload in found:
            if upload is not best and datetime.now(timezone.utc) - upload.begun > ABANDONED:
                with suppress(FloeError):
                    self._uploads.abort(upload.key, upload.id)
        if best is None:
            return self._uploads.create(self._key), {}
        _log.info("going on with an upload of %s: %d of %d parts are there", self._key, len(parts), len(self._numbers))
        return best.id, parts

    def _usable(self, pool: ThreadPoolExecutor, upload: Upload) -> dict[int, StoredPart]:
        parts = [part for part in self._uploads.parts(self._key, upload.id) if part.number in self._numbers]
        same = pool.map(lambda part: self._body(part.number).matches(part), parts)
        return {part.number: part for part, is_same in zip(parts, same, strict=True) if is_same}

    def _send(self, pool: ThreadPoolExecutor, upload: str, done: dict[int, StoredPart]) -> None:
        def send(number: int) -> StoredPart:
            body = self._body(number)
            try:
                return self._uploads.put(self._key, upload, number, body)
            except StoreMissingError:
                raise
            except NotFoundError as error:
                raise self._gone() from error

        waiting: set[Future[StoredPart]] = {pool.submit(send, n) for n in self._numbers if n not in done}
        while waiting:
            ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ready:
                part = future.result()
                done[part.number] = part
                self._progress(part.size)

    def _complete(self, upload: str, parts: list[StoredPart]) -> None:
        try:
            self._uploads.complete(self._key, upload, parts)
        except StoreMissingError:
            raise
        except NotFoundError as error:
            raise self._gone() from error

    def _gone(self) -> UnavailableError:
        return UnavailableError(
            f"the upload of {self._key} was completed or dropped by somebody else", hint="try again"
        )


def drop_abandoned(uploads: Uploads, prefix: str) -> tuple[int, int]:
    """Abort uploads of keys that begin with `prefix` and began days ago: how many, and how many younger ones stay."""
    found = uploads.find(prefix)
    old = [upload for upload in found if datetime.now(timezone.utc) - upload.begun > ABANDONED]
    for upload in old:
        with suppress(NotFoundError):
            uploads.abort(upload.key, upload.id)
    return len(old), len(found) - len(old)
