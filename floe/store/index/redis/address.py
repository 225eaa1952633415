"""The address of an index in Redis: `rediss://user@host:6379?ca=FILE`. Pure.

Options: `ca`, `cert`, `key` (PEM files), `password_file`, `sentinel` (a master's name: the hosts are Sentinels) with
`sentinel_password_file`, `iam` (memorydb, elasticache, elasticache-serverless) with `name` and `region`, and `prefix`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlencode

from floe.store.errors import BadInputError

EXAMPLE = "use redis://host:6379 or rediss://user@host:6379?ca=FILE&password_file=FILE"
IAM_SERVICES = ("memorydb", "elasticache", "elasticache-serverless")
_PORT, _SENTINEL_PORT = 6379, 26379
_FILES = ("ca", "cert", "key", "password_file", "sentinel_password_file")
_OPTIONS = (*_FILES, "sentinel", "iam", "name", "region", "prefix")
_TLS_ONLY = ("ca", "cert", "key", "iam")
_HOST = re.compile(r"\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+")
_PREFIX = re.compile(r"[A-Za-z0-9_.-]{1,32}")


@dataclass(frozen=True)
class RedisAddress:
    """Where the servers are and how to enter. `hosts`: (host, port), of which one that answers is enough.

    `options` holds what stands after the question mark, files as absolute paths.
    """

    hosts: tuple[tuple[str, int], ...]
    tls: bool = False
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, url: str) -> RedisAddress:
        """Parse and check; BadInputError names the part that is wrong, and never quotes a password."""
        # Not urlsplit: it refuses a list of hosts with an IPv6 address in it.
        scheme, separator, rest = url.partition("://")
        if scheme not in ("redis", "rediss") or not separator:
            raise BadInputError("an index address in Redis begins with redis:// or rediss://", hint=EXAMPLE)
        place, _, query = rest.partition("?")
        if "@" in query:  # most likely behind the rest of a password, which must not be shown
            raise BadInputError(
                "index address: there is a '@' behind the '?'",
                hint="write %3F for a ? in a password, and %40 for a @ in an option",
            )
        entry, _, place = place.rpartition("@")
        hosts, _, path = place.partition("/")
        if path not in ("", "0"):
            raise BadInputError(
                "index address: only database 0 can be used", hint="leave the path away; stores share a database"
            )
        options = _options(query)
        user, _, password = (unquote(part) for part in entry.partition(":"))
        port = _SENTINEL_PORT if "sentinel" in options else _PORT
        found = tuple(_host(text, port) for text in hosts.split(","))
        made = cls(found, scheme == "rediss", user or None, password or None, tuple(sorted(options.items())))
        made._check()
        return made

    def option(self, name: str) -> str | None:
        """The value of an option; None when it is not given."""
        return dict(self.options).get(name)

    @property
    def prefix(self) -> str:
        """What every key begins with."""
        return self.option("prefix") or "floe"

    @property
    def shown(self) -> str:
        """The address without password and files, for people and logs."""
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        entry = f"{self.user}@" if self.user else ""
        named = [(name, value) for name, value in self.options if name in ("sentinel", "prefix")]
        query = f"?{urlencode(named)}" if named else ""
        return f"{'rediss' if self.tls else 'redis'}://{entry}{hosts}{query}"

    def _check(self) -> None:
        given = dict(self.options)
        for name in _TLS_ONLY:
            if name in given and not self.tls:
                raise BadInputError(f"index address: the option {name!r} needs TLS", hint="write rediss://")
        for name in _FILES:
            if name in given and not given[name].startswith("/"):
                raise BadInputError(f"index address: {name}={given[name]!r} is not an absolute path")
        if self.password and "password_file" in given:
            raise BadInputError("index address: it has both a password and a password_file")
        if "cert" in given and "key" not in given:
            raise BadInputError("index address: the option 'cert' needs 'key'", hint="give key=FILE")
        if "prefix" in given and _PREFIX.fullmatch(given["prefix"]) is None:
            raise BadInputError("index address: a prefix is letters, digits, '_', '.' and '-', at most 32 of them")
        if "sentinel_password_file" in given and "sentinel" not in given:
            raise BadInputError("index address: the option 'sentinel_password_file' needs 'sentinel'")
        if "iam" in given:
            self._check_iam(given)
        elif "name" in given or "region" in given:
            raise BadInputError("index address: the options 'name' and 'region' belong to 'iam'")

    def _check_iam(self, given: dict[str, str]) -> None:
        if given["iam"] not in IAM_SERVICES:
            raise BadInputError(f"index address: iam={given['iam']!r} is none of {', '.join(IAM_SERVICES)}")
        if not self.user or "name" not in given:
            raise BadInputError(
                "index address: iam needs a user and a name",
                hint="use rediss://USER@HOST:6379?iam=memorydb&name=CLUSTER&region=REGION",
            )
        if self.password or "password_file" in given:
            raise BadInputError("index address: with iam the password is a token; give none")


def _options(query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in _OPTIONS:
            raise BadInputError(f"index address has an unknown option {name!r}", hint=f"known: {', '.join(_OPTIONS)}")
        if name in options or not value:
            raise BadInputError(f"index address has the option {name!r} twice or without a value", hint=EXAMPLE)
        options[name] = value
    return options


def _host(text: str, default: int) -> tuple[str, int]:
    match = re.fullmatch(rf"({_HOST.pattern})(?::(\d{{1,5}}))?", text)
    if match is None or not 0 < int(match[2] or default) < 1 << 16:
        raise BadInputError(f"index address: {text!r} is not HOST[:PORT]", hint=EXAMPLE)
    return match[1].strip("[]"), int(match[2] or default)
