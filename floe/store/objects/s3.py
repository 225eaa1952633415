"""An object store in an S3 bucket, through obstore.

Conditional puts are If-None-Match and If-Match on ETags. AWS honours both; SeaweedFS 4.48 does too, as the contract
suite shows. A server that ignores these headers lets the last writer win, and a `put_if` never fails there.
An ETag is a hash of the content, so a version that was replaced and put back counts as unchanged.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import obstore
from obstore.store import S3Store as Bucket

from floe.store.errors import (
    AccessDeniedError,
    BadInputError,
    ConflictError,
    DamagedError,
    FloeError,
    NotFoundError,
    SourceChangedError,
    ThrottledError,
    UnavailableError,
)
from floe.store.ids import Buffer
from floe.store.objects.base import ObjectInfo
from floe.store.objects.keys import check_key, check_prefix, check_range, short_object
from floe.store.objects.s3_address import S3Address
from floe.store.objects.s3_credentials import credential_provider, default_region
from floe.store.objects.source import open_source

_PART = 8 << 20  # bytes; files above this go up in parts of it
_PARTS_AT_ONCE = 8
_CLIENT: dict[str, Any] = {
    "connect_timeout": timedelta(seconds=5),
    "read_timeout": timedelta(seconds=30),  # silence; also the time that one part may take to go up
    "timeout": timedelta(seconds=120),  # a whole request
}
# Low, since RetryingStore is in charge; not zero, so that one lost part does not cost a 4 GiB upload.
_RETRY: dict[str, Any] = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
_DENIED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_THROTTLED = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests"}


class S3Store:
    """Objects below `s3://bucket/prefix?endpoint=URL&region=R&path_style=true`; BadInputError for other addresses.

    Credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, else boto3's chain. Nothing is sent before the first use.
    """

    def __init__(self, url: str) -> None:
        address = S3Address.parse(url)
        self.url = f"s3://{address.bucket}" + (f"/{address.prefix}" if address.prefix else "")
        self._address = address
        self._credentials = credential_provider()
        config: dict[str, Any] = {"virtual_hosted_style_request": not address.path_style}
        endpoint = address.request_endpoint
        if endpoint is not None:
            config["endpoint"] = endpoint
        region = address.region or default_region()
        if region:
            config["region"] = region
        client = _CLIENT | {"allow_http": endpoint is not None and endpoint.startswith("http://")}
        try:
            self._bucket: Any = Bucket(
                address.bucket,
                prefix=address.prefix or None,
                config=config,  # type: ignore[arg-type, unused-ignore]
                client_options=client,  # type: ignore[arg-type, unused-ignore]
                retry_config=_RETRY,  # type: ignore[arg-type, unused-ignore]
                credential_provider=self._credentials,
            )
        except Exception as error:
            raise BadInputError(f"store address {self.url} cannot be used: {_short(error)}") from error

    def get(self, key: str, start: int = 0, length: int | None = None) -> Buffer:
        """See ObjectStore.get."""
        check_range(key, start, length)
        if length == 0 or (length is None and start):
            # No range stands for "nothing", and a server may answer 416 at the very end: so ask for the size.
            size = self.head(key).size
            length = size - start if length is None else length
            if length < 0 or start + length > size:
                raise short_object(key, start, max(length, 0), size)
            if not length:
                return b""
        with self._errors(key):
            if length is None:
                return memoryview(self._bucket.get(check_key(key)).bytes())
            try:
                data = self._bucket.get_range(check_key(key), start=start, length=length)
            except obstore.exceptions.BaseError as error:
                raise self._range_error(error, key, start, length) from error
        return _whole(data, key, start, length)

    async def get_async(self, key: str, start: int, length: int) -> Buffer:
        """See ObjectStore.get_async."""
        check_range(key, start, length)
        if not length:
            return b""
        with self._errors(key):
            try:
                data = await self._bucket.get_range_async(check_key(key), start=start, length=length)
            except obstore.exceptions.BaseError as error:
                raise self._range_error(error, key, start, length) from error
        return _whole(data, key, start, length)

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        """See ObjectStore.get_versioned."""
        with self._errors(key):
            found = self._bucket.get(check_key(key))
            return bytes(found.bytes()), str(found.meta["e_tag"])

    def head(self, key: str) -> ObjectInfo:
        """See ObjectStore.head."""
        with self._errors(key):
            return _info(self._bucket.head(check_key(key)), key)

    def put(self, key: str, data: Buffer) -> None:
        """See ObjectStore.put."""
        with self._errors(key, writing=True):
            self._bucket.put(check_key(key), bytes(data), use_multipart=False)

    def put_file(self, key: str, path: Path, progress: Callable[[int], None] | None = None) -> None:
        """See ObjectStore.put_file; in parts of 8 MiB, several at once."""
        with open_source(path) as source:
            parts = _Parts(source, path, progress)
            try:
                with self._errors(key, writing=True):
                    if parts.size <= _PART:
                        self._bucket.put(check_key(key), b"".join(parts), use_multipart=False)
                    else:
                        self._bucket.put(
                            check_key(key), iter(parts),
                            use_multipart=True, chunk_size=_PART, max_concurrency=_PARTS_AT_ONCE,
                        )  # fmt: skip
            except FloeError as error:
                raise (parts.failure or error) from error

    def put_if(self, key: str, data: Buffer, version: str | None) -> str:
        """See ObjectStore.put_if."""
        mode: Any = "create" if version is None else {"e_tag": version}
        try:
            with self._errors(key, writing=True):
                done = self._bucket.put(check_key(key), bytes(data), mode=mode, use_multipart=False)
        except NotFoundError as error:
            if version is None or error.hint:  # the bucket is missing
                raise
            raise ConflictError(f"{key} in {self.url} was removed by somebody else") from error
        return str(done["e_tag"])

    def delete(self, key: str) -> None:
        """See ObjectStore.delete."""
        try:
            with self._errors(key, writing=True):
                self._bucket.delete(check_key(key))
        except NotFoundError as error:
            if error.hint:  # the bucket is missing
                raise

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See ObjectStore.list."""
        folder = check_prefix(prefix)
        pages = iter(self._bucket.list(folder or None))
        while True:
            with self._errors(prefix or "the store"):
                page = next(pages, None)
            if page is None:
                return
            for item in page:
                yield _info(item, item["path"])

    def close(self) -> None:
        """See ObjectStore.close; obstore has nothing to close."""

    @contextlib.contextmanager
    def _errors(self, key: str, *, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except (obstore.exceptions.BaseError, OSError, ValueError) as error:
            # From None: obstore's text is pages long, and chained tracebacks would print it.
            raise self._translate(error, key, writing=writing) from None

    def _range_error(self, error: Exception, key: str, start: int, length: int) -> Exception:
        return short_object(key, start, length) if _status(error) == 416 else error

    def _translate(self, error: Exception, key: str, *, writing: bool) -> FloeError:
        verb = "write" if writing else "read"
        where = f"{key} in {self.url}"
        at = self._address.endpoint or "AWS"
        failure = self._credentials.failure
        if failure is not None:
            return AccessDeniedError(
                f"no credentials for {self.url}: {failure}",
                hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine a role or profile",
            )
        text, status = str(error), _status(error)
        code = match[1] if (match := _CODE.search(text)) else ""
        if code == "NoSuchBucket":
            bucket = self._address.bucket
            return NotFoundError(
                f"no bucket {bucket} at {at}", hint=f"create the bucket {bucket}, or check the store's address"
            )
        if isinstance(
            error, (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError)
        ) or status in (
            409,
            412,
        ):
            return ConflictError(f"{where} was changed by somebody else")
        if isinstance(error, FileNotFoundError) or status == 404:
            return NotFoundError(f"no object {where}")
        denied = (obstore.exceptions.PermissionDeniedError, obstore.exceptions.UnauthenticatedError)
        if isinstance(error, denied) or status in (401, 403) or code in _DENIED:
            return AccessDeniedError(
                f"{at} does not let us {verb} {where}: {_short(error)}",
                hint="check the access key, its secret and its rights on the bucket",
            )
        hint = f"check that {at} can be reached from here"
        if status in (429, 503) or code in _THROTTLED:
            return ThrottledError(f"{at} asks to be used less: {_short(error)}", hint="try again later")
        return UnavailableError(f"cannot {verb} {where}: {_short(error)}", hint=hint)


class _Parts:
    """A file's bytes in parts; stops with `failure` set when the file turns out shorter than it was."""

    def __init__(self, source: BinaryIO, path: Path, progress: Callable[[int], None] | None) -> None:
        self._source = source
        self._path = path
        self._progress = progress
        self.size = source.seek(0, 2)
        source.seek(0)
        self.failure: FloeError | None = None

    def __iter__(self) -> Iterator[bytes]:
        left = self.size
        while left:
            part = self._source.read(min(_PART, left))
            if not part:
                self.failure = SourceChangedError(f"{self._path} shrank while it was stored")
                raise self.failure
            left -= len(part)
            yield part
            if self._progress is not None:
                self._progress(len(part))


def _whole(data: Any, key: str, start: int, length: int) -> memoryview:
    view = memoryview(data)
    if len(view) != length:
        raise short_object(key, start, length, start + len(view))
    return view


def _info(meta: Any, key: str) -> ObjectInfo:
    size = meta["size"]
    if not isinstance(size, int):
        raise DamagedError(f"the server did not say how large {key} is")
    return ObjectInfo(key, size, str(meta["e_tag"]))


def _status(error: Exception) -> int | None:
    match = _STATUS.search(str(error))
    return int(match[1]) if match else None


def _short(error: Exception) -> str:
    """One line for people out of obstore's text, which has a reason in XML and then a dump of Rust values."""
    text = str(error)
    if (code := _CODE.search(text)) is not None:
        message = _MESSAGE.search(text)
        return f"{code[1]}: {message[1].rstrip('.')}" if message else code[1]
    if (status := _status(error)) is not None:
        return f"HTTP status {status}"
    for sign, reason in (
        ("kind: Timeout", "no answer in time"),
        ("dns error", "the host's name cannot be resolved"),
        ("Connection refused", "connection refused"),
        ("kind: Connect", "cannot connect"),
        ("kind: Interrupted", "the connection broke"),
        ("kind: Request", "the request failed"),
        ("kind: Decode", "the answer broke off"),
    ):
        if sign in text:
            return reason
    return text.partition("\n")[0][:200]
