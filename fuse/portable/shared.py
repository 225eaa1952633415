"""Reads packs through a node cache that several portable mounts of one user share.

A cache has one writer. The first mount is it, and answers the others on `<cache>/portable.sock`; when it ends or is
killed, another takes its place and asks again what was not answered. Only processes of the same user can connect.

On the socket the guest sends its store's address as one line, and gets an empty line, or one that says why not.
Then requests (_REQUEST) go one way, and answers (_ANSWER, then its content or an error's words) the other, in any order.
A failed answer says of which class the error is by its place in _KINDS, and has the hint on a line of its own. Versions may
differ: an earlier one says 1 of all errors and has no hint; it reads any number as unavailable, and both lines as its words.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from floe.fuse.pack_reader import PackReader
from floe.fuse.reader import Done, Ticket
from floe.store import errors
from floe.store.cache import Cache, CacheGroup, NodeCache, Writer, open_writer
from floe.store.errors import BusyError, CancelledError, FloeError, UnavailableError
from floe.store.ids import Buffer
from floe.store.objects import open_store
from floe.store.objects.base import ObjectStore
from floe.store.policy import NEVER
from floe.store.process import accept

_log = logging.getLogger(__name__)
SOCKET = "portable.sock"
_REQUEST = struct.Struct("<Q64sQI")  # number, pack id, offset and length in bytes
_ANSWER = struct.Struct("<QBI")  # number, 0 or what kind of an error, bytes that follow
_OLD = 1  # any error of an earlier version's, without a hint
# From 2 on, and for ever: what is new comes last.
_KINDS: tuple[type[FloeError], ...] = (
    errors.FloeError,
    errors.BadInputError,
    errors.NotFoundError,
    errors.StoreMissingError,
    errors.AlreadyExistsError,
    errors.ConflictError,
    errors.PreconditionError,
    errors.BusyError,
    errors.AccessDeniedError,
    errors.CredentialsExpiredError,
    errors.UnavailableError,
    errors.ThrottledError,
    errors.RangeError,
    errors.DeadlineError,
    errors.DiskError,
    errors.CancelledError,
    errors.TransitDamageError,
    errors.DamagedError,
    errors.UntrustedError,
    errors.UnsupportedError,
    errors.NoSpaceError,
    errors.SourceChangedError,
)
_JOIN = 10.0  # seconds to become writer or guest at the start; reads wait as long as they may
_POLL = 0.02  # seconds between two attempts
_GREETING = 5.0  # seconds that a guest waits to be let in
_Pending = tuple[str, int, int, Done]
_owners: weakref.WeakSet[_Owner] = weakref.WeakSet()


def _leave_to_parent() -> None:
    for owner in _owners:
        owner.leave_to_parent()
    _owners.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


@dataclass(frozen=True)
class Source:
    """Where packs come from: see __main__ for the fields."""

    url: str
    cache_dir: str
    cache_size: int | None
    cache_min_free: int
    readahead: int
    deadline: float
    budget: int
    more_caches: Sequence[tuple[str, int | None, int]] = ()
    cache_bypass: str = NEVER

    def cache(self) -> Cache:
        """The node cache, of one directory or several."""
        first = (self.cache_dir, self.cache_size, self.cache_min_free)
        found = [NodeCache(Path(root), size=size, min_free=free) for root, size, free in (first, *self.more_caches)]
        return CacheGroup(found) if len(found) > 1 else found[0]


class SharedReader:
    """A Reader (see floe.fuse.reader) that is the cache's writer, or a guest of the one who is.

    BusyError when the cache is written by something else, or for another store.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._store = open_store(source.url)
        self._cache = source.cache()
        self._lock = threading.Lock()  # guards the three below
        self._closed = False
        self._waiting: list[_Pending] | None = None  # reads asked for while nobody answers; None while somebody does
        try:
            self._inner: _Owner | _Guest = self._join(_JOIN)
        except BaseException:
            self._store.close()
            raise

    def _join(self, wait: float) -> _Owner | _Guest:
        until = time.monotonic() + wait
        while not self._closed:
            try:
                return _Owner(self._store, open_writer(self._cache, bypass=self._source.cache_bypass), self._source)
            except BusyError as busy:
                with contextlib.suppress(OSError):
                    return _Guest(self._cache.root, self._source.url, self._left)
                if time.monotonic() > until:
                    raise busy from None
            except OSError as error:
                raise UnavailableError(f"the cache {self._cache.root} cannot be used: {error}") from error
            time.sleep(_POLL)
        raise CancelledError("the mount has ended")

    def _left(self, pending: list[_Pending]) -> None:
        """The process we were a guest of is gone, and left these reads unanswered. Called by the guest's thread."""
        with self._lock:
            self._waiting = [*pending, *(self._waiting or [])]
        problem: FloeError | None = None
        try:
            inner = self._join(self._source.deadline)
        except FloeError as error:
            problem = error
        with self._lock:
            if problem is None and self._closed:
                inner.close()
                problem = CancelledError("the mount has ended")
            if problem is None:
                self._inner = inner
            again, self._waiting = self._waiting or [], None
        for pack_id, offset, length, done in again:
            if problem is None:
                self.submit(pack_id, offset, length, done)
            else:
                done(problem)

    def lookup(self, pack_id: str) -> int | None:
        """Bytes of the pack's content; None when its index is not in the cache."""
        return self._cache.content_size(pack_id)

    def read_cached_into(self, pack_id: str, offset: int, buffer: memoryview, *, wait: bool = True) -> bool:
        """As the writer: from the cache. As a guest: False, since what lies there may be taken away meanwhile."""
        return self._inner.read_cached_into(pack_id, offset, buffer, wait=wait)

    def on_hand(self, pack_id: str, offset: int, length: int) -> list[Buffer] | None:
        """As the writer: what was fetched ahead and is in memory. As a guest: None."""
        return self._inner.on_hand(pack_id, offset, length)

    def submit(self, pack_id: str, offset: int, length: int, done: Done) -> Ticket:
        """Begin a read."""
        with self._lock:
            if self._waiting is not None:
                self._waiting.append((pack_id, offset, length, done))
                return _Ticket()
            inner = self._inner
        return inner.submit(pack_id, offset, length, done)

    def counters(self) -> Mapping[str, Any]:
        """The writer's."""
        return self._inner.counters()

    def close(self) -> None:
        """Let another mount take over; closing again does nothing."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            self._inner.close()
            self._store.close()


class _Ticket:
    def cancel(self) -> None:
        """The read ends by itself: the portable mount is not told that its reader went away."""


class _Owner:
    """The cache's writer, and the server of its guests."""

    def __init__(self, store: ObjectStore, writer: Writer, source: Source) -> None:
        self._url = source.url
        self._writer = writer
        self._packs = PackReader(
            store, writer, readahead=source.readahead, deadline=source.deadline, budget=source.budget
        )
        self.read_cached_into = self._packs.read_cached_into
        self.on_hand = self._packs.on_hand
        self.submit = self._packs.submit
        self.counters = self._packs.counters
        self._guests: set[socket.socket] = set()
        self._listener = _listen(writer.cache.root)
        _owners.add(self)
        threading.Thread(target=self._accept, name="guests", daemon=True).start()

    def _accept(self) -> None:
        while (guest := accept(self._listener)) is not None:
            self._guests.add(guest)
            threading.Thread(target=self._host, args=(guest,), name="guest", daemon=True).start()

    def _host(self, guest: socket.socket) -> None:
        lock = threading.Lock()  # one answer at a time
        try:
            with guest.makefile("rb") as requests:
                url = requests.readline(4096).decode().rstrip("\n")
                refused = "" if url == self._url else "it is used for another store"
                guest.sendall(f"{refused}\n".encode())
                while not refused and len(data := requests.read(_REQUEST.size)) == _REQUEST.size:
                    number, pack_id, offset, length = _REQUEST.unpack(data)
                    self._serve(pack_id.decode(), offset, length, _answering(guest, lock, number))
        except OSError as error:
            _log.debug("a guest went away: %s", error)
        self._guests.discard(guest)
        guest.close()

    def _serve(self, pack_id: str, offset: int, length: int, done: Done) -> None:
        buffer = bytearray(length)
        if self.read_cached_into(pack_id, offset, memoryview(buffer)):
            done([buffer])
        else:
            self.submit(pack_id, offset, length, done)

    def close(self) -> None:
        """Send the guests away before their reads are ended, so that they ask again elsewhere."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept
        self._listener.close()
        for guest in list(self._guests):
            with contextlib.suppress(OSError):
                guest.shutdown(socket.SHUT_RDWR)
        self._packs.close()
        self._writer.close()

    def leave_to_parent(self) -> None:
        """In a forked child: let go of what is the parent's, so that its end is seen, and nobody waits here to be let in."""
        for connection in (self._listener, *self._guests):
            with contextlib.suppress(OSError):
                os.close(connection.detach())  # not `shutdown`, which would end the parent's, too


def _answering(guest: socket.socket, lock: threading.Lock, number: int) -> Done:
    def done(result: Sequence[Buffer] | FloeError) -> None:
        kind, data = encode_error(result) if isinstance(result, FloeError) else (0, b"".join(result))
        with lock, contextlib.suppress(OSError):
            guest.sendall(_ANSWER.pack(number, kind, len(data)))
            guest.sendall(data)

    return done


def encode_error(error: FloeError) -> tuple[int, bytes]:
    """The kind and the words of an error, as an answer has them."""
    kind = next(_KINDS.index(cls) for cls in type(error).__mro__ if cls in _KINDS)
    words = (" ".join(text.splitlines()) for text in (str(error), error.hint))
    return _OLD + 1 + kind, "\n".join(words).rstrip("\n").encode("utf-8", "replace")


def decode_error(kind: int, data: bytes) -> FloeError:
    """The error that an answer has, of whatever version."""
    text = data.decode("utf-8", "replace")
    if kind == _OLD:
        return UnavailableError(text)
    cls = _KINDS[kind - _OLD - 1] if kind - _OLD - 1 < len(_KINDS) else UnavailableError
    message, _, hint = text.partition("\n")
    return cls(message, hint=hint)


class _Guest:
    """Reads by asking the cache's writer; `left` gets the unanswered ones when that is gone. OSError: nobody is there."""

    def __init__(self, root: Path, url: str, left: Callable[[list[_Pending]], None]) -> None:
        self._left = left
        self._numbers = itertools.count()
        self._pending: dict[int, _Pending] = {}
        self._lock = threading.Lock()  # orders `_send` and the end
        self._gone = False
        self._socket = _connect(root)
        self._answers = self._socket.makefile("rb")
        try:
            self._introduce(root, url)
        except BaseException:
            self._close()
            raise
        threading.Thread(target=self._receive, name="host", daemon=True).start()

    def read_cached_into(self, _pack: str, _offset: int, _buffer: memoryview, *, wait: bool = True) -> bool:
        """Never: see SharedReader."""
        del wait
        return False

    def on_hand(self, _pack: str, _offset: int, _length: int) -> list[Buffer] | None:
        """Never: it is in another process's memory."""
        return None

    def submit(self, pack_id: str, offset: int, length: int, done: Done) -> Ticket:
        """Ask for it; when the other side is gone, it is among what it left."""
        number = next(self._numbers)
        with self._lock:
            if not self._gone:
                self._pending[number] = pack_id, offset, length, done
                with contextlib.suppress(OSError):  # _receive finds out, too
                    self._socket.sendall(_REQUEST.pack(number, pack_id.encode(), offset, length))
                return _Ticket()
        self._left([(pack_id, offset, length, done)])
        return _Ticket()

    def counters(self) -> Mapping[str, Any]:
        """The other process counts."""
        return {}

    def _receive(self) -> None:
        with contextlib.suppress(OSError):
            while len(head := self._answers.read(_ANSWER.size)) == _ANSWER.size:
                number, kind, length = _ANSWER.unpack(head)
                data = self._answers.read(length)
                if len(data) != length:
                    break
                *_, done = self._pending.pop(number)
                done(decode_error(kind, data) if kind else [data])
        with self._lock:
            self._gone = True
            pending = list(self._pending.values())
            self._pending.clear()
        self._close()
        self._left(pending)

    def _introduce(self, root: Path, url: str) -> None:
        self._socket.sendall(f"{url}\n".encode())
        refused = self._answers.readline(4096)
        if not refused:
            raise ConnectionResetError
        if refused != b"\n":
            words = refused.decode().strip()
            raise UnavailableError(f"the cache {root} cannot be shared: {words}", hint="give another --cache-dir")
        self._socket.settimeout(None)

    def _close(self) -> None:
        self._answers.close()
        self._socket.close()

    def close(self) -> None:
        """Go; nothing is read any more."""
        self._left = lambda _pending: None
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _address(root: Path) -> Any:
    # By descriptor, since a socket address holds 107 bytes and cache folders may be deeper.
    folder = os.open(root, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{SOCKET}"
    finally:
        os.close(folder)


def _listen(root: Path) -> socket.socket:
    (root / SOCKET).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    with _address(root) as address:
        listener.bind(address)
    (root / SOCKET).chmod(0o600)
    listener.listen()
    return listener


def _connect(root: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_GREETING)  # a process that was stopped, or is about to end, lets nobody in
    try:
        with _address(root) as address:
            connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection
