"""Unix sockets that must not be taken from a process that listens on them."""

from __future__ import annotations

import socket
from pathlib import Path

from floe.store.errors import BadInputError, BusyError

# sun_path holds 108 bytes, the last of them NUL (unix(7)).
_SOCKET_PATH_MAX = 107


def refuse_live_socket(address: Path) -> None:
    """BusyError when somebody answers on the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(address))
        except OSError:
            return
    raise BusyError(f"another process listens on {address}", hint="stop it, or choose another address for this one")


def check_address(address: Path) -> None:
    """BadInputError for a path that no unix socket can have."""
    if len(str(address).encode()) > _SOCKET_PATH_MAX:
        raise BadInputError(
            f"the socket path {address} is longer than the {_SOCKET_PATH_MAX} bytes a unix socket may have",
            hint="choose a shorter address",
        )
