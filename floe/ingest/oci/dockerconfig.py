"""Docker's config file: which registry is spoken to as whom, or by which credential helper.

Source: the Docker CLI's cli/config/configfile. `auths` is keyed by host, or by an address with scheme and path.
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
from typing import Any, TypeVar

from floe.ingest.oci.credentials import Credentials
from floe.ingest.oci.references import DOCKER_HUB
from floe.store.errors import BadInputError

_HUB_SERVER = "https://index.docker.io/v1/"  # what Docker calls its Hub towards helpers
_HUB_HOSTS = ("index.docker.io", "registry-1.docker.io", DOCKER_HUB)
T = TypeVar("T")
_INLINE = "DOCKER_AUTH_CONFIG"
_TOKEN_USER = "<token>"  # noqa: S105 - what Docker's config says in place of a user name
_CONFIG_MAX = 4 << 20  # bytes


@dataclass(frozen=True)
class DockerConfig:
    """`auths` and `helpers` by host; `store` is the helper for all other hosts, or empty. `where` names the file."""

    where: str
    auths: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    helpers: Mapping[str, str] = field(default_factory=dict)
    store: str = ""

    def find(self, host: str) -> Credentials | None:
        """The entry for `host`; None when there is none, or an empty one. BadInputError: it is malformed."""
        entry = next((self.auths[name] for name in _names(host) if name in self.auths), None)
        return None if entry is None else _credentials(entry, f"the entry for {host} in {self.where}")

    def helper(self, host: str) -> str:
        """The name of the credential helper for `host`: X of `docker-credential-X`; empty when there is none."""
        named = next((self.helpers[name] for name in _names(host) if name in self.helpers), None)
        return self.store if named is None else named


def config_path(environ: Mapping[str, str] | None = None) -> Path:
    """Docker's config file: `$DOCKER_CONFIG/config.json`, else `~/.docker/config.json`."""
    values = os.environ if environ is None else environ
    folder = values.get("DOCKER_CONFIG")
    return Path(folder) / "config.json" if folder else Path(values.get("HOME") or "/root") / ".docker" / "config.json"


def read_config(path: Path) -> DockerConfig:
    """The config file `path`; an empty config when there is none. BadInputError: it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(_CONFIG_MAX)
    except (FileNotFoundError, NotADirectoryError):
        return DockerConfig(str(path))
    except OSError as error:
        raise BadInputError(f"Docker's config file {path} cannot be read: {error.strerror}") from error
    return parse_config(data, str(path), f"Docker's config file {path}")


def inline_config(environ: Mapping[str, str]) -> DockerConfig | None:
    """What the variable DOCKER_AUTH_CONFIG holds in place of a file, as the Docker CLI reads it; None: nothing."""
    text = environ.get(_INLINE)
    return parse_config(text.encode(), _INLINE, f"the variable {_INLINE}") if text else None


def parse_config(data: bytes, where: str, what: str) -> DockerConfig:
    """A config out of JSON. BadInputError says that `what` is not valid, never what it holds."""
    try:
        value = json.loads(data) if data.strip() else {}
        auths = _by_host({key: e for key, e in (value.get("auths") or {}).items() if isinstance(e, dict)})
        helpers = _by_host({key: str(name) for key, name in (value.get("credHelpers") or {}).items()})
        return DockerConfig(where, auths, helpers, str(value.get("credsStore") or ""))
    except json.JSONDecodeError as error:
        raise BadInputError(f"{what} is not valid JSON: {error}") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise BadInputError(f"{what} is not valid: a part of it is of the wrong kind") from error


def is_hub(host: str) -> bool:
    """Whether `host` is one of the names of Docker Hub."""
    return host in _HUB_HOSTS


def server_name(host: str) -> str:
    """What a credential helper is asked for to get the credentials of `host`."""
    return _HUB_SERVER if is_hub(host) else host


def _names(host: str) -> tuple[str, ...]:
    return _HUB_HOSTS if is_hub(host) else (host,)


def _by_host(entries: Mapping[str, T]) -> dict[str, T]:
    """Entries by host. One for a part of a registry (`HOST/PROJECT`) counts where there is none for all of it; the first does."""
    whole: dict[str, T] = {}
    parts: dict[str, T] = {}
    for key, entry in entries.items():
        host, _, path = re.sub(r"^https?://", "", key).partition("/")
        if path.strip("/") in ("", "v1", "v2"):
            whole[host] = entry
        else:
            parts.setdefault(host, entry)
    return {**parts, **whole}


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
    return login(username, password, identity, what)


def login(username: str, password: str, identity: str, origin: str) -> Credentials | None:
    """Credentials as Docker writes them down: for the user `<token>` the password is an identity token."""
    if username == _TOKEN_USER:
        identity, username, password = identity or password, "", ""
    if not (username or identity):
        return None
    return Credentials(username, password, identity, origin)
