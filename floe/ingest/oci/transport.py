"""HTTP to one server of a registry: authorisation, redirects, retries, errors in Floe's terms.

A request is sent by hand, one hop at a time: `requests` would follow redirects by itself and add what it finds in
~/.netrc. The Authorization header, and those of hosts.toml, go to the server's own scheme, host and port, never to where
it redirects.
"""

from __future__ import annotations

import contextlib
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

from floe.ingest.oci import auth, httpfailure
from floe.ingest.oci.authorizer import Authorizer
from floe.ingest.oci.credentialsource import CredentialSource
from floe.ingest.oci.hosts import Endpoint
from floe.ingest.oci.tls import Adapter, make_context
from floe.store.errors import AccessDeniedError, FloeError, NotFoundError, ThrottledError, UnavailableError

ATTEMPTS = 4
_CONNECT, _SILENT = 10.0, 60.0  # seconds to connect, and without a byte
_BACKOFF = 0.2  # seconds, doubled each time
_RETRY_AFTER_MAX = 30.0  # seconds
_REDIRECTS = 10
_REDIRECT_CODES = (301, 302, 303, 307, 308)
_PASSING = (408, 429, 500, 502, 503, 504)
_POOL = 16
_WORDS = 8192  # bytes
# What OpenSSL says when the other side speaks no TLS.
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG")
_UNTRUSTED = "CERTIFICATE_VERIFY_FAILED"
_NO_CLIENT = "CERTIFICATE_REQUIRED"


def _no_netrc(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


class _Session(requests.Session):
    """Knows of no redirects: `requests` reads the body of one whole, also where it is told not to follow it."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:  # noqa: ARG002 - the base class's signature
        """See SessionRedirectMixin."""
        return None


class Transport:
    """Requests to `endpoint`. Thread-safe; `close` it. BadInputError: its certificates cannot be used.

    `plain_http` lets it redirect, and ask for a token, without TLS; an endpoint without TLS may do so anyway.
    """

    def __init__(self, endpoint: Endpoint, source: CredentialSource, *, plain_http: bool = False) -> None:
        self.endpoint = endpoint
        self.name = str(endpoint)
        self._scheme = endpoint.address.partition(":")[0]
        self._plain_http = plain_http or endpoint.guess or self._scheme == "http"
        self._lock = threading.Lock()  # guards the making of _session
        self._session: requests.Session | None = None
        self._context: ssl.SSLContext | None = make_context(endpoint.tls) if endpoint.tls.given else None
        self._authorizer = Authorizer(self.name, source, self._send, plain_http=self._plain_http)

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            session, self._session = self._session, None
        if session is not None:
            session.close()

    @property
    def base(self) -> str:
        """The API's root, with a slash at its end."""
        return f"{self._scheme}://{self.endpoint.host}{self.endpoint.path}/"

    def request(
        self,
        method: str,
        url: str,
        *,
        scopes: Iterable[str],
        what: str,
        headers: Mapping[str, str] | None = None,
        data: Callable[[], Any] | None = None,
        accept: Iterable[int] = (),
        attempts: int = ATTEMPTS,
    ) -> requests.Response:
        """A streamed response of status 2xx or one of `accept`; the caller closes it.

        `url` may be relative to the API's root. `data` makes the body anew for every attempt. Raises AccessDeniedError,
        NotFoundError, ThrottledError or UnavailableError, saying that `what` failed.
        """
        wanted = set(accept)
        scope = " ".join(sorted(set(scopes)))
        attempt = 0
        while True:
            attempt += 1
            scheme = self._scheme
            try:
                response = self._authorised(
                    method, _joined(self.base, url), scope, headers=headers or {}, data=data, what=what
                )
                if response.status_code < 300 or response.status_code in wanted:
                    return response
                error = self._failure(response, what)
                wait = _retry_after(response)
                response.close()
            except requests.exceptions.SSLError as failure:
                if self.endpoint.guess and scheme == "https" and any(sign in str(failure) for sign in _NO_TLS):
                    self._scheme = "http"
                    attempt -= 1
                    continue
                error, wait = self.unreachable(failure, what), None
                if any(sign in str(failure) for sign in (*_NO_TLS, _UNTRUSTED)):
                    raise error from failure  # the next time will be no better
            except requests.RequestException as failure:
                error, wait = self.unreachable(failure, what), None
            except UnavailableError as failure:  # of the token server
                error, wait = failure, None
            if not error.retryable or attempt >= attempts:
                raise error
            time.sleep(wait if wait is not None else _BACKOFF * 2**attempt * random.uniform(0.5, 1.0))

    def _authorised(
        self,
        method: str,
        url: str,
        scope: str,
        *,
        headers: Mapping[str, str],
        data: Callable[[], Any] | None,
        what: str,
    ) -> requests.Response:
        sent = self._authorizer.header(scope, what)
        response = self._follow(method, url, headers, data, sent)
        for again in (False, True):  # a password that is known already may have ended as well
            if urlsplit(response.url).netloc != self.endpoint.host or (again and (sent or "").startswith("Bearer ")):
                break
            try:
                header = self._better(response, scope, sent, what)
            except BaseException:
                response.close()
                raise
            if header is None:
                break
            response.close()
            sent = header
            response = self._follow(method, url, headers, data, sent)
        return response

    def _better(self, response: requests.Response, scope: str, sent: str | None, what: str) -> str | None:
        """The Authorization header to try after `response` to a request with `sent`; None: there is none."""
        if response.status_code == 401:
            challenges = auth.parse_challenges(response.headers.get("WWW-Authenticate", ""))
            return self._authorizer.answer(scope, tuple(challenges), sent, what) if challenges else None
        if response.status_code == 403 and sent is not None:
            return self._authorizer.again(scope, sent, what)
        return None

    def _follow(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        data: Callable[[], Any] | None,
        authorization: str | None,
    ) -> requests.Response:
        home = urlsplit(self.base)
        for _ in range(_REDIRECTS):
            sent = dict(headers)
            here = urlsplit(url)
            if (here.scheme, here.netloc) == (home.scheme, home.netloc):
                sent = {**self.endpoint.headers, **sent}
                if authorization:
                    sent["Authorization"] = authorization
            response = self._hop(method, url, headers=sent, data=data() if data else None, stream=True)
            location = response.headers.get("Location")
            if response.status_code not in _REDIRECT_CODES or not location or method not in ("GET", "HEAD"):
                return response
            _end(response)
            url = _joined(url, location)
            if urlsplit(url).scheme not in ("https", "http" if self._plain_http else "https"):
                raise AccessDeniedError(
                    f"{self.name} redirects to {_shown(url)}, without TLS", hint="use --plain-http if meant"
                )
        raise UnavailableError(f"{self.name} redirects more than {_REDIRECTS} times")

    def _send(
        self,
        method: str,
        url: str,
        *,
        headers: dict[str, str],
        query: list[tuple[str, str]] | None = None,
        form: dict[str, str] | None = None,
    ) -> requests.Response:
        """See authorizer.Send."""
        if urlsplit(_joined("", url)).netloc == self.endpoint.host:
            headers = {**self.endpoint.headers, **headers}
        return self._hop(method, url, headers=headers, params=query, data=form, stream=True)

    def _hop(self, method: str, url: str, **more: Any) -> requests.Response:
        proxy = self.endpoint.proxy
        try:
            return self._connected().request(
                method,
                url,
                allow_redirects=False,
                timeout=(self.endpoint.dial_timeout or _CONNECT, _SILENT),
                auth=_no_netrc,
                verify=not self.endpoint.tls.skip_verify,
                proxies={"http": proxy, "https": proxy} if proxy else None,
                **more,
            )
        except urllib3.exceptions.LocationValueError as failure:  # `requests` lets it through
            raise requests.exceptions.InvalidURL(failure) from failure

    def _connected(self) -> requests.Session:
        with self._lock:
            if self._session is None:
                context = self._context or make_context(self.endpoint.tls)
                self._session = _Session()
                for scheme in ("http://", "https://"):
                    self._session.mount(scheme, Adapter(context, _POOL))
            return self._session

    def _failure(self, response: requests.Response, what: str) -> FloeError:
        status = response.status_code
        said = httpfailure.message(response)
        if status == 404:
            return NotFoundError(f"{what}: {self.name} has no such thing{said}", hint="check name and tag")
        if status in (401, 403):
            return self._authorizer.denied(what, f"it answered {status}{said}")
        if status == 429:
            return ThrottledError(f"{what}: {self.name} asks to slow down{said}", hint="try again later")
        if status in _PASSING:
            return UnavailableError(f"{what}: {self.name} answered {status}{said}", hint="try again later")
        if status == 400 and "HTTP request to an HTTPS server" in said:
            return UnavailableError(f"{what}: {self.name} speaks TLS", hint="leave out --plain-http")
        return FloeError(f"{what}: {self.name} answered {status}{said}")

    def unreachable(self, failure: Exception, what: str) -> UnavailableError:
        """What a connection that failed or broke means to the user."""
        text = str(failure)
        hint = "check the address and the network"
        reason = httpfailure.reason(failure)
        if _NO_CLIENT in text:
            hint = "it wants a client certificate: name one in hosts.toml"
        if isinstance(failure, requests.exceptions.SSLError):
            if any(sign in text for sign in _NO_TLS):
                hint = "use --plain-http if the registry speaks no TLS"
            elif _UNTRUSTED in text:
                hint = (
                    "if its certificate is of a CA of your own, name that CA in hosts.toml, or add it to the system's"
                )
            return UnavailableError(f"{what}: no TLS connection to {self.name}: {reason}", hint=hint)
        return UnavailableError(f"{what}: {self.name} cannot be reached: {reason}", hint=hint)


def _retry_after(response: requests.Response) -> float | None:
    value = response.headers.get("Retry-After", "")
    # What is a digit to Unicode alone is no number.
    return min(float(value), _RETRY_AFTER_MAX) if value.isascii() and value.isdigit() else None


def _end(response: requests.Response) -> None:
    """Close a response that nobody reads; its connection is used again if no more than a few words are left of it."""
    with response, contextlib.suppress(urllib3.exceptions.HTTPError, OSError):
        response.raw.read(_WORDS, decode_content=False)


def _joined(base: str, url: str) -> str:
    """`url`, which may be relative to `base`, and can be split. Raises requests.exceptions.InvalidURL."""
    try:
        found = urljoin(base, url)
        urlsplit(found)
    except ValueError:
        raise requests.exceptions.InvalidURL(f"{url!r} is no address") from None
    return found


def _shown(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}"
