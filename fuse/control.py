"""The worker's end of the control socket (protos/packfs_control.py): one thread, any number of clients."""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from floe.fuse.warming import Wish
from floe.protos import packfs_control as wire
from floe.store.errors import BadInputError, FloeError

_log = logging.getLogger(__name__)
_BACKLOG = 64
_REST = 1.0  # seconds in which nobody is accepted after that failed


class _Client:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = b""


class Warms(Protocol):
    """See Warming."""

    def warm(self, name: str, wish: Wish) -> dict[str, Any]:
        """Have an order worked on; how far it is."""
        ...

    def forget(self, name: str) -> None:
        """Give an order up."""
        ...


class ControlServer:
    """Answers on `<run_dir>/packfs.sock` from its own daemon thread until `close`."""

    def __init__(
        self,
        run_dir: Path,
        *,
        status: Callable[[], dict[str, Any]],
        inflight: Callable[[Sequence[str]], tuple[int, list[int]]],
        mounted: Callable[[str, Sequence[str]], object] = lambda _tree, _packs: None,
        expected: Callable[[str, int], object] = lambda _tree, _nbytes: None,
        unexpected: Callable[[str], object] = lambda _tree: None,
        started: Callable[[str, str, Sequence[str], str], object] = lambda _key, _name, _trees, _traceparent: None,
        warming: Warms | None = None,
        frames: Callable[[Sequence[str]], dict[str, Any]] = lambda _packs: {"packs": {}, "left": []},
    ) -> None:
        self._warming = warming
        self._status = status
        self._inflight = inflight
        self._mounted = mounted
        self._expected = expected
        self._unexpected = unexpected
        self._started = started
        self._frames = frames
        self._listener = _bind(run_dir)
        self._wake, self._waker = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering. The socket's file stays, for the next worker to replace."""
        self._waker.send(b"x")
        self._thread.join()
        for sock in (self._listener, self._wake, self._waker):
            sock.close()

    def _serve(self) -> None:
        again_at: float | None = None  # when newcomers are looked at again
        while True:
            pause = None if again_at is None else max(0.0, again_at - time.monotonic())
            for key, _ in self._selector.select(pause):
                if key.fileobj is self._wake:
                    self._end()
                    return
                if key.fileobj is not self._listener:
                    self._receive(key.data)
                elif not self._accept():
                    self._selector.unregister(self._listener)
                    again_at = time.monotonic() + _REST
            if again_at is not None and time.monotonic() >= again_at:
                self._selector.register(self._listener, selectors.EVENT_READ)
                again_at = None

    def _accept(self) -> bool:
        """Let a newcomer in; False when that cannot be, such as without descriptors: it would be found waiting again at once."""
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            _log.warning("a control connection waits, since it cannot be accepted: %s", error)
            return False
        sock.settimeout(1.0)  # for a client that does not take its answers
        self._selector.register(sock, selectors.EVENT_READ, _Client(sock))
        return True

    def _end(self) -> None:
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, _Client):
                key.data.sock.close()
        self._selector.close()

    def _receive(self, client: _Client) -> None:
        try:
            data = client.sock.recv(65536)
            client.buffer += data
            *lines, client.buffer = client.buffer.split(b"\n")
            for line in lines:
                client.sock.sendall(wire.encode(self._answer(line)))
            if data and len(client.buffer) <= wire.MAX_LINE:
                return
        except OSError:
            pass
        self._selector.unregister(client.sock)
        client.sock.close()

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            return {"ok": True, **self._result(wire.decode(line))}
        except FloeError as error:
            return {"ok": False, "error": str(error), "hint": error.hint}
        except Exception as error:
            _log.exception("a control request failed")
            return {"ok": False, "error": repr(error), "hint": ""}

    def _result(self, request: dict[str, Any]) -> dict[str, Any]:
        op = request.get("op")
        if op == wire.PING:
            return {"pid": os.getpid()}
        if op == wire.STATUS:
            return self._status()
        if op == wire.INFLIGHT:
            count, reads = self._inflight(_packs(request))
            return {"inflight": count, "reads": reads}
        if op == wire.MOUNTED:
            self._mounted(str(request.get("tree")), _packs(request))
            return {}
        if op == wire.EXPECTED:
            self._expected(str(request.get("tree")), _bytes(request))
            return {}
        if op == wire.UNEXPECTED:
            self._unexpected(str(request.get("tree")))
            return {}
        if op == wire.STARTED:
            key, name, trace = (str(request.get(field, "")) for field in ("key", "name", "traceparent"))
            self._started(key, name, _texts(request, "trees"), trace)
            return {}
        if op == wire.WARM and self._warming is not None:
            return self._warming.warm(str(request.get("name")), Wish.decode(request))
        if op == wire.FORGET and self._warming is not None:
            self._warming.forget(str(request.get("name")))
            return {}
        if op == wire.FRAMES:
            return self._frames(_packs(request))
        raise BadInputError(f"unknown operation {op!r}")


def _packs(request: dict[str, Any]) -> list[str]:
    return _texts(request, "packs")


def _texts(request: dict[str, Any], key: str) -> list[str]:
    texts = request.get(key)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadInputError(f"{request['op']} needs a list of {key}")
    return texts


def _bytes(request: dict[str, Any]) -> int:
    nbytes = request.get("bytes")
    if not isinstance(nbytes, int) or isinstance(nbytes, bool) or nbytes < 0:
        raise BadInputError(f"{request['op']} needs a number of bytes")
    return nbytes


def _bind(run_dir: Path) -> socket.socket:
    """Listen under a new name, then rename: a client meets the old server, the new one, or a refusal."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    temporary = f"{wire.SOCKET_NAME}.{os.getpid()}"
    # By descriptor, since a socket address holds 107 bytes and run directories may be deeper.
    directory = os.open(run_dir, os.O_PATH | os.O_DIRECTORY)
    try:
        (run_dir / temporary).unlink(missing_ok=True)
        listener.bind(f"/proc/self/fd/{directory}/{temporary}")
        (run_dir / temporary).chmod(0o600)
        listener.listen(_BACKLOG)
        (run_dir / temporary).rename(run_dir / wire.SOCKET_NAME)
    except BaseException:
        listener.close()
        raise
    finally:
        os.close(directory)
    return listener
