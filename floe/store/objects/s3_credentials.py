"""AWS credentials for obstore: the environment's two variables, else boto3's whole chain (profiles, roles, SSO, ...)."""

from __future__ import annotations

import os
import threading
from datetime import datetime, timedelta, timezone
from typing import Any

from floe.store.errors import AccessDeniedError

_TTL = timedelta(minutes=5)  # how long obstore keeps what we return; botocore renews expiring credentials by itself


class CredentialProvider:
    """Called by obstore, from its own threads, whenever it needs credentials. `failure`: why there are none, or None."""

    def __init__(self) -> None:
        self.failure: str | None = None
        self._lock = threading.Lock()
        self._chain: Any = None

    def __call__(self) -> Any:  # obstore's S3Credential, a type that exists only for type checkers
        """Credentials for the next five minutes, as obstore's S3Credential."""
        try:
            found = self._from_environment() or self._from_boto3()
        except Exception as error:
            self.failure = str(error)
            raise
        self.failure = None
        return found

    def _from_environment(self) -> dict[str, Any] | None:
        # The first in boto3's chain too; looked at here because importing boto3 takes a quarter of a second.
        key, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
        if not key or not secret:
            return None
        return _credential(key, secret, os.environ.get("AWS_SESSION_TOKEN"))

    def _from_boto3(self) -> dict[str, Any]:
        with self._lock:
            if self._chain is None:
                try:
                    import boto3  # noqa: PLC0415 - slow, and not needed when the environment has credentials
                except ImportError:
                    raise AccessDeniedError("the environment has none, and boto3 is not installed") from None
                self._chain = boto3.Session().get_credentials()
            if self._chain is None:
                raise AccessDeniedError("none in the environment, in ~/.aws, or given to this machine")
            found = self._chain.get_frozen_credentials()
        return _credential(found.access_key, found.secret_key, found.token)


def credential_provider() -> CredentialProvider:
    """A provider; nothing is looked up before obstore calls it."""
    return CredentialProvider()


def default_region() -> str | None:
    """The region of the environment, else of boto3's configuration; None when neither has one."""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region:
        return region
    try:
        import boto3  # noqa: PLC0415 - slow, and not needed when the environment has a region
    except ImportError:
        return None
    found = boto3.Session().region_name
    return str(found) if found else None


def _credential(key: str, secret: str, token: str | None) -> dict[str, Any]:
    return {
        "access_key_id": key,
        "secret_access_key": secret,
        "token": token or None,
        "expires_at": datetime.now(timezone.utc) + _TTL,
    }
