"""boto3's client for a store's bucket, and its errors in Floe's words."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from floe.store.errors import BadInputError, FloeError
from floe.store.objects.answers import Answer
from floe.store.objects.credentials import ATTEMPTS
from floe.store.objects.multipart import AT_ONCE
from floe.store.objects.s3 import S3Store

T = TypeVar("T")
_SILENCE = 30  # seconds


class S3Client:
    """Calls of boto3 with the credentials, region, endpoint and CA of `store`. Thread-safe.

    A call that is refused for its credentials is made again when there are others by then.
    """

    def __init__(self, store: S3Store) -> None:
        self.store = store
        self.bucket = store.address.bucket
        self._lock = threading.Lock()
        self._client: Any = None
        self._made_with: Any = None  # the credentials, as of then

    def call(self, key: str, work: Callable[[Any], T], *, writing: bool = True) -> T:
        """What `work` makes of the client; FloeErrors speak of `key`."""
        for attempt in range(ATTEMPTS):
            client = self._current()
            try:
                return work(client)
            except (ClientError, BotoCoreError) as error:
                if attempt == ATTEMPTS - 1 or not self._renewed(error, client):
                    raise self._error(error, key, writing=writing) from None
        raise AssertionError

    def full_key(self, key: str) -> str:
        """A key of the store as the bucket has it."""
        prefix = self.store.address.prefix
        return f"{prefix}/{key}" if prefix else key

    def close(self) -> None:
        """Release connections."""
        with self._lock, contextlib.suppress(Exception):
            if self._client is not None:
                self._client.close()
            self._client = None

    def _current(self) -> Any:
        with self._lock:
            if self._client is None:
                self._made_with = self.store.credentials.current()
                self._client = _make(self.store)
            return self._client

    def _renewed(self, error: Exception, used: Any) -> bool:
        if not answer_of(error).about_credentials:
            return False
        with self._lock:
            if self._client is not used:
                return True  # another thread was faster
            if not self.store.credentials.renew(self._made_with):
                return False
            self._client = None  # not closed: others may be using it
            return True

    def _error(self, error: Exception, key: str, *, writing: bool) -> FloeError:
        answer = answer_of(error)
        failure = self.store.credentials.failure
        if failure is not None and answer.status is None:
            return failure
        return self.store.refusal(answer, key, writing=writing)


def answer_of(error: Exception) -> Answer:
    """What the server answered, out of one of botocore's errors."""
    if isinstance(error, ClientError):
        found = error.response.get("Error", {})
        code, message = str(found.get("Code", "")), str(found.get("Message", "")).rstrip(".")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if code.isdigit():  # what botocore makes of an answer without a body
            code, message = "", ""
        reason = ": ".join(filter(None, (code, message))) or f"HTTP status {status}"
        return Answer(status, code, reason)
    return Answer(None, "", " ".join(str(error).split())[:200])


def _make(store: S3Store) -> Any:
    address = store.address
    config = Config(
        s3={
            "addressing_style": "path" if address.path_style else "virtual",
            # Parts carry checksums, which are signed: hashing them once more for the signature cost half a second a GiB.
            "payload_signing_enabled": False,
        },
        connect_timeout=5,
        read_timeout=_SILENCE,
        retries={"total_max_attempts": 3, "mode": "standard"},
        max_pool_connections=AT_ONCE,
        # What else they send by themselves, not every S3 server knows; parts carry checksums of ours.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        return store.credentials.session().client(
            "s3",
            region_name=store.region or ("us-east-1" if address.endpoint else None),
            endpoint_url=address.endpoint,
            verify=str(address.ca) if address.ca else None,
            config=config,
        )
    except (BotoCoreError, ValueError) as error:
        raise BadInputError(f"store address {store.url} cannot be used: {error}") from error
