"""The way to the store: where it leads, how far it is, and what the interface claims to carry."""

from __future__ import annotations

import fcntl
import socket
import struct
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from floe.selfbench.figures import Network, percentile
from floe.store.errors import UnavailableError
from floe.store.objects.base import ObjectStore

_CONNECTS = 7
_TIMEOUT = 3.0  # seconds
_SIOCGIFADDR = 0x8915  # netdevice(7)


def endpoint(store: ObjectStore) -> str | None:
    """The URL that a store's requests go to; None where there is no network between."""
    from floe.store.objects.gcs import GCSStore  # noqa: PLC0415 - with obstore, which a local store need not load
    from floe.store.objects.s3 import S3Store  # noqa: PLC0415 - likewise

    if isinstance(store, GCSStore):
        return store.address.base
    if isinstance(store, S3Store):
        address = store.address
        host = f"s3.{store.region or 'us-east-1'}.amazonaws.com"
        return address.request_endpoint or f"https://{host if address.path_style else f'{address.bucket}.{host}'}"
    return None


def measure(url: str) -> Network:
    """How long a TCP connection to `url`'s host takes: one round trip. UnavailableError when none can be made."""
    parts = urlsplit(url)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    waits: list[float] = []
    local = ""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)[0]
        for _ in range(_CONNECTS):
            with socket.socket(family, kind, protocol) as connection:
                connection.settimeout(_TIMEOUT)
                begun = time.perf_counter()
                connection.connect(address)
                waits.append(time.perf_counter() - begun)
                local = str(connection.getsockname()[0])
    except OSError as error:
        raise UnavailableError(
            f"no connection to {parts.hostname}:{port}: {error.strerror or error}",
            hint="through a proxy this is no fault: only the distance is not known then",
        ) from error
    interface = _interface(local)
    return Network(url, percentile(waits, 0.5), interface, _link(interface))


def _interface(local: str) -> str | None:
    """The interface that has this IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                found = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == local:
                    return name
    return None


def _link(interface: str | None) -> float | None:
    """Bytes per second. Many virtual interfaces do not say, and loopback is none."""
    with suppress(OSError, ValueError):
        megabits = int(Path(f"/sys/class/net/{interface}/speed").read_text())
        if megabits > 0:
            return megabits * 1e6 / 8
    return None
