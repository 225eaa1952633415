"""The Authorization headers for one registry: made when it asks for one, kept by scope, renewed before or when they end.

Sources: distribution's docs/spec/auth (token.md, oauth.md), RFC 7617.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Protocol

import requests
import urllib3

from floe.ingest.oci import auth, dockerconfig, httpfailure
from floe.ingest.oci.auth import Challenge, Token
from floe.ingest.oci.credentials import Credentials
from floe.ingest.oci.credentialsource import CredentialSource
from floe.store.errors import AccessDeniedError, FloeError, UnavailableError

_CLIENT = "floe"
_SPENT = 0.8  # the share of a token's time after which it is renewed
_PASSING = (408, 429, 500, 502, 503, 504)
_REFUSED = (400, 401, 403)
_ANSWER_MAX = 1 << 20  # bytes of a token server's answer; tokens are of some KiB
_PLAIN = {"Accept-Encoding": "identity"}  # not every urllib3 bounds what it unpacks


class Send(Protocol):
    """One HTTP request without redirects, with the TLS settings of the registry. Its response is streamed: close it."""

    def __call__(
        self,
        method: str,
        url: str,
        *,
        headers: dict[str, str],
        query: list[tuple[str, str]] | None = None,
        form: dict[str, str] | None = None,
    ) -> requests.Response:
        """Raises requests.RequestException."""
        ...


@dataclass(frozen=True)
class _Held:
    """A header, the challenges it answers, whose it is (None: nobody's), and when to renew it (by time.monotonic)."""

    header: str = field(repr=False)
    challenges: tuple[Challenge, ...]
    credentials: Credentials | None
    renew_at: float | None


class Authorizer:
    """Answers the challenges of `name`, a registry that is `host` in Docker's config. Thread-safe.

    One thread asks a token server, a helper or AWS; others that need an answer wait for it and take the same.
    """

    def __init__(self, name: str, source: CredentialSource, send: Send, *, plain_http: bool) -> None:
        self._name, self._source, self._send = name, source, send
        self._plain_http = plain_http
        self._held: dict[str, _Held] = {}  # by scope
        self._lock = threading.Lock()  # guards _held
        self._renewing = threading.Lock()  # held while a header is made

    def header(self, scope: str, what: str) -> str | None:
        """The header for requests of `scope` (`repository:NAME:pull`, several apart by spaces); None before `answer`."""
        with self._lock:
            held = self._held.get(scope)
        if held is None or held.renew_at is None or time.monotonic() < held.renew_at:
            return held.header if held else None
        try:
            return self.answer(scope, held.challenges, held.header, what, refused=False)
        except FloeError:
            return held.header  # it holds for a while yet; if not, the registry says so

    def answer(
        self, scope: str, challenges: tuple[Challenge, ...], sent: str | None, what: str, *, refused: bool = True
    ) -> str | None:
        """A header other than `sent`, which was refused or has grown old; None when there is no other.

        AccessDeniedError: there are no credentials, or the token server wants others.
        """
        with self._renewing:
            with self._lock:
                held = self._held.get(scope)
            if held is not None and held.header != sent:
                return held.header  # another thread was first
            made = self._make(scope, challenges, held if refused else None, what)
            if made is not None:
                with self._lock:
                    self._held[scope] = made
            return made.header if made else None

    def again(self, scope: str, sent: str, what: str) -> str | None:
        """A header by other credentials than those of `sent`, which may do nothing here (403); None: there are none."""
        with self._lock:
            held = self._held.get(scope)
        if held is None:
            return None
        if held.header != sent:
            return held.header
        # Amazon ECR says 403 once a password has ended.
        if held.credentials is None or self._source.renew(held.credentials) is None:
            return None
        return self.answer(scope, held.challenges, sent, what, refused=False)

    def denied(self, what: str, why: str, credentials: Credentials | None = None) -> AccessDeniedError:
        """The registry refuses; the hint says where credentials come from, or could."""
        host = self._source.host
        path = dockerconfig.config_path(self._source.environ)
        if credentials is None:
            with self._lock:
                credentials = next((held.credentials for held in self._held.values() if held.credentials), None)
        if credentials is not None:
            hint = f"the credentials are from {credentials.origin}: check what they allow, or log in again"
        else:
            login = "docker login" if dockerconfig.is_hub(host) else f"docker login {host}"
            hint = f"log in, for instance with `{login}`, or check the image's name; {path} is read"
        user = f" as {credentials.username!r}" if credentials and credentials.username else ""
        return AccessDeniedError(f"{what}: {self._name} denied access{user}: {why}", hint=hint)

    def _make(self, scope: str, challenges: tuple[Challenge, ...], refused: _Held | None, what: str) -> _Held | None:
        bearer = next((c for c in challenges if c.scheme == "bearer"), None)
        if bearer is not None:
            token, credentials = self._token(bearer, scope, what)
            renew_at = None if token.lifetime is None else time.monotonic() + token.lifetime * _SPENT
            return _Held(f"Bearer {token.text}", challenges, credentials, renew_at)
        credentials = self._source.renew(refused.credentials) if refused else self._source.get()
        if credentials is None and refused:
            return None
        if credentials is None or not credentials.username:
            raise self.denied(what, "it asks for a user name and password", credentials)
        due = credentials.renew_at
        renew_at = None if due is None else time.monotonic() + due - time.time()
        return _Held(credentials.basic(), challenges, credentials, renew_at)

    def _token(self, challenge: Challenge, scope: str, what: str) -> tuple[Token, Credentials | None]:
        """A token for `scope` and what the registry says it needs, and whose it is."""
        realm = auth.check_realm(challenge, self._name, plain_http=self._plain_http)
        asked = challenge.parameters.get("scope", "").split()
        scopes = list(dict.fromkeys([*scope.split(), *asked]))
        service = challenge.parameters.get("service", "")
        credentials = self._source.get()
        while True:
            response = self._ask(realm, service, scopes, credentials, what)
            with response:
                status = response.status_code
                if status == 200:
                    token = auth.token_in(self._body(response, realm, what), realm)
                    return token, self._exchanged(credentials, token)
            if status in _PASSING:
                raise UnavailableError(f"{what}: token server {realm} answered {status}", hint="try again later")
            # What a helper or a mounted secret gave an hour ago may have ended, and another be there.
            other = self._source.renew(credentials) if credentials and status in _REFUSED else None
            if other is None:
                raise self.denied(what, f"token server {realm} answered {status}", credentials)
            credentials = other

    def _ask(
        self, realm: str, service: str, scopes: list[str], credentials: Credentials | None, what: str
    ) -> requests.Response:
        try:
            if credentials is not None and credentials.identity_token:
                form = {"grant_type": "refresh_token", "service": service, "client_id": _CLIENT}
                form |= {"scope": " ".join(scopes), "refresh_token": credentials.identity_token}
                return self._send("POST", realm, headers=dict(_PLAIN), form=form)
            query = [("service", service)] if service else []
            query += [("scope", item) for item in scopes]
            headers = dict(_PLAIN)
            if credentials is not None and credentials.username:
                headers["Authorization"] = credentials.basic()
                query.append(("account", credentials.username))
            return self._send("GET", realm, headers=headers, query=query)
        except requests.RequestException as failure:
            raise self._unreachable(failure, realm, what) from failure

    def _body(self, response: requests.Response, realm: str, what: str) -> bytes:
        """At most _ANSWER_MAX bytes, as they came."""
        if response.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
            raise AccessDeniedError(
                f"{what}: token server {realm} compressed its answer, which it was asked not to do",
                hint="see what stands between this machine and the token server",
            )
        try:
            body = bytes(response.raw.read(_ANSWER_MAX + 1, decode_content=True))
        except (urllib3.exceptions.HTTPError, OSError) as failure:
            raise self._unreachable(failure, realm, what) from failure
        if len(body) > _ANSWER_MAX:
            raise AccessDeniedError(
                f"{what}: token server {realm} answered with more than {_ANSWER_MAX} bytes, which is no token",
                hint="check the address",
            )
        return body

    def _unreachable(self, failure: Exception, realm: str, what: str) -> UnavailableError:
        return UnavailableError(
            f"{what}: token server {realm} of {self._name} cannot be reached: {httpfailure.reason(failure)}",
            hint="check the address and the network",
        )

    def _exchanged(self, credentials: Credentials | None, token: Token) -> Credentials | None:
        if credentials is None or not credentials.identity_token or token.identity in ("", credentials.identity_token):
            return credentials
        new = Credentials(identity_token=token.identity, origin=credentials.origin)
        self._source.replace(credentials, new)
        return new
