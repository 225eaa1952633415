"""Unix sockets that must not be taken from a process that listens on them."""

from __future__ import annotations

import socket
from pathlib import Path

from floe.store.errors import BusyError


def refuse_live_socket(address: Path) -> None:
    """BusyError when somebody answers on the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(address))
        except OSError:
            return
    raise BusyError(
        f"another process listens on {address}", hint="stop it, or choose another address for this snapshotter"
    )
