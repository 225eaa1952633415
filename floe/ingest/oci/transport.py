"""HTTP to one registry: authorisation, redirects, retries, errors in Floe's terms.

A request is sent by hand, one hop at a time: `requests` would follow redirects by itself and add what it finds in
~/.netrc. The Authorization header goes to the registry's own scheme, host and port, never to where it redirects.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests

from floe.ingest.oci import auth
from floe.ingest.oci.references import DOCKER_HUB
from floe.store.errors import AccessDeniedError, FloeError, NotFoundError, ThrottledError, UnavailableError

_TIMEOUT = (10.0, 60.0)  # seconds to connect, and without a byte
_ATTEMPTS = 4
_BACKOFF = 0.2  # seconds, doubled each time
_RETRY_AFTER_MAX = 30.0  # seconds
_REDIRECTS = 10
_REDIRECT_CODES = (301, 302, 303, 307, 308)
_PASSING = (408, 429, 500, 502, 503, 504)
_HUB_ADDRESS = "registry-1.docker.io"
_ERROR_MAX = 300  # characters of a registry's own message
_POOL = 16


def _no_netrc(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


class Transport:
    """Requests to the registry `host`. Thread-safe; `close` it."""

    def __init__(self, host: str, *, plain_http: bool, credentials: auth.Credentials | None) -> None:
        self.host = host
        self.plain_http = plain_http
        address = _HUB_ADDRESS if host == DOCKER_HUB else host
        self.base = f"{'http' if plain_http else 'https'}://{address}/v2/"
        self._credentials = credentials
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=_POOL))
        self._headers: dict[str, str] = {}  # Authorization by scope
        self._lock = threading.Lock()  # guards _headers

    def close(self) -> None:
        """Close all connections."""
        self._session.close()

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
        attempts: int = _ATTEMPTS,
    ) -> requests.Response:
        """A streamed response of status 2xx or one of `accept`; the caller closes it.

        `url` may be relative to `/v2/`. `data` makes the body anew for every attempt. Raises AccessDeniedError,
        NotFoundError, ThrottledError or UnavailableError, saying that `what` failed.
        """
        wanted = set(accept)
        scope = " ".join(sorted(set(scopes)))
        for attempt in range(1, attempts + 1):
            try:
                response = self._authorised(
                    method, urljoin(self.base, url), scope, headers=headers or {}, data=data, what=what
                )
                if response.status_code < 300 or response.status_code in wanted:
                    return response
                error = self._failure(response, what)
                wait = _retry_after(response)
                response.close()
            except requests.RequestException as failure:
                error, wait = self.unreachable(failure, what), None
            if not error.retryable or attempt == attempts:
                raise error
            time.sleep(wait if wait is not None else _BACKOFF * 2**attempt * random.uniform(0.5, 1.0))
        raise AssertionError

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
        with self._lock:
            authorization = self._headers.get(scope)
        response = self._follow(method, url, headers, data, authorization)
        if response.status_code != 401:
            return response
        challenges = auth.parse_challenges(response.headers.get("WWW-Authenticate", ""))
        if urlsplit(response.url).netloc != urlsplit(self.base).netloc or not challenges:
            return response
        response.close()
        authorization = self._answer(challenges, scope, what)
        with self._lock:
            self._headers[scope] = authorization
        return self._follow(method, url, headers, data, authorization)

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
            if authorization and (here.scheme, here.netloc) == (home.scheme, home.netloc):
                sent["Authorization"] = authorization
            response = self._session.request(
                method,
                url,
                headers=sent,
                data=data() if data else None,
                stream=True,
                allow_redirects=False,
                timeout=_TIMEOUT,
                auth=_no_netrc,
            )
            location = response.headers.get("Location")
            if response.status_code not in _REDIRECT_CODES or not location or method not in ("GET", "HEAD"):
                return response
            response.close()
            url = urljoin(url, location)
            if urlsplit(url).scheme not in ("https", "http" if self.plain_http else "https"):
                raise AccessDeniedError(
                    f"registry {self.host} redirects to {_shown(url)}, without TLS", hint="use --plain-http if meant"
                )
        raise UnavailableError(f"registry {self.host} redirects more than {_REDIRECTS} times")

    def _answer(self, challenges: list[auth.Challenge], scope: str, what: str) -> str:
        """The Authorization header that satisfies one of the registry's challenges."""
        bearer = next((c for c in challenges if c.scheme == "bearer"), None)
        if bearer is not None:
            return "Bearer " + self._token(bearer, scope, what)
        if self._credentials is None or not self._credentials.username:
            raise self._denied(what, "it asks for a user name and password")
        return self._credentials.basic()

    def _token(self, challenge: auth.Challenge, scope: str, what: str) -> str:
        realm = auth.check_realm(challenge, self.host, plain_http=self.plain_http)
        service = challenge.parameters.get("service", "")
        credentials = self._credentials
        if credentials is not None and credentials.identity_token:
            form = {
                "grant_type": "refresh_token",
                "service": service,
                "client_id": "floe",
                "scope": scope,
                "refresh_token": credentials.identity_token,
            }
            response = self._session.post(realm, data=form, timeout=_TIMEOUT, auth=_no_netrc, allow_redirects=False)
        else:
            query = [("service", service)] if service else []
            query += [("scope", item) for item in scope.split()]
            headers = {}
            if credentials is not None and credentials.username:
                headers["Authorization"] = credentials.basic()
                query.append(("account", credentials.username))
            response = self._session.get(
                realm, params=query, headers=headers, timeout=_TIMEOUT, auth=_no_netrc, allow_redirects=False
            )
        with response:
            if response.status_code in _PASSING:
                raise UnavailableError(f"{what}: token server {realm} answered {response.status_code}")
            if response.status_code != 200:
                raise self._denied(what, f"token server {realm} answered {response.status_code}")
            return auth.token_in(response.content, realm)

    def _failure(self, response: requests.Response, what: str) -> FloeError:
        status = response.status_code
        said = _message(response)
        if status == 404:
            return NotFoundError(f"{what}: registry {self.host} has no such thing{said}", hint="check name and tag")
        if status in (401, 403):
            return self._denied(what, f"it answered {status}{said}")
        if status == 429:
            return ThrottledError(f"{what}: registry {self.host} asks to slow down{said}", hint="try again later")
        if status in _PASSING:
            return UnavailableError(f"{what}: registry {self.host} answered {status}{said}", hint="try again later")
        if status == 400 and "HTTP request to an HTTPS server" in said:
            return UnavailableError(f"{what}: registry {self.host} speaks TLS", hint="leave out --plain-http")
        return FloeError(f"{what}: registry {self.host} answered {status}{said}")

    def _denied(self, what: str, why: str) -> AccessDeniedError:
        path = auth.config_path()
        helper = auth.helper_named(self.host)
        if self._credentials is not None:
            hint = f"check the entry for {self.host} in {path}, for instance with `docker login {self.host}`"
        elif helper:
            hint = f"Floe does not run the credential helper {helper!r}: put an 'auths' entry into {path}"
        else:
            hint = f"log in, for instance with `docker login {self.host}`, or check the image's name; {path} is read"
        user = f" as {self._credentials.username!r}" if self._credentials and self._credentials.username else ""
        return AccessDeniedError(f"{what}: registry {self.host} denied access{user}: {why}", hint=hint)

    def unreachable(self, failure: Exception, what: str) -> UnavailableError:
        """What a connection that failed or broke means to the user."""
        text = str(failure)
        hint = "check the address and the network"
        if isinstance(failure, requests.exceptions.SSLError):
            hint = "use --plain-http if the registry speaks no TLS" if "WRONG_VERSION" in text else hint
            return UnavailableError(f"{what}: no TLS connection to registry {self.host}: {_reason(failure)}", hint=hint)
        return UnavailableError(f"{what}: registry {self.host} cannot be reached: {_reason(failure)}", hint=hint)


def _reason(failure: BaseException) -> str:
    """The innermost cause in few words; the whole chain is long and repeats itself."""
    seen: BaseException = failure
    while True:
        inner = seen.args[0] if seen.args and isinstance(seen.args[0], BaseException) else getattr(seen, "reason", None)
        inner = inner if isinstance(inner, BaseException) else seen.__cause__
        if inner is None or inner is seen:
            known = seen.strerror if isinstance(seen, OSError) else None
            return (known or str(seen).rpartition(": ")[2] or type(seen).__name__)[:_ERROR_MAX]
        seen = inner


def _message(response: requests.Response) -> str:
    """What the registry says of its own refusal, as printable text."""
    try:
        body = response.raw.read(8192, decode_content=True) or b""
    except Exception:  # a body that cannot be read says nothing
        return ""
    text = body.decode("utf-8", "replace")
    try:
        text = "; ".join(str(item.get("message") or item.get("code")) for item in json.loads(text)["errors"])
    except (ValueError, KeyError, TypeError, AttributeError):
        text = text if "<" not in text else ""
    text = "".join(c if c.isprintable() else " " for c in text).strip()
    return f": {text[:_ERROR_MAX]}" if text else ""


def _retry_after(response: requests.Response) -> float | None:
    value = response.headers.get("Retry-After", "")
    return min(float(value), _RETRY_AFTER_MAX) if value.isdigit() else None


def _shown(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}"
