"""Passwords that change: read from a file, or signed by AWS IAM, each time a connection authenticates.

MemoryDB and ElastiCache take as password a presigned request, good for 15 minutes, and end a connection 12 hours after its
last AUTH. Sources: "Authenticating with IAM" in the user guides of Amazon MemoryDB and of Amazon ElastiCache.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import redis

from floe.store.errors import UnavailableError
from floe.store.index.redis.address import RedisAddress

TOKEN_SECONDS = 900
_RENEW = (
    600.0  # seconds after which a new token is signed: the rest is for clocks that differ, and for a slow connection
)
# The shortest time between two AUTHs of a connection, in seconds. Far below the 12 hours of IAM, and no load.
REAUTH_SECONDS = 6 * 3600.0


def provider(address: RedisAddress) -> redis.CredentialProvider | None:
    """What gives user and password for the servers at `address`; None when they want none."""
    if address.option("iam"):
        return IamCredentials(address)
    file = address.option("password_file")
    if file:
        return FileCredentials(address.user, Path(file))
    if address.password or address.user:
        return redis.UsernamePasswordCredentialProvider(address.user, address.password)
    return None


class FileCredentials(redis.CredentialProvider):
    """A password from the first line of a file, read anew for each connection: it may be rotated at any time."""

    def __init__(self, user: str | None, path: Path) -> None:
        self._user = user
        self._path = path

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """(user, password), or (password,) without a user. UnavailableError when the file cannot be read."""
        try:
            password = self._path.read_text().splitlines()[0].strip()
        except (OSError, UnicodeDecodeError, IndexError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it holds no text"
            raise UnavailableError(
                f"cannot read the index's password from {self._path}: {reason}", hint="put it on the file's first line"
            ) from error
        return (self._user, password) if self._user else (password,)


class IamCredentials(redis.CredentialProvider):
    """The user of `address` and a token for it. Thread-safe. `sign`: url -> presigned url; `clock` in seconds."""

    def __init__(
        self,
        address: RedisAddress,
        sign: Callable[[str, str, str | None], str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        service, self._region = address.option("iam") or "", address.option("region")
        self._user = address.user or ""
        query = {"Action": "connect", "User": self._user}
        if service == "elasticache-serverless":
            query["ResourceType"] = "ServerlessCache"
        self._service = service.partition("-")[0]
        self._url = f"https://{address.option('name')}/?{urlencode(query)}"
        self._sign = sign or presign
        self._clock = clock
        self._lock = threading.Lock()
        self._token: tuple[float, str] | None = None

    def get_credentials(self) -> tuple[str, str]:
        """(user, token); the token is good for at least another five minutes."""
        with self._lock:
            now = self._clock()
            if self._token is None or now - self._token[0] >= _RENEW:
                signed = self._sign(self._url, self._service, self._region)
                self._token = (now, signed.removeprefix("https://"))
            return self._user, self._token[1]


def presign(url: str, service: str, region: str | None) -> str:
    """`url` presigned for TOKEN_SECONDS with boto3's credentials; UnavailableError when it has none or no region."""
    import boto3  # noqa: PLC0415 - takes a quarter of a second, and only IAM needs it
    from botocore.exceptions import BotoCoreError  # noqa: PLC0415 - likewise
    from botocore.model import ServiceId  # noqa: PLC0415 - likewise
    from botocore.signers import RequestSigner  # noqa: PLC0415 - likewise

    try:
        session = boto3.Session(region_name=region)
        credentials = session.get_credentials()
        if credentials is None:
            raise UnavailableError(
                "no AWS credentials to sign the index's token with", hint="see `aws sts get-caller-identity`"
            )
        if session.region_name is None:
            raise UnavailableError("no AWS region to sign the index's token for", hint="give region= in its address")
        events: Any = session.events
        signer = RequestSigner(ServiceId(service), session.region_name, service, "v4", credentials, events)
        request = {"method": "GET", "url": url, "body": {}, "headers": {}, "context": {}}
        return str(signer.generate_presigned_url(request, "connect", TOKEN_SECONDS, session.region_name))
    except BotoCoreError as error:
        raise UnavailableError(f"cannot sign the index's token: {error}") from error
