"""The servers that the remote subjects need, private and on loopback: an S3 server and a Redis."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.redis_server import RedisServer
from support.seaweed import ACCESS_KEY, SECRET_KEY, Seaweed

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
