"""The page of `floe ui` over HTTP: read-only, for this machine, or with a token.

- Only names that this server is known by are answered (`Host`), so that no other site's name can be pointed at it (DNS rebinding).
- Nothing is loaded from elsewhere and nothing runs but the page's own script (Content-Security-Policy).
- Strangers get so many connections, for so long, with heads of so many bytes (see floe.store.places).
- With a token each request needs it: as `Authorization: Bearer`, or once as `?token=`, which sets a cookie.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
import socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler
from importlib import resources
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

from floe.cli.timeline import Span, Timeline
from floe.cli.trace_page import STYLE, parts
from floe.store.errors import AccessDeniedError, BusyError
from floe.store.places import Head, Server

_TIMEOUT = 10.0  # seconds for a client that sends nothing; see places.py for all of a request
_COOKIE = "floe-token"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_TEXT = "text/plain; charset=utf-8"
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_log = logging.getLogger(__name__)


class Shown(Protocol):
    """What the page shows; see floe.cli.live.Live."""

    def sample(self) -> dict[str, Any]:
        """The node now."""
        ...

    def timeline(self, key: str, at: float) -> Timeline | None:
        """A start; None: not known any more."""
        ...


class PageServer:
    """Serves at `host` and `port` (0: any; then `port` is the one that was found) until `close`.

    `clean` takes secrets out of what is said. BusyError: the port is taken; AccessDeniedError: not allowed.
    """

    def __init__(
        self, host: str, port: int, shown: Shown, clean: Callable[[dict[str, Any]], Any], *, token: str | None = None
    ) -> None:
        self.token = token
        self.shown = shown
        self.clean = clean
        self.files = {path: (_read(name), kind) for path, (name, kind) in _FILES.items()}
        self.files["/trace.css"] = (STYLE.encode(), "text/css; charset=utf-8")
        handler = type("_Handler", (_Handler,), {"page": self})
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._server = type("_Server", (Server,), {"address_family": family})((host, port), handler)
        except PermissionError as error:
            raise AccessDeniedError(f"cannot listen on {host}, port {port}: {error.strerror}") from error
        except OSError as error:
            raise BusyError(
                f"cannot listen on {host}, port {port}: {error.strerror or error}", hint="choose another --listen"
            ) from error
        self.port: int = self._server.server_address[1]
        self.names = {host.lower(), "localhost", socket.gethostname().lower()}

    def serve(self) -> None:
        """Answer until `close`, which another thread calls."""
        self._server.serve_forever(poll_interval=0.2)

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()

    def knows(self, host: str) -> bool:
        """Whether a `Host` header names this server: by an address, or by a name of this machine."""
        try:
            split = urlsplit(f"//{host}")
            name, port = split.hostname or "", split.port or 80
        except ValueError:
            return False
        if port != self.port or split.username is not None or split.path:
            return False
        try:
            ipaddress.ip_address(name)  # no name, so nobody's to point elsewhere
        except ValueError:
            return name in self.names
        return True


class _Handler(BaseHTTPRequestHandler):
    page: PageServer
    server: Server
    timeout = _TIMEOUT
    server_version = "floe"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self.rfile = Head(self.rfile)  # type: ignore[assignment]

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        asked = parse_qs(query)
        if not self.page.knows(self.headers.get("Host", "")):
            self._answer(421, b"this name is not one of this server's; use its address\n", _TEXT)
            return
        if self.page.token is not None and not self._allowed():
            if path == "/" and self._is_token(asked.get("token", [""])[0]):
                cookie = f"{_COOKIE}={self.page.token}; Path=/; HttpOnly; SameSite=Strict"
                self._answer(303, b"", _TEXT, {"Location": "/", "Set-Cookie": cookie})
                return
            self._answer(401, b"a token is needed: /?token=TOKEN, or Authorization: Bearer TOKEN\n", _TEXT)
            return
        self.server.is_known(self.connection)
        self.server.is_read(self.connection)
        try:
            self._give(path, asked)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            pass  # the browser went away
        except Exception:
            _log.exception("the page could not be served")
            self._answer(500, b"this could not be collected; the log of floe ui says why\n", _TEXT)

    def _give(self, path: str, asked: Mapping[str, list[str]]) -> None:
        if path in self.page.files:
            self._answer(200, *self.page.files[path])
        elif path == "/state.json":
            said = json.dumps(self.page.clean(self.page.shown.sample()), separators=(",", ":"))
            self._answer(200, said.encode("utf-8", "backslashreplace"), "application/json")
        elif path == "/start":
            found = self._timeline(asked)
            if found is None:
                self._answer(404, b"this start is not known any more\n", _TEXT)
            else:
                text = parts(self._clean(found), level=3)
                self._answer(200, text.encode("utf-8", "backslashreplace"), "text/html; charset=utf-8")
        else:
            self._answer(404, b"there is nothing here; see /\n", _TEXT)

    def _clean(self, found: Timeline) -> Timeline:
        """Without secrets: before anything is escaped, by which they would change their looks."""
        return replace(found, spans=tuple(Span(**self.page.clean(span._asdict())) for span in found.spans))

    def _timeline(self, asked: Mapping[str, list[str]]) -> Timeline | None:
        try:
            return self.page.shown.timeline(asked["key"][0], float(asked["at"][0]))
        except (KeyError, ValueError):
            return None

    def _allowed(self) -> bool:
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        if kind.lower() == "bearer" and self._is_token(given.strip()):
            return True
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get(_COOKIE)
        except CookieError:
            return False
        return cookie is not None and self._is_token(cookie.value)

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), (self.page.token or "").encode())

    def _answer(self, status: int, body: bytes, kind: str, more: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, **(more or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        _log.debug("%s", (format % args).partition("?")[0])  # what follows may be a token


def _read(name: str) -> bytes:
    return (resources.files("floe.cli") / "page" / name).read_bytes()
