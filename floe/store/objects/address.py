"""What the addresses of buckets have in common: options after the `?`, endpoints, files. Pure."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from floe.store.errors import BadInputError


def parse_options(query: str, known: Collection[str], example: str) -> dict[str, str]:
    """The options of an address by name; BadInputError, hinting at `example`, for an unknown or repeated one."""
    options: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in known:
            raise BadInputError(f"store address has an unknown option {name!r}", hint=example)
        if name in options:
            raise BadInputError(f"store address has the option {name!r} twice", hint=example)
        options[name] = value
    return options


def check_endpoint(endpoint: str, example: str) -> str:
    """`endpoint` without a slash at its end; BadInputError unless it is http(s)://HOST[:PORT][/PATH] without secrets."""
    parts = urlsplit(endpoint)
    if parts.username is not None or parts.password is not None:
        raise BadInputError("the store's endpoint must not hold credentials")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise BadInputError(f"endpoint {endpoint!r} is not http://HOST[:PORT] or https://HOST[:PORT]", hint=example)
    return endpoint.rstrip("/")


def check_file(option: str, path: str | None) -> Path | None:
    """The path that an option gives, None when it is not given; BadInputError unless it is absolute."""
    if not path:
        return None
    if not Path(path).is_absolute():
        raise BadInputError(f"store address has {option}={path!r}, not an absolute path", hint=f"write {option}=/path")
    return Path(path)


def read_file(option: str, path: Path) -> bytes:
    """The file that an option names; BadInputError when it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInputError(
            f"cannot read {path}, the store address's {option}: {error.strerror}", hint=f"give {option} another file"
        ) from error
    return data


def read_certificates(path: Path) -> bytes:
    """The PEM certificates of a `ca` option; BadInputError when the file cannot be read or has none."""
    data = read_file("ca", path)
    if b"-----BEGIN CERTIFICATE-----" not in data:
        raise BadInputError(f"{path}, the store address's ca, holds no PEM certificate", hint="give ca another file")
    return data
