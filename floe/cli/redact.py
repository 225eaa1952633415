"""Secrets taken out of what leaves a node: values that are known to be secret, and what looks like one. Pure.

Rather too much than too little: what is taken out reads `<secret>`.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote, quote_plus, unquote, urlsplit

MARK = "<secret>"
_SHORTEST = 4  # characters; what is shorter would blot out half a log, and is no secret
# What goes around a thing (`cache_bypass`) is none that lets one in.
_WORDS = r"password|passwd|passphrase|(?<!by)pass|secret|token|credential|signature|api[-_]?key|access[-_]?key|private[-_]?key|auth(?:orization)?|cookie|bearer"
_NAMED = re.compile(rf"(?i)(?:{_WORDS})|(?:^|[_-])(?:pwd|key|sas)$")
# Values that many a setting has, under names like these too. Taken for secrets they would blot out half a log.
_PLAIN = (
    "always",
    "auto",
    "default",
    "disabled",
    "enabled",
    "false",
    "never",
    "none",
    "null",
    "off",
    "on",
    "true",
    "yes",
)
_PLAINLY = "|".join(_PLAIN)
# Files that settings name hold secrets; their paths are none, an id of a key is public, and google-auth is a package.
_PUBLIC = frozenset(
    ("signing_key", "trusted_keys", "trusted_key", "key", "password_file", "sentinel_password_file", "google-auth")
)
_FOLDERS = ("PWD", "OLDPWD")  # variables of every shell
_PATTERNS = (
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), MARK),
    # scheme://user:password@host, and a token in the place of a user. A password may hold a slash though it should not; a port does not.
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)(?:[^\s/\"'<>@]*:(?!\d+/)[^\s\"'<>]*|[^\s/\"'<>]*)@"), rf"\1{MARK}@"),
    (re.compile(r"\b(?:AKIA|ASIA|AIDA|AROA)[A-Z0-9]{12,}\b"), MARK),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]*)?"), MARK),
    (
        re.compile(r"(?i)\b(bearer|basic|negotiate|aws4-hmac-sha256)\s+[^\s\"']+(?:[^\"'\r\n]*Signature=\w+)?"),
        rf"\1 {MARK}",
    ),
    (re.compile(r"\b(?:gh[opsu]_|github_pat_|glpat-|hf_|xox[abps]-|ya29\.)[\w.-]{8,}"), MARK),
    # name=value, name: value, "name": "value", also in the query of an address.
    (
        re.compile(
            rf"""(?ix) ( [\w.-]*(?:{_WORDS})[\w.-]* ["']? \s* [=:] \s* )
                (?! "(?:{_PLAINLY})" | '(?:{_PLAINLY})' | (?:{_PLAINLY})(?:[\s&,;"'}}\]]|\Z) )
                (?: "(?:[^"\\]|\\.)*" | '[^']*' | [^\s&,;"'}}\]]+ )"""
        ),
        rf"\1{MARK}",
    ),
)


class Redactor:
    """Takes `secrets`, as they are and as addresses, JSON and base64 write them, and all that looks like one out of texts."""

    def __init__(self, secrets: Iterable[str]) -> None:
        wanted = (secret for secret in secrets if len(secret) >= _SHORTEST and secret.lower() not in _PLAIN)
        forms = {form for secret in wanted for form in _forms(secret)}
        found = sorted(forms, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, found))) if found else None

    def text(self, text: str) -> str:
        """`text` without secrets."""
        if self._known is not None:
            text = self._known.sub(MARK, text)
        for pattern, by in _PATTERNS:
            text = pattern.sub(by, text)
        return text

    def value(self, value: Any) -> Any:
        """What JSON holds, without secrets: also by the names under which they stand."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self._named(str(key), one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(one) for one in value]
        return value

    def _named(self, name: str, value: Any) -> Any:
        if isinstance(value, str) and value and value.lower() not in _PLAIN and is_secret_name(name):
            return MARK
        return self.value(value)


def is_secret_name(name: str) -> bool:
    """Whether a variable, setting or field of that name is likely to hold a secret."""
    return name.lower().removeprefix("floe_") not in _PUBLIC and _NAMED.search(name) is not None


def secrets_of(environ: Mapping[str, str]) -> set[str]:
    """Values of variables that are secret by their names, and what addresses in others hold before their @."""
    found = set()
    for name, value in environ.items():
        if is_secret_name(name) and name not in _FOLDERS:
            found.add(value)
        found |= secrets_in_address(value)
    return found


def secrets_in_address(text: str) -> set[str]:
    """Passwords in addresses, as they stand there and as they are meant."""
    found = set()
    for part in text.split():
        try:
            address = urlsplit(part)
        except ValueError:
            continue
        _, _, password = address.netloc.rpartition("@")[0].partition(":")
        found |= {password, unquote(password)}
    return found - {""}


def _forms(secret: str) -> set[str]:
    dumped = (json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1])
    encoded = base64.b64encode(secret.encode("utf-8", "surrogateescape")).decode().rstrip("=")
    return {secret, quote(secret, safe=""), quote_plus(secret), *dumped, repr(secret)[1:-1], encoded}
