"""What the stores in buckets share: requests through obstore, errors in Floe's words, credentials that change.

A request that the server refuses because of its credentials is made again when their source has others by then.

obstore's threads, and the epoll that they wait at, are one for the whole process. A forked child has the epoll without the
threads: a request there is never answered, and may crash the parent. So it is refused; ranges can be read all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import obstore

from floe.store.errors import (
    BadInputError,
    ConflictError,
    CredentialsExpiredError,
    DamagedError,
    FloeError,
    NotFoundError,
    RangeError,
    StoreMissingError,
    UnsupportedError,
)
from floe.store.ids import Buffer
from floe.store.objects.address import read_certificates
from floe.store.objects.answers import Answer, Place, error_of, from_text
from floe.store.objects.base import ObjectInfo, Range
from floe.store.objects.credentials import ATTEMPTS, RenewableCredentials, Supply
from floe.store.objects.http_ranges import HTTPRange, HTTPRanges, Location
from floe.store.objects.keys import check_key, check_prefix, check_range, check_whole, short_object
from floe.store.objects.multipart import PART, Multipart, Uploads
from floe.store.objects.source import open_source

T = TypeVar("T")

_CLIENT: dict[str, Any] = {
    "connect_timeout": timedelta(seconds=5),
    "read_timeout": timedelta(seconds=30),  # silence
    "timeout": timedelta(seconds=120),  # a whole request
}
# Low, since RetryingStore is in charge.
_RETRY: dict[str, Any] = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}
_CONFLICTS = (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError)
_CAUGHT = (obstore.exceptions.BaseError, OSError, ValueError)


class _Threads:
    """obstore's: whether they have `begun` in this process, or were `lost` since it was forked from one where they had."""

    begun = lost = False

    def leave_to_parent(self) -> None:
        """Called in a forked child."""
        self.lost = self.begun

    def check(self) -> None:
        """UnsupportedError where no request would be answered."""
        if self.lost:
            raise UnsupportedError(
                "this process was forked from one that had used a bucket, and can make no requests to one",
                hint="start such processes with spawn or forkserver, or fork before the first use of a bucket",
            )


_threads = _Threads()
check_threads = _threads.check
os.register_at_fork(after_in_child=_threads.leave_to_parent)


@dataclass(frozen=True)
class _Opened:
    """An obstore store, and where it has its credentials from."""

    store: Any
    supply: Supply

    @property
    def bucket(self) -> Any:
        """The store, for requests. UnsupportedError in a child that can make none."""
        _threads.check()
        return self.signer

    @property
    def signer(self) -> Any:
        """The store, for signatures: they begin the threads, but ask nothing of them."""
        _threads.begun = True
        return self.store


class BucketStore:
    """An ObjectStore over obstore's store of the class `kind`, opened with `config`; subclasses know the service.

    It is opened again when credentials were replaced, since obstore keeps those it has. `base`: what URLs begin with;
    None: the service's own. `ca`: PEM certificates, trusted besides the system's. Thread-safe.
    """

    def __init__(
        self,
        place: Place,
        credentials: RenewableCredentials,
        kind: Any,
        prefix: str,
        config: dict[str, Any],
        *,
        base: str | None,
        ca: Path | None,
    ) -> None:
        self.url = place.url
        self.place = place
        self._credentials = credentials
        client = _CLIENT | {"allow_http": base is not None and base.startswith("http://")}
        if ca is not None:
            client["root_certificate"] = read_certificates(ca)

        def open_bucket() -> _Opened:
            supply = Supply(credentials)
            bucket = kind(
                place.bucket,
                prefix=prefix or None,
                config=config,
                client_options=client,
                retry_config=_RETRY,
                credential_provider=supply,
            )
            return _Opened(bucket, supply)

        self._open_bucket = open_bucket
        self._renewing = threading.Lock()
        self._proven = False  # the server has accepted the credentials in use
        try:
            self._opened = open_bucket()
        except Exception as error:
            raise BadInputError(f"store address {self.url} cannot be used: {from_text(str(error)).reason}") from error
        self.multipart = Multipart(self._open_uploads)
        self._ranges = HTTPRanges(self._locate, ca)

    def get(self, key: str, start: int = 0, length: int | None = None) -> Buffer:
        """See ObjectStore.get."""
        check_key(key)
        check_range(key, start, length)
        if length == 0 or (length is None and start):
            # No range stands for "nothing", and a server may answer 416 at the very end: so ask for the size.
            size = self.head(key).size
            length = size - start if length is None else length
            if length < 0 or start + length > size:
                raise short_object(key, start, max(length, 0), size)
            if not length:
                return b""
        if length is None:
            return memoryview(self._request(key, lambda bucket: _read_whole(bucket, key)[0]))
        wanted = length
        if _threads.lost:
            return self._read_alone(HTTPRange(self._ranges, key, start, wanted), key, start, wanted)
        data = self._request(
            key, lambda bucket: bucket.get_range(key, start=start, length=wanted), asked=(start, wanted)
        )
        return _whole(data, key, start, wanted)

    def open_range(self, key: str, start: int, length: int) -> Range:
        """See ObjectStore.open_range."""
        check_range(key, start, length)
        check_key(key)
        return self._ranges.open(key, start, length)

    async def get_async(self, key: str, start: int, length: int) -> Buffer:
        """See ObjectStore.get_async."""
        check_range(key, start, length)
        check_key(key)
        if not length:
            return b""
        if _threads.lost:
            alone = HTTPRange(self._ranges, key, start, length)
            try:
                return await asyncio.to_thread(self._read_alone, alone, key, start, length)
            except asyncio.CancelledError:
                alone.abort()
                raise
        for attempt in range(ATTEMPTS):
            opened, handed = self._opened, self._opened.supply.last
            try:
                data = await opened.bucket.get_range_async(key, start=start, length=length)
                break
            except _CAUGHT as error:
                last = attempt == ATTEMPTS - 1
                if last or not await asyncio.to_thread(self._renewed, error, opened, handed):
                    raise self._error(error, key, asked=(start, length)) from None
        self._proven = True
        return _whole(data, key, start, length)

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        """See ObjectStore.get_versioned."""
        check_key(key)

        def read(bucket: Any) -> tuple[bytes, str]:
            data, meta = _read_whole(bucket, key)
            return bytes(data), self._version(meta)

        return self._request(key, read)

    def head(self, key: str) -> ObjectInfo:
        """See ObjectStore.head."""
        check_key(key)
        return self._info(self._request(key, lambda bucket: bucket.head(key)), key)

    def put(self, key: str, data: Buffer) -> None:
        """See ObjectStore.put."""
        check_key(key)
        self._request(key, lambda bucket: bucket.put(key, bytes(data), use_multipart=False), writing=True)

    def put_file(self, key: str, path: Path, progress: Callable[[int], None] | None = None) -> None:
        """See ObjectStore.put_file; above 8 MiB in parts, several at once, resumed where an earlier call was cut off."""
        check_key(key)
        with open_source(path) as source:
            size = source.seek(0, 2)
            source.seek(0)
            if size > PART:
                self.multipart.put_file(key, source, path, progress)
                return
            data = source.read()
        self.put(key, data)
        if progress is not None and data:
            progress(len(data))

    def put_if(self, key: str, data: Buffer, version: str | None) -> str:
        """See ObjectStore.put_if."""
        check_key(key)
        mode = "create" if version is None else self._condition(version)
        try:
            done = self._request(
                key, lambda bucket: bucket.put(key, bytes(data), mode=mode, use_multipart=False), writing=True
            )
        except StoreMissingError:
            raise
        except NotFoundError as error:
            if version is None:
                raise
            raise ConflictError(f"{key} in {self.url} was removed by somebody else") from error
        return self._version(done)

    def delete(self, key: str) -> None:
        """See ObjectStore.delete."""
        check_key(key)
        try:
            self._request(key, lambda bucket: bucket.delete(key), writing=True)
        except StoreMissingError:
            raise
        except NotFoundError:
            return

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See ObjectStore.list."""
        folder = check_prefix(prefix)
        what = prefix or "the store"

        def begin(bucket: Any) -> tuple[Any, Any]:
            pages = iter(bucket.list(folder or None))
            return pages, next(pages, None)

        pages, page = self._request(what, begin)
        while page is not None:
            for item in page:
                if not item["path"].endswith("/"):  # a folder, as consoles make them
                    yield self._info(item, item["path"])
            with self._errors(what):
                page = next(pages, None)

    def close(self) -> None:
        """See ObjectStore.close; obstore has nothing to close."""
        self._ranges.close()
        self.multipart.close()

    def _read_alone(self, wanted: HTTPRange, key: str, start: int, length: int) -> Buffer:
        """A range without obstore's threads, and so without a rest from failures: there is no other way.

        RangeError, which may pass, where it fails and nobody says why.
        """
        data = memoryview(bytearray(length))
        try:
            wanted.readinto(data)
        except RangeError:
            if wanted.proxied:
                _threads.check()
            if wanted.refused == 416:
                raise short_object(key, start, length) from None
            if wanted.refused is not None:
                raise self.refusal(Answer(wanted.refused, "", f"HTTP status {wanted.refused}"), key) from None
            raise
        finally:
            wanted.close()
        return data

    # What subclasses know

    def _locate(self, key: str) -> Location:
        raise NotImplementedError

    def _version(self, meta: Any) -> str:
        raise NotImplementedError

    def _condition(self, version: str) -> dict[str, str]:
        raise NotImplementedError

    def _open_uploads(self) -> Uploads:
        raise NotImplementedError

    # Requests and their errors

    def _request(
        self, key: str, call: Callable[[Any], T], *, writing: bool = False, asked: tuple[int, int] | None = None
    ) -> T:
        """What `call` makes of the bucket, with Floe's errors; again where other credentials turn up meanwhile."""
        for attempt in range(ATTEMPTS):
            opened, handed = self._opened, self._opened.supply.last
            try:
                done = call(opened.bucket)
                break
            except _CAUGHT as error:
                if attempt == ATTEMPTS - 1 or not self._renewed(error, opened, handed):
                    # From None: obstore's text is pages long, and chained tracebacks would print it.
                    raise self._error(error, key, writing=writing, asked=asked) from None
        self._proven = True
        return done

    @contextlib.contextmanager
    def _errors(self, key: str, *, writing: bool = False, asked: tuple[int, int] | None = None) -> Iterator[None]:
        try:
            yield
        except _CAUGHT as error:
            raise self._error(error, key, writing=writing, asked=asked) from None

    def _renewed(self, error: Exception, used: _Opened, handed: Any) -> bool:
        """Whether the request is worth another try; `handed`: the credentials that `used` had when it was made."""
        if not from_text(str(error)).about_credentials:
            return False
        refused = used.supply.last if handed is None else handed
        with self._renewing:
            if self._opened is not used:
                return True  # another thread was faster
            if not self._credentials.renew(refused):
                return False
            self._opened = self._open_bucket()
            return True

    def refusal(self, answer: Answer, key: str, *, writing: bool = False) -> FloeError:
        """The error for what the server answered."""
        return error_of(answer, key, self.place, writing=writing, proven=self._proven)

    def _error(
        self, error: Exception, key: str, *, writing: bool = False, asked: tuple[int, int] | None = None
    ) -> FloeError:
        answer = from_text(str(error))
        failure = self._credentials.failure
        if failure is not None and answer.status is None:  # what the server answered, it answered for another reason
            return failure
        if asked is not None and answer.status == 416:
            return short_object(key, *asked)
        if isinstance(error, _CONFLICTS):
            answer = Answer(412, answer.code, answer.reason)
        elif answer.status is None and isinstance(error, FileNotFoundError):
            answer = Answer(404, answer.code, answer.reason)
        found = self.refusal(answer, key, writing=writing)
        if self._proven and answer.status == 401 and not isinstance(found, CredentialsExpiredError):
            return CredentialsExpiredError(str(found), hint=found.hint)
        return found

    def _info(self, meta: Any, key: str) -> ObjectInfo:
        size = meta["size"]
        if not isinstance(size, int):
            raise DamagedError(f"the server did not say how large {key} is")
        return ObjectInfo(key, size, self._version(meta), meta["last_modified"].timestamp())


def _read_whole(bucket: Any, key: str) -> tuple[Any, Any]:
    """An object's bytes and what the server says of it; DamagedError before any are read when it is too large."""
    found = bucket.get(key)
    check_whole(key, found.meta["size"])
    return found.bytes(), found.meta


def _whole(data: Any, key: str, start: int, length: int) -> memoryview:
    view = memoryview(data)
    if len(view) != length:
        raise short_object(key, start, length, start + len(view))
    return view
