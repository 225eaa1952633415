"""A unix socket that answers each connection with one line of JSON: how the snapshotter is."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from floe import __version__
from floe.rpc.sockets import refuse_live_socket
from floe.snapshotter.directories import translated
from floe.snapshotter.snapshotter import Figures
from floe.store import loglevel
from floe.store.process import accept

log = logging.getLogger(__name__)

NAME = "snapshotter-status.sock"
# How long a reader may take to read its line, in seconds.
_PATIENCE = 1.0


class StatusSocket:
    """Serves what `metrics()` says with pid and version at `<run_dir>/snapshotter-status.sock`, until `close`."""

    def __init__(self, run_dir: Path, metrics: Callable[[], Figures]) -> None:
        self._metrics = metrics
        self._path = run_dir / NAME
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with translated(f"status socket {self._path}"):
                run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
                refuse_live_socket(self._path)
                self._path.unlink(missing_ok=True)
                self._socket.bind(str(self._path))
                self._path.chmod(0o600)
                self._socket.listen(16)
        except BaseException:
            self._socket.close()
            raise
        self._thread = threading.Thread(target=self._serve, name="status", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering and take the socket away."""
        # shutdown wakes the accept that close alone would leave waiting.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def _serve(self) -> None:
        while (connection := accept(self._socket)) is not None:
            with connection:
                try:
                    connection.settimeout(_PATIENCE)
                    line = json.dumps(
                        {
                            "pid": os.getpid(),
                            "version": __version__,
                            "log_level": loglevel.current(),
                            **asdict(self._metrics()),
                        }
                    )
                    connection.sendall(line.encode() + b"\n")
                except Exception:
                    log.warning("a status request failed", exc_info=True)
