"""What registries and token servers answer when they want to know who asks. Pure.

Sources: distribution's docs/spec/auth (token, oauth), RFC 7235.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from floe.store import jsontext
from floe.store.errors import AccessDeniedError

_HEADER_MAX = 8192  # characters; http.client allows a hundred times 64 KiB
# A name is tried from its first letter alone, and a quote that is not closed reaches to the end: else the time taken grows
# with the square of what a stranger sends, and `re` holds up all threads meanwhile.
_PARAMETER = re.compile(r'(?<![a-z_])([a-z_]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))', re.IGNORECASE)
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)', re.DOTALL)


@dataclass(frozen=True)
class Challenge:
    """One `WWW-Authenticate` challenge: `scheme` in lower case and its parameters."""

    scheme: str
    parameters: Mapping[str, str]


@dataclass(frozen=True)
class Token:
    """`text` is the token, valid for `lifetime` seconds (None: not said); `identity`: a new identity token, or empty."""

    text: str = field(repr=False)
    lifetime: float | None = None
    identity: str = field(default="", repr=False)


def parse_challenges(header: str) -> list[Challenge]:
    """The challenges of a `WWW-Authenticate` header that Floe can answer: basic and bearer, in their order.

    A header longer than any that asks for something has none.
    """
    if len(header) > _HEADER_MAX:
        return []
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


def check_realm(challenge: Challenge, name: str, *, plain_http: bool) -> str:
    """The address a bearer challenge sends us to; AccessDeniedError when it is none, or would take secrets off TLS."""
    realm = challenge.parameters.get("realm", "")
    if not realm.startswith(("https://", "http://")):
        raise AccessDeniedError(f"{name} asks for a token from {realm!r}, which is no address")
    if realm.startswith("http://") and not plain_http:
        raise AccessDeniedError(
            f"{name} asks for a token from {realm} without TLS",
            hint="use --plain-http if that is meant",
        )
    return realm


def token_in(body: bytes, realm: str) -> Token:
    """The token in a token server's answer; AccessDeniedError when there is none."""
    try:
        value = jsontext.parse(body)
        text = value.get("token") or value.get("access_token")
        lifetime, identity = value.get("expires_in"), value.get("refresh_token")
    except (ValueError, AttributeError):
        text = lifetime = identity = None
    # HTTP allows no more in a header, and http.client no less than Latin-1.
    if not isinstance(text, str) or not (text.isascii() and text.isprintable()):
        raise AccessDeniedError(f"token server {realm} answered without a token")
    known = isinstance(lifetime, (int, float)) and not isinstance(lifetime, bool) and 0 < lifetime < math.inf
    return Token(text, float(lifetime) if known else None, identity if isinstance(identity, str) else "")


def _masked(header: str) -> str:
    """`header` with quoted strings blanked, so that nothing inside of them looks like a scheme."""
    return _QUOTED.sub(lambda m: "_" * len(m.group(0)), header)
