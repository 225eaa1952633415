"""python -m bench.throttle HOST:PORT: a TCP proxy that makes a server on loopback as far and as narrow as S3 is.

Each request waits one round trip, a new connection's first one two, as TCP's handshake wants; each connection is capped
in both directions, and none takes from another. Bytes go from socket to socket inside the kernel by splice(2), so the
proxy costs little of the cores that are measured. It prints its own HOST:PORT, and ends when its standard input does.

tests/support/slow_proxy.py is the one for faults: inside the test's process, changed while it runs, one line for all.
"""

import argparse
import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

DELAY = 0.020  # seconds, there and back
RATE = 90_000_000  # bytes a second of one connection
PIECE = 1 << 20  # bytes moved by one call at most
_BURST = 0.005  # seconds' worth of bytes that go unhindered after a pause, and make up for sleeps that last too long
_SHORTEST = 0.0005  # seconds; a shorter sleep costs more than it shapes, and its bytes are counted all the same


class Pace:
    """A token bucket of `rate` bytes a second, None for no limit, that holds `burst` seconds' worth of them at most."""

    def __init__(self, rate: float | None, burst: float = _BURST) -> None:
        self._rate = rate
        self._burst = burst
        self._due = 0.0  # when the bytes so far should all have passed

    def wait(self, count: int, now: float) -> float:
        """Seconds to wait before `count` more bytes are handed on at `now`, given that none went earlier than told."""
        if self._rate is None:
            return 0.0
        self._due = max(self._due, now - self._burst) + count / self._rate
        early = self._due - now
        return early if early > _SHORTEST else 0.0


class Turns:
    """Who spoke last on a connection, and so which bytes begin a request."""

    def __init__(self, delay: float) -> None:
        self._delay = delay
        self._wait = 2 * delay  # of the first request: the handshake's round trip is in it

    def asked(self) -> float:
        """Seconds that bytes of a request wait: the round trip when they are its first, else none."""
        wait, self._wait = self._wait, 0.0
        return wait

    def answered(self) -> None:
        """Bytes of an answer passed: what is asked next is a new request."""
        self._wait = self._delay


class Throttle:
    """Listens on a port of loopback, `address` ("127.0.0.1:PORT"), in threads of this process. `delay` in seconds."""

    def __init__(self, upstream: tuple[str, int], *, delay: float = DELAY, rate: float | None = RATE) -> None:
        self._upstream, self._delay, self._rate = upstream, delay, rate
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.address = "{}:{}".format(*self._listener.getsockname())
        threading.Thread(target=self._accept, name="throttle", daemon=True).start()

    def close(self) -> None:
        """Take no more connections; those there are go on until one side closes them."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            server = socket.create_connection(self._upstream)
            with server:
                for each in (client, server):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                turns = Turns(self._delay)
                requests = threading.Thread(target=self._requests, args=(client, server, turns), daemon=True)
                requests.start()
                _pump(server, client, Pace(self._rate), turns.answered)
                # Whoever asked and then only listens has been answered; a request that is still waited for never will be.
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RD)
                requests.join()

    def _requests(self, client: socket.socket, server: socket.socket, turns: Turns) -> None:
        def asked() -> None:
            if wait := turns.asked():
                time.sleep(wait)

        _pump(client, server, Pace(self._rate), asked)


def _pump(source: socket.socket, target: socket.socket, pace: Pace, before: Callable[[], None]) -> None:
    """Hand all that `source` sends on to `target`, then close that direction; `before` runs before each piece."""
    out, into = os.pipe()
    try:
        fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, PIECE)
        while count := os.splice(source.fileno(), into, PIECE):
            before()
            if wait := pace.wait(count, time.monotonic()):
                time.sleep(wait)
            while count:
                count -= os.splice(out, target.fileno(), count)
    except OSError:
        pass  # one side has gone
    finally:
        os.close(out)
        os.close(into)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@contextmanager
def running(upstream: str, *, delay: float = DELAY, rate: float | None = RATE) -> Iterator[str]:
    """A proxy before `upstream` (HOST:PORT) in a process of its own; its HOST:PORT."""
    command = [sys.executable, "-m", "bench.throttle", upstream, "--delay", str(delay), "--rate", str(rate or 0)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            if not address:
                raise SystemExit("bench: the throttling proxy did not start")
            yield address
        finally:
            process.stdin.close()
            process.wait()


def main() -> int:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.throttle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("upstream", metavar="HOST:PORT", help="the server to stand before")
    parser.add_argument("--delay", type=float, default=DELAY, help="seconds of a round trip (default 0.020)")
    parser.add_argument(
        "--rate", type=float, default=RATE, help="bytes a second of a connection (default 90e6; 0: no limit)"
    )
    options = parser.parse_args()
    host, _, port = options.upstream.rpartition(":")
    proxy = Throttle((host, int(port)), delay=options.delay, rate=options.rate or None)
    print(proxy.address, flush=True)
    sys.stdin.read()
    proxy.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
