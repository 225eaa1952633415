"""Where a daemon serves its metrics: a unix socket or a port of this machine alone. Pure."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from floe.store.errors import BadInputError


def parse_address(text: str) -> Path | tuple[str, int]:
    """`unix:/path` as a Path, `127.0.0.1:9100` or `[::1]:9100` as host and port; BadInputError otherwise."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:").removeprefix("//")
        if not path.startswith("/"):
            raise BadInputError(f"metrics address {text!r} has no absolute path", hint="write unix:/path/to/socket")
        return Path(path)
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 0xFFFF:
        raise BadInputError(f"{text!r} is no metrics address", hint="use unix:/path/to/socket or 127.0.0.1:PORT")
    host = "127.0.0.1" if host == "localhost" else host
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise BadInputError(
            f"metrics are served on loopback only, not on {host or 'every address'!r}",
            hint="use 127.0.0.1:PORT or unix:/path/to/socket, and an exporter of yours in front of it",
        )
    return host, int(port)
