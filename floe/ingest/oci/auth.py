"""Credentials for registries: Docker's config file, and the challenges registries answer with.

Sources: distribution's docs/spec/auth (token, oauth), RFC 7235, and the Docker CLI's config file.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from floe.ingest.oci.references import DOCKER_HUB
from floe.store.errors import AccessDeniedError, BadInputError

_HUB_KEYS = ("index.docker.io", "registry-1.docker.io", DOCKER_HUB)
_PARAMETER = re.compile(r'([a-z_]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))', re.IGNORECASE)
_TOKEN_USER = "<token>"  # noqa: S105 - what Docker's config says in place of a user name
_CONFIG_MAX = 4 << 20  # bytes


@dataclass(frozen=True)
class Credentials:
    """A user name and password, or an identity (refresh) token. Never shown: repr leaves the secrets out."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)

    def basic(self) -> str:
        """The value of an Authorization header."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode("ascii")


@dataclass(frozen=True)
class Challenge:
    """One `WWW-Authenticate` challenge: `scheme` in lower case and its parameters."""

    scheme: str
    parameters: Mapping[str, str]


def config_path(environ: Mapping[str, str] | None = None) -> Path:
    """Docker's config file: `$DOCKER_CONFIG/config.json`, else `~/.docker/config.json`."""
    values = os.environ if environ is None else environ
    folder = values.get("DOCKER_CONFIG")
    return Path(folder) / "config.json" if folder else Path(values.get("HOME") or "/root") / ".docker" / "config.json"


def load_credentials(host: str, path: Path | None = None) -> Credentials | None:
    """What Docker's config file holds for `host`; None when there is nothing. BadInputError: it cannot be read."""
    path = path or config_path()
    try:
        with path.open("rb") as file:
            data = file.read(_CONFIG_MAX)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BadInputError(f"Docker's config file {path} cannot be read: {error.strerror}") from error
    try:
        value = json.loads(data)
        auths = value.get("auths") or {}
        entries = {_host_of(key): entry for key, entry in auths.items() if isinstance(entry, dict)}
    except (ValueError, AttributeError) as error:
        raise BadInputError(f"Docker's config file {path} is not valid: {error}") from error
    names = _HUB_KEYS if host == DOCKER_HUB else (host,)
    entry = next((entries[name] for name in names if name in entries), None)
    return None if entry is None else _credentials(entry, f"the entry for {host} in {path}")


def helper_named(host: str, path: Path | None = None) -> str:
    """The credential helper that Docker's config names for `host`, which Floe does not run; empty when none."""
    try:
        value = json.loads((path or config_path()).read_bytes())
        helper = (value.get("credHelpers") or {}).get(host) or value.get("credsStore") or ""
    except (OSError, ValueError, AttributeError):
        return ""
    return str(helper)


def parse_challenges(header: str) -> list[Challenge]:
    """The challenges of a `WWW-Authenticate` header that Floe can answer: basic and bearer, in their order."""
    found = []
    starts = list(re.finditer(r"(?:^|,)\s*(basic|bearer)(?=\s|,|$)", _masked(header), re.IGNORECASE))
    for number, match in enumerate(starts):
        end = starts[number + 1].start() if number + 1 < len(starts) else len(header)
        pairs = _PARAMETER.finditer(header[match.end() : end])
        parameters = {
            m.group(1).lower(): re.sub(r"\\(.)", r"\1", m.group(2)) if m.group(2) is not None else m.group(3)
            for m in pairs
        }
        found.append(Challenge(match.group(1).lower(), parameters))
    return found


def check_realm(challenge: Challenge, host: str, *, plain_http: bool) -> str:
    """The address a bearer challenge sends us to; AccessDeniedError when it is none, or would take secrets off TLS."""
    realm = challenge.parameters.get("realm", "")
    if not realm.startswith(("https://", "http://")):
        raise AccessDeniedError(f"registry {host} asks for a token from {realm!r}, which is no address")
    if realm.startswith("http://") and not plain_http:
        raise AccessDeniedError(
            f"registry {host} asks for a token from {realm} without TLS",
            hint="use --plain-http if that is meant",
        )
    return realm


def token_in(body: bytes, realm: str) -> str:
    """The token in a token server's answer."""
    try:
        value = json.loads(body)
        token = value.get("token") or value.get("access_token")
    except (ValueError, AttributeError):
        token = None
    if not isinstance(token, str) or not token.isprintable():
        raise AccessDeniedError(f"token server {realm} answered without a token")
    return token


def _masked(header: str) -> str:
    """`header` with quoted strings blanked, so that nothing inside of them looks like a scheme."""
    return re.sub(r'"(?:[^"\\]|\\.)*"', lambda m: '"' + "_" * (len(m.group(0)) - 2) + '"', header)


def _host_of(key: str) -> str:
    return re.sub(r"^https?://", "", key).split("/", 1)[0]


def _credentials(entry: Mapping[str, Any], what: str) -> Credentials | None:
    username, password = str(entry.get("username") or ""), str(entry.get("password") or "")
    identity = str(entry.get("identitytoken") or "")
    auth = entry.get("auth")
    if auth:
        try:
            decoded = base64.b64decode(str(auth), validate=True).decode()
        except (binascii.Error, UnicodeDecodeError) as error:
            raise BadInputError(f"{what} has an 'auth' that is not base64", hint="run `docker login` again") from error
        username, _, password = decoded.partition(":")
        password = password.rstrip("\0")
    if username == _TOKEN_USER:
        identity, username, password = identity or password, "", ""
    if not (username or identity):
        return None
    return Credentials(username, password, identity)
