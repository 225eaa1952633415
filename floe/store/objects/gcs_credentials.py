"""Google access tokens for obstore and for our own requests: a key file's, else application default credentials.

google-auth knows them all (gcloud's login, key files, workload identity, the metadata server); a token that has less than
four minutes left is renewed before it is given out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from floe.store.errors import AccessDeniedError, FloeError, UnavailableError
from floe.store.objects.credentials import RenewableCredentials, expiry
from floe.store.objects.gcs_address import GCSAddress

_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_HINT = (
    "run gcloud auth application-default login, give this machine a service account, "
    "or name a key file with service_account=FILE"
)


class TokenProvider(RenewableCredentials):
    """Access tokens. `where`: the store, for messages."""

    def __init__(self, address: GCSAddress, where: str) -> None:
        super().__init__()
        self._where = where
        self._key_file = address.service_account
        self._anonymous = address.is_emulator

    def form(self, current: Any) -> Any:
        """See RenewableCredentials.form: obstore's GCSCredential."""
        return {"token": current, "expires_at": expiry()}

    def _fetch(self) -> str:
        if self._anonymous:
            return "anonymous"
        from google.auth.transport.requests import Request  # noqa: PLC0415 - slow, and for gs:// only

        if self._source is None:
            self._source = _open(self._key_file)
        if not self._source.valid:
            self._source.refresh(Request())
        return str(self._source.token)

    def _explain(self, error: Exception) -> FloeError:
        message = f"no credentials for {self._where}: {' '.join(str(error).split())[:300]}"
        if type(error).__name__ == "TransportError" or getattr(error, "retryable", False):
            return UnavailableError(
                message, hint="see whether the server that gives out tokens can be reached from here"
            )
        return AccessDeniedError(message, hint=_HINT)


def _open(key_file: Path | None) -> Any:
    import google.auth  # noqa: PLC0415 - slow, and for gs:// only
    from google.oauth2 import service_account  # noqa: PLC0415 - likewise

    if key_file is None:
        return google.auth.default(scopes=[_SCOPE])[0]
    make: Any = service_account.Credentials.from_service_account_file
    return make(str(key_file), scopes=[_SCOPE])
