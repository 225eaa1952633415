"""Ports of loopback for the servers that tests start."""

from __future__ import annotations

import os
import random
import socket

GRPC = 10000  # so far above a server's port are those of SeaweedFS's gRPC and of a Redis cluster's bus
_FIRST, _EACH, _SHARES = 12000, 2000, 5


def low_port() -> int:
    """A port below the range that the kernel gives to clients, free now as is the one `GRPC` above it.

    Workers of pytest-xdist draw from shares of their own: what one has found free, no other takes before it is used.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = _FIRST + worker % _SHARES * _EACH
    while True:
        port = random.randrange(first, first + _EACH)
        if is_free(port) and is_free(port + GRPC):
            return port


def is_free(port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
