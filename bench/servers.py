"""The servers that the remote subjects need, private and on loopback: an S3 server and a Redis."""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

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
    program = shutil.which("redis-server")
    if program is None:
        raise SystemExit("bench: there is no redis-server here: run install/setup.sh bench, or use --local")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = work / "redis"
    folder.mkdir()
    arguments = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with subprocess.Popen([program, *arguments], stdout=subprocess.DEVNULL) as process:
        try:
            _wait(port)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()


def _wait(port: int) -> None:
    until = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > until:
                raise SystemExit("bench: redis-server did not start") from None
            time.sleep(0.05)
        else:
            return
