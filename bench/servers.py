"""The servers that the remote subjects need, private and on loopback: an S3 server and a Redis."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.redis_server import RedisServer
from support.seaweed import ACCESS_KEY, SECRET_KEY, Seaweed
from support.slow_disk import SlowDisk, drop_page_cache, slow_disk
from support.slow_proxy import SlowProxy

__all__ = ["KEYS", "SlowDisk", "drop_page_cache", "redis", "s3", "slow_disk", "slowed"]

KEYS = (ACCESS_KEY, SECRET_KEY)


@contextmanager
def s3(work: Path) -> Iterator[Seaweed]:
    """A SeaweedFS whose data lie below `work`."""
    server = Seaweed(work / "s3")
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def redis(work: Path) -> Iterator[str]:
    """A Redis without persistence; its URL."""
    server = RedisServer(work / "redis")
    try:
        yield f"redis://127.0.0.1:{server.port}/0"
    finally:
        server.stop()


@contextmanager
def slowed(server: Seaweed, *, latency: float, rate: float | None = None) -> Iterator[str]:
    """An endpoint that reaches a server behind `latency` seconds and one line of `rate` bytes a second."""
    upstream = urlsplit(server.endpoint)
    proxy = SlowProxy((upstream.hostname or "", upstream.port or 0), latency=latency, rate=rate)
    try:
        yield f"http://{proxy.address}"
    finally:
        proxy.close()
