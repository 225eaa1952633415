"""AWS credentials for obstore and boto3: the environment's variables, else boto3's whole chain (profiles, roles, SSO, ...).

botocore renews what expires before it does, ten to fifteen minutes ahead. What is withdrawn earlier, or rewritten in a
file, shows when the server refuses it: then `renew` asks the chain anew, and the store tries once more.
"""

from __future__ import annotations

import os
from typing import Any

from floe.store.errors import AccessDeniedError, FloeError, UnavailableError
from floe.store.objects.credentials import RenewableCredentials, expiry

_HINT = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine a role or profile"
# botocore's words for a chain that was reached but could not deliver just now, against those that need a person.
_PASSING = ("CredentialRetrievalError", "MetadataRetrievalError", "ConnectionError", "HTTPClientError")
_LOGIN = ("SSOError", "SSOTokenLoadError", "UnauthorizedSSOTokenError", "TokenRetrievalError", "LoginError")


class CredentialProvider(RenewableCredentials):
    """(access key, secret, session token or None). `where`: the store, for messages."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where

    def form(self, current: Any) -> Any:
        """See RenewableCredentials.form: obstore's S3Credential."""
        key, secret, token = current
        return {"access_key_id": key, "secret_access_key": secret, "token": token, "expires_at": expiry()}

    def session(self) -> Any:
        """A boto3.Session with the same credentials, for what obstore cannot do."""
        self.current()  # so that what is missing is said in our words
        with self._lock:
            return self._make_session()

    def _fetch(self) -> tuple[str, str, str | None]:
        return _from_environment() or _from_chain(self._make_session())

    def _explain(self, error: Exception) -> FloeError:
        message = f"no credentials for {self._where}: {' '.join(str(error).split())}"
        names = {kind.__name__ for kind in type(error).__mro__}
        if names.intersection(_LOGIN):
            return AccessDeniedError(message, hint="log in again: aws sso login")
        if names.intersection(_PASSING):
            return UnavailableError(message, hint="see whether the machine's or container's credential service answers")
        return AccessDeniedError(message, hint=_HINT)

    def _make_session(self) -> Any:
        if self._source is None:
            try:
                import boto3  # noqa: PLC0415 - slow, and not needed when the environment has credentials
            except ImportError:
                raise AccessDeniedError("the environment has none, and boto3 is not installed") from None
            self._source = boto3.Session()
        return self._source


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


def _from_environment() -> tuple[str, str, str | None] | None:
    # The first in boto3's chain too; looked at here because importing boto3 takes a quarter of a second.
    key, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
    if not key or not secret:
        return None
    return key, secret, os.environ.get("AWS_SESSION_TOKEN") or None


def _from_chain(session: Any) -> tuple[str, str, str | None]:
    chain = session.get_credentials()  # found once for each session
    if chain is None:
        raise AccessDeniedError("none in the environment, in ~/.aws, or given to this machine")
    found = chain.get_frozen_credentials()  # renewed first where they expire soon
    return found.access_key, found.secret_key, found.token or None
