"""Stalls told: as events, as many as are worth having, and the longest of the last minutes with the file that was waited for.

The kernel asks for one read of a program in many parts, side by side: parts that lie side by side, and waited at the same time for the
same, are told as one. What was waited for is a place in a pack; the file is found in the trees that are mounted over it. That walks
a tree, so it is done politely, and for the longest alone: `floe trace` finds the others when it is asked.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from floe.fuse.startup import Politely, image_of
from floe.store.errors import FloeError
from floe.store.eventlog import EventLog
from floe.store.filesat import files_at
from floe.store.packindex import BLOCK
from floe.store.threads import try_start
from floe.store.waits import Stall

_log = logging.getLogger(__name__)
LONGEST = 10  # told by name
_REMEMBERED = 600.0  # seconds
_LOOK_PAUSE = 0.5  # seconds between two looks at what came
_PARTS_MAX = 8192  # that wait for such a look
_EVENTS_MAX, _EVENTS_SECONDS = 1000, 10.0  # events in so many seconds; above that only stalls of a second are told
_LONG = 1.0


class Wait(NamedTuple):
    """Parts of a read, `reads` of them, that waited together from `at` (seconds since 1970) on."""

    at: float
    stall: Stall
    reads: int = 1

    @property
    def end(self) -> float:
        """When the last of them was answered."""
        return self.at + self.stall.seconds


@dataclass
class _Told:
    stall: Stall
    until: float
    path: str | None = None
    tree: str = ""
    looked: bool = False


class Stalls:
    """`trees_of` says which mounted trees lie over a pack, `tree_path` where a tree's image is. Thread-safe."""

    def __init__(
        self,
        events: EventLog,
        trees_of: Callable[[str], Iterable[str]],
        tree_path: Callable[[str], Path | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._events = events
        self._trees_of = trees_of
        self._tree_path = tree_path
        self._clock = clock
        self._lock = threading.Lock()  # guards what follows
        self._parts: list[Wait] = []
        self._longest: list[_Told] = []
        self._window = (clock(), 0)
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()

    def add(self, stall: Stall) -> None:
        """A read took long. Returns at once."""
        with self._lock:
            if len(self._parts) < _PARTS_MAX:
                self._parts.append(Wait(time.time() - stall.seconds, stall))
            if self._thread is None and not self._stopping.is_set():
                self._thread = try_start("floe-stalls", self._run)

    def status(self) -> list[dict[str, Any]]:
        """The longest of the last ten minutes: seconds, cause, bytes, tree, and path where it is known, else pack and offset."""
        now = self._clock()
        with self._lock:
            return [
                {
                    "seconds": told.stall.seconds,
                    "cause": told.stall.cause,
                    "bytes": told.stall.length,
                    "tree": told.tree,
                    "path": told.path or f"pack {told.stall.pack_id[:12]} at {told.stall.offset}",
                }
                for told in self._longest
                if told.until > now
            ]

    def close(self) -> None:
        """Tell what came, and look for no more names."""
        self._stopping.set()
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(_LONG)

    def _run(self) -> None:
        while True:
            stopping = self._stopping.wait(_LOOK_PAUSE)
            with self._lock:
                parts, self._parts = self._parts, []
            for wait in together(parts):
                self._tell(wait)
            with self._lock:
                nameless = [told for told in self._longest if not told.looked]
                if stopping or not (nameless or self._parts or parts):
                    self._thread = None
                    return
            try:
                self._find(nameless)
            except Exception:
                if not self._stopping.is_set():  # else the cache may just have been closed under us
                    _log.exception("files that were waited for could not be named")
            for told in nameless:
                told.looked = True

    def _tell(self, wait: Wait) -> None:
        now, stall = self._clock(), wait.stall
        with self._lock:
            since, count = self._window
            if now - since > _EVENTS_SECONDS:
                since, count = now, 0
            self._window = (since, count + 1)
            self._longest = [told for told in self._longest if told.until > now]
            self._longest.append(_Told(stall, now + _REMEMBERED))
            self._longest.sort(key=lambda told: -told.stall.seconds)
            del self._longest[LONGEST:]
        if count < _EVENTS_MAX or stall.seconds >= _LONG:
            self._events.add(
                "stall",
                at=wait.at,
                pack=stall.pack_id,
                offset=stall.offset,
                bytes=stall.length,
                seconds=round(stall.seconds, 6),
                cause=stall.cause,
                detail=stall.detail,
                reads=wait.reads,
            )

    def _find(self, nameless: Sequence[_Told]) -> None:
        trees = dict.fromkeys(tree for told in nameless for tree in self._trees_of(told.stall.pack_id))
        wanted = [(told.stall.pack_id, told.stall.offset, told.stall.length) for told in nameless]
        for tree in trees:
            path = self._tree_path(tree)
            if path is None:
                continue
            try:
                found = files_at(image_of(path, tree), wanted, Politely(self._stopping))
            except (FloeError, OSError) as error:
                _log.debug("tree %s cannot be looked at: %s", tree, error)
                continue
            for told, files in zip(nameless, found, strict=True):
                if files and told.path is None:
                    told.path, told.tree = files[0].decode("utf-8", "backslashreplace"), tree


def together(parts: Iterable[Wait]) -> list[Wait]:
    """Those that lie side by side in a pack, waited at the same time and for the same cause, as one each; in order of time."""
    found: list[Wait] = []
    for part in sorted(parts, key=lambda wait: (wait.stall.pack_id, wait.stall.cause, wait.stall.offset)):
        one, more = found[-1] if found else None, part.stall
        if (
            one is not None
            and (one.stall.pack_id, one.stall.cause) == (more.pack_id, more.cause)
            and more.offset < one.stall.offset + one.stall.length + BLOCK
            and part.at < one.end
            and one.at < part.end
        ):
            at, end = min(one.at, part.at), max(one.end, part.end)
            length = max(one.stall.offset + one.stall.length, more.offset + more.length) - one.stall.offset
            stall = one.stall._replace(seconds=end - at, length=length, detail=one.stall.detail or more.detail)
            found[-1] = Wait(at, stall, one.reads + 1)
        else:
            found.append(part)
    return sorted(found)
