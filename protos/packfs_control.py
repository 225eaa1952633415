"""The worker's control socket: what goes over it, and a client.

`<run dir>/packfs.sock` is a unix stream socket of the pack filesystem's worker. Each side writes JSON
objects, one a line; every request line gets exactly one reply line, in order.

    {"op": "ping"}                              -> {"ok": true, "pid": 123}
    {"op": "status"}                            -> {"ok": true, ...}    keys: fuse/worker.py, `Worker.status`
    {"op": "inflight", "packs": ["<id>", ...]}  -> {"ok": true, "inflight": 2, "reads": [12, 18]}    see `unanswered`
    {"op": "mounted", "tree": "<digest>", "packs": ["<id>", ...]} -> {"ok": true}    said before the mount, see `announce`
    {"op": "expected", "tree": "<digest>", "bytes": 4096} -> {"ok": true}    see `expect`
    {"op": "unexpected", "tree": "<digest>"}    -> {"ok": true}    see `unexpect`
    {"op": "started", "key": "...", "name": "...", "trees": ["<digest>", ...]} -> {"ok": true}    see `started`
    {"op": "warm", "name": "...", "trees": ["<digest>", ...], "profile": false, "pinned": false, "fetch": true, "deep": false}
                                                -> {"ok": true, "state": "running", ...}    fuse/warming.py
    {"op": "forget", "name": "..."}             -> {"ok": true}    likewise
    {"op": "frames", "packs": ["<id>", ...]}    -> {"ok": true, "packs": {...}, "left": ["<id>", ...]}    see `frames`
    anything else                               -> {"ok": false, "error": "...", "hint": "..."}

The socket outlives its server: while one worker is being replaced by the next (some 0.3 s), or while a
stopped pack filesystem keeps only its keeper, connecting is refused and the client raises
UnavailableError. Reads may then wait in the kernel, so who wants to unmount must take that as "busy".
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from floe.store import jsontext
from floe.store.errors import BadInputError, FloeError, UnavailableError

SOCKET_NAME = "packfs.sock"
MAX_LINE = 1 << 20  # bytes; a tree has at most 256 packs, whose ids make 17 KiB
_PACKS_ASKED = 4096  # at once, of ids of 67 bytes each
PING, STATUS, INFLIGHT, MOUNTED = "ping", "status", "inflight", "mounted"
EXPECTED, UNEXPECTED, STARTED, FRAMES = "expected", "unexpected", "started", "frames"
WARM, FORGET = "warm", "forget"


def encode(message: dict[str, Any]) -> bytes:
    """One line of the protocol."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def announce(run_dir: Path, tree: str, packs: Iterable[str]) -> None:
    """Tell the worker that a tree over `packs` is about to be mounted, for its start-up profile.

    No answer is waited for, and nothing is raised: a mount neither waits nor fails for this.
    """
    _say(run_dir, {"op": MOUNTED, "tree": tree, "packs": list(packs)})


def expect(run_dir: Path, tree: str, nbytes: int) -> None:
    """Tell the worker that a tree, which is on this node with its packs' indexes, will be mounted some time soon.

    It begins to fetch what a start needs by the tree's profile, or without one `nbytes` of content from the front. As
    for `announce`, no answer is waited for, and nothing is raised.
    """
    _say(run_dir, {"op": EXPECTED, "tree": tree, "bytes": nbytes})


def unexpect(run_dir: Path, tree: str) -> None:
    """Take `expect` back: what is not asked for yet is not fetched."""
    _say(run_dir, {"op": UNEXPECTED, "tree": tree})


def started(run_dir: Path, key: str, name: str, trees: Iterable[str], traceparent: str = "") -> None:
    """Tell the worker that `key`, a container or a mountpoint, is about to read from `trees`, which are mounted.

    `name` is its image's or its model's, `traceparent` the trace that it belongs to, "" when unknown. As for `announce`, no answer is waited for, and nothing is raised.
    """
    named = {"traceparent": traceparent} if traceparent else {}
    _say(run_dir, {"op": STARTED, "key": key, "name": name, "trees": list(trees), **named})


def _say(run_dir: Path, message: dict[str, Any]) -> None:
    line = encode(message)
    with suppress(OSError), _connected(Path(run_dir), 0.0) as sock:
        sock.sendall(line)


def decode(line: bytes) -> dict[str, Any]:
    """The object in one line; BadInputError when there is none."""
    try:
        message = jsontext.parse(line, MAX_LINE)
    except ValueError:
        message = None
    if not isinstance(message, dict):
        raise BadInputError(f"not a JSON object: {line[:80]!r}")
    return message


class PackfsClient:
    """Asks the worker of the pack filesystem in `run_dir`; `timeout` in seconds holds for a whole call.

    Every method raises UnavailableError when no worker answers in time. A connection is made for each
    call, so that a worker's successor is found without further ado.
    """

    def __init__(self, run_dir: Path, timeout: float = 2.0) -> None:
        self._run_dir = Path(run_dir)
        self._timeout = timeout

    def ping(self) -> int:
        """The worker's process id."""
        return int(self._call({"op": PING})["pid"])

    def status(self) -> dict[str, Any]:
        """The worker's state and counters."""
        return self._call({"op": STATUS})

    def inflight(self, pack_ids: Iterable[str]) -> int:
        """How many reads on these packs are not answered; requests the worker is too busy to take count as theirs."""
        return self.unanswered(pack_ids)[0]

    def unanswered(self, pack_ids: Iterable[str]) -> tuple[int, frozenset[int]]:
        """The same, and numbers of these reads, which no other read of the mount has, before or after.

        Those that nobody has taken yet have none, nor have those of a worker of an earlier version.
        """
        reply = self._call({"op": INFLIGHT, "packs": list(pack_ids)})
        return int(reply["inflight"]), frozenset(map(int, reply.get("reads", ())))

    def warm(
        self,
        name: str,
        trees: Iterable[str],
        *,
        profile: bool = False,
        pinned: bool = False,
        fetch: bool = True,
        deep: bool = False,
    ) -> dict[str, Any]:
        """Have trees that are on this node, with their packs' indexes, brought into the cache, and see how far that is.

        To be asked again and again: `Warming.warm` in fuse/warming.py has the answer's keys, `Wish` the rest. FloeError when the worker
        does not know how, being of an earlier version.
        """
        flags = {"profile": profile, "pinned": pinned, "fetch": fetch, "deep": deep}
        return self._call({"op": WARM, "name": name, "trees": list(trees), **flags})

    def forget(self, name: str) -> None:
        """Give up what `warm` began under that name."""
        self._call({"op": FORGET, "name": name})

    def frames(self, pack_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Maps of packs by their ids, as fuse/framemaps.py describes them; packs that are not known here have none."""
        found: dict[str, dict[str, Any]] = {}
        left = list(pack_ids)
        while left:
            asked, later = left[:_PACKS_ASKED], left[_PACKS_ASKED:]
            reply = self._call({"op": FRAMES, "packs": asked})
            found.update(reply["packs"])
            unanswered = list(reply["left"])
            if len(unanswered) >= len(asked):
                raise UnavailableError("the pack filesystem answers for none of the packs it is asked for")
            left = [*unanswered, *later]
        return found

    def _call(self, request: dict[str, Any]) -> dict[str, Any]:
        path = self._run_dir / SOCKET_NAME
        try:
            reply = decode(self._exchange(encode(request)))
        except (OSError, BadInputError) as error:
            raise UnavailableError(
                f"the pack filesystem at {path} does not answer: {error}", hint="start it with `floe packfs`"
            ) from error
        if not reply.get("ok"):
            raise FloeError(f"the pack filesystem at {path} refused {request['op']}: {reply.get('error')}")
        return reply

    def _exchange(self, line: bytes) -> bytes:
        with _connected(self._run_dir, self._timeout) as sock:
            sock.sendall(line)
            with sock.makefile("rb") as reader:
                return reader.readline(MAX_LINE)


@contextmanager
def _connected(run_dir: Path, timeout: float) -> Iterator[socket.socket]:
    """A connection whose calls take `timeout` seconds at most; OSError."""
    # A socket address holds 107 bytes; by its directory's descriptor any run directory fits.
    directory = os.open(run_dir, os.O_PATH | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout)
            sock.connect(f"/proc/self/fd/{directory}/{SOCKET_NAME}")
            yield sock
    finally:
        os.close(directory)
