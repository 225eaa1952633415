"""Where a registry's images are really read from and written to: containerd's `hosts.toml` files.

Source: containerd's docs/hosts.md. Below each directory of the setting `registry_config` lies a directory for a registry,
`HOST`, `HOST_PORT_` or `HOST:PORT`, or `_default` for those without one. In it: `hosts.toml`, or Docker's certificate
files (`*.crt`, `*.cert`, `*.key`). Other than containerd, Floe takes no malformed file for a missing one.
"""

from __future__ import annotations

import importlib
import posixpath
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from floe.ingest.oci.references import DOCKER_HUB
from floe.store.errors import AccessDeniedError, BadInputError, FloeError, UnsupportedError

PULL, RESOLVE, PUSH = "pull", "resolve", "push"
_ALL = frozenset((PULL, RESOLVE, PUSH))
_FILE, _FALLBACK = "hosts.toml", "_default"
_HUB_ADDRESS = "registry-1.docker.io"
_DURATION = re.compile(r"([0-9]*\.?[0-9]+)(h|ms|m|s|us|µs|ns)")
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_HOST = re.compile(r"(?:[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9a-fA-F:.]+\])(?::[0-9]{1,5})?")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a header's name, RFC 9110


@dataclass(frozen=True)
class TLS:
    """Whom to trust beside the system's CAs, and client certificates with their keys (None: in the same file)."""

    ca: tuple[Path, ...] = ()
    client: tuple[tuple[Path, Path | None], ...] = ()
    skip_verify: bool = False

    @property
    def given(self) -> bool:
        """Whether anything is set."""
        return bool(self.ca or self.client or self.skip_verify)


@dataclass(frozen=True)
class Endpoint:
    """A server to ask for the images of `registry`: `address` is SCHEME://HOST[:PORT], `path` the API's root.

    `guess`: whether it speaks TLS is to be found out, since it is given as http:// but with TLS settings.
    `headers` are sent with every request to it. `dial_timeout` in seconds.
    """

    registry: str
    address: str
    path: str = "/v2"
    capabilities: frozenset[str] = _ALL
    tls: TLS = TLS()
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    dial_timeout: float | None = None
    proxy: str | None = field(default=None, repr=False)
    guess: bool = False

    @property
    def host(self) -> str:
        """`HOST[:PORT]`."""
        return urlsplit(self.address).netloc

    @property
    def mirror(self) -> bool:
        """Whether it is another server than the registry itself, which is told whose images it is asked for."""
        return self.host != (_HUB_ADDRESS if self.registry == DOCKER_HUB else self.registry)

    def __str__(self) -> str:
        return f"mirror {self.host} of {self.registry}" if self.mirror else f"registry {self.registry}"


def find_endpoints(registry: str, folders: Sequence[Path], *, plain_http: bool) -> list[Endpoint]:
    """The servers for images of `registry` in the order they are tried, by the first of `folders` that knows it.

    `plain_http` is for a server whose scheme no file gives. BadInputError, UnsupportedError: a file is malformed.
    """
    folder = next((known for folder in folders if (known := _folder_of(registry, folder))), None)
    value: dict[str, Any] = {}
    path = Path()
    if folder is not None:
        path = folder / _FILE
        found = _read(path)
        value = _certificates(folder) if found is None else found
    return _Reader(registry, path, plain_http=plain_http).endpoints(value)


def _folder_of(registry: str, folder: Path) -> Path | None:
    host, colon, port = registry.rpartition(":")
    names = [f"{host}_{port}_", registry] if colon else [registry]
    for name in (*names, _FALLBACK):
        try:
            if (folder / name).is_dir():
                return folder / name
        except OSError as error:
            raise _unreadable(folder / name, error) from error
    return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error) from error
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        value: dict[str, Any] = toml.loads(data.decode())
    except (UnicodeDecodeError, toml.TOMLDecodeError) as error:
        raise BadInputError(f"{path} is not valid TOML: {error}") from error
    return value or None


def _certificates(folder: Path) -> dict[str, Any]:
    """Docker's certificate files, as hosts.toml would say it."""
    try:
        files = sorted(path for path in folder.iterdir() if not path.is_dir())
    except OSError as error:
        raise _unreadable(folder, error) from error
    keys = {path.stem: path for path in files if path.suffix == ".key"}
    pairs = [[str(path), str(keys.get(path.stem, ""))] for path in files if path.suffix == ".cert"]
    value: dict[str, Any] = {"ca": [str(path) for path in files if path.suffix == ".crt"], "client": pairs}
    return {key: item for key, item in value.items() if item}


def _unreadable(path: Path, error: OSError) -> FloeError:
    kind = AccessDeniedError if isinstance(error, PermissionError) else BadInputError
    return kind(f"cannot read {path}: {error.strerror}", hint="check the setting registry_config")


class _Reader:
    """Turns a parsed hosts.toml into endpoints. Keys that it does not know are left alone, as containerd does."""

    def __init__(self, registry: str, path: Path, *, plain_http: bool) -> None:
        self._registry, self._path, self._plain_http = registry, path, plain_http

    def endpoints(self, value: dict[str, Any]) -> list[Endpoint]:
        hosts = value.get("host", {})
        if not isinstance(hosts, dict) or not all(isinstance(table, dict) for table in hosts.values()):
            raise self._wrong("host", 'it is no table [host."ADDRESS"]')
        found = [self._endpoint(f"host {number}", *item) for number, item in enumerate(hosts.items(), 1)]
        return [*found, self._endpoint("server", self._text(value, "server"), value)]

    def _endpoint(self, key: str, server: str, table: dict[str, Any]) -> Endpoint:
        capabilities = self._capabilities(table)
        override = self._flag(table, "override_path")
        if server:
            scheme, host, path = self._address(key, server)
            path = posixpath.normpath(path) if path else ""
            if not override and not path.endswith("/v2"):
                path = path.rstrip("/") + "/v2"
        else:
            # The registry itself: it can do everything, whatever the file says of it.
            scheme = "http" if self._plain_http else "https"
            host = _HUB_ADDRESS if self._registry == DOCKER_HUB else self._registry
            path, capabilities = "/v2", _ALL
        tls = TLS(self._ca(table), self._client(table), self._flag(table, "skip_verify"))
        guess = scheme == "http" and (tls.given or "skip_verify" in table) and not host.endswith(":80") and bool(server)
        return Endpoint(
            self._registry,
            f"{'https' if guess else scheme}://{host}",
            path,
            capabilities,
            tls,
            self._headers(table),
            self._duration(table),
            self._proxy(table),
            guess,
        )

    def _address(self, key: str, text: str, *, login: bool = False) -> tuple[str, str, str]:
        """Scheme, host and path. A proxy's address may hold a login, no other; one that does is not shown."""
        try:
            parts = urlsplit(text if text.startswith(("http://", "https://")) else f"https://{text}")
            user, at, host = parts.netloc.rpartition("@")
            port = parts.port  # raises for what is no port
        except ValueError:
            raise self._wrong(key, "it is no address SCHEME://HOST[:PORT][/PATH]") from None
        if at and not login:
            raise self._wrong(key, "it holds a user name; credentials are read from Docker's config")
        if _HOST.fullmatch(host) is None or port == 0 or parts.query or parts.fragment or (at and not user):
            raise self._wrong(key, "it is no address SCHEME://HOST[:PORT][/PATH]")
        return parts.scheme, host, parts.path

    def _capabilities(self, table: dict[str, Any]) -> frozenset[str]:
        given = [text.lower() for text in self._texts(table, "capabilities")]
        unknown = set(given) - _ALL
        if unknown:
            raise self._wrong("capabilities", f"{min(unknown)!r} is none of pull, resolve, push")
        return frozenset(given) or _ALL

    def _ca(self, table: dict[str, Any]) -> tuple[Path, ...]:
        return tuple(self._file(text) for text in self._texts(table, "ca"))

    def _client(self, table: dict[str, Any]) -> tuple[tuple[Path, Path | None], ...]:
        given = table.get("client", [])
        found: list[tuple[Path, Path | None]] = []
        for item in [given] if isinstance(given, str) else given if isinstance(given, list) else [None]:
            pair = [item, ""] if isinstance(item, str) else item
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise self._wrong("client", "it is no file, list of files or list of pairs of files")
            found.append((self._file(pair[0]), self._file(pair[1]) if pair[1] else None))
        return tuple(found)

    def _headers(self, table: dict[str, Any]) -> dict[str, str]:
        given = table.get("header", {})
        if not isinstance(given, dict):
            raise self._wrong("header", "it is no table")
        headers = {}
        for name in given:
            # Several values of one header are the same as one with commas (RFC 9110, 5.3).
            headers[name] = value = ", ".join(self._texts(given, name))
            if _TOKEN.fullmatch(name) is None or not (value.isascii() and value.isprintable()):
                raise self._wrong(f"header {name!r}", "it cannot be sent")
        return headers

    def _duration(self, table: dict[str, Any]) -> float | None:
        text = self._text(table, "dial_timeout")
        if not text:
            return None
        parts = _DURATION.findall(text)
        seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
        if "".join(number + unit for number, unit in parts) != text or not 0 < seconds < 1e6:
            raise self._wrong("dial_timeout", f'{text!r} is no time such as "500ms" or "1m30s"')
        return seconds

    def _proxy(self, table: dict[str, Any]) -> str | None:
        text = self._text(table, "proxy")
        if not text:
            return None
        scheme = text.partition("://")[0]
        if scheme in ("socks5", "socks5h"):
            raise UnsupportedError(f"{self._path}: proxy: Floe speaks to HTTP proxies only, not {scheme}")
        if scheme not in ("http", "https") or self._address("proxy", text, login=True)[2] not in ("", "/"):
            raise self._wrong("proxy", "it is no address SCHEME://HOST[:PORT]")
        return text

    def _file(self, text: str) -> Path:
        return self._path.parent / text

    def _flag(self, table: dict[str, Any], key: str) -> bool:
        value = table.get(key, False)
        if not isinstance(value, bool):
            raise self._wrong(key, "it is neither true nor false")
        return value

    def _text(self, table: dict[str, Any], key: str) -> str:
        value = table.get(key, "")
        if not isinstance(value, str):
            raise self._wrong(key, "it is no text")
        return value

    def _texts(self, table: dict[str, Any], key: str) -> list[str]:
        value = table.get(key, [])
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise self._wrong(key, "it is neither a text nor a list of texts")
        return items

    def _wrong(self, key: str, why: str) -> BadInputError:
        return BadInputError(f"{self._path}: {key}: {why}", hint="see containerd's documentation of hosts.toml")
