"""TLS to registries: the system's CAs and those of hosts.toml, client certificates, and `requests` made to use them."""

from __future__ import annotations

import contextlib
import http.client
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
import urllib3

from floe.ingest.oci.hosts import TLS
from floe.store.errors import AccessDeniedError, BadInputError


def make_context(tls: TLS) -> ssl.SSLContext:
    """What `tls` asks for. BadInputError, AccessDeniedError: a file of it cannot be used."""
    context = ssl.create_default_context()
    places = ssl.get_default_verify_paths()
    if places.cafile is None and places.capath is None:
        context.load_verify_locations(requests.certs.where())  # a system without CAs of its own
    for path in tls.ca:
        with _named("CA certificates", path):
            context.load_verify_locations(path)
    for certificate, key in tls.client:
        # Of several for one kind of key OpenSSL keeps the last. An empty password: never ask on the terminal.
        with _named("a client certificate and its key", certificate, key):
            context.load_cert_chain(certificate, key, password=lambda: "")
    if tls.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        # Whoever wrote skip_verify knows.
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    return context


@contextlib.contextmanager
def _named(what: str, *paths: Path | None) -> Iterator[None]:
    """Says which file is meant: the ssl module does not."""
    files = " and ".join(str(path) for path in paths if path is not None)
    try:
        yield
    except PermissionError as error:
        raise AccessDeniedError(f"no permission to read {files}") from error
    except OSError as error:
        why = f"not {what}" if isinstance(error, ssl.SSLError) else error.strerror
        raise BadInputError(f"cannot use {files}: {why}", hint="check what hosts.toml names") from error


class _Response(http.client.HTTPResponse):
    """Refuses chunks of negative size: of -1 bytes http.client makes all that comes, into memory, and of -2 a ValueError."""

    def _safe_read(self, amt: int) -> bytes:
        if amt < 0:
            raise http.client.IncompleteRead(b"")
        found: bytes = super()._safe_read(amt)  # type: ignore[misc]
        return found


class Adapter(requests.adapters.HTTPAdapter):
    """Connections by one SSLContext, also through proxies. What comes in chunks is checked (_Response)."""

    def __init__(self, context: ssl.SSLContext, pool: int) -> None:
        self._context = context
        super().__init__(pool_maxsize=pool)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """See HTTPAdapter."""
        super().init_poolmanager(*args, **kwargs, ssl_context=self._context)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        """See HTTPAdapter."""
        return super().proxy_manager_for(proxy, **kwargs, ssl_context=self._context)

    def build_response(self, req: requests.PreparedRequest, resp: Any) -> requests.Response:
        """See HTTPAdapter."""
        # The connection is of a class that urllib3 chooses, by the kind of proxy too; nothing of the body is read yet.
        plain = getattr(resp, "_original_response", None)
        if type(plain) is http.client.HTTPResponse:
            plain.__class__ = _Response
        return super().build_response(req, resp)

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """See HTTPAdapter: without a word about CAs, the context's count and no others."""
        if verify is not True:
            super().cert_verify(conn, url, verify, cert)  # type: ignore[no-untyped-call]
