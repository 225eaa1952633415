"""Stalls told: as events, as many as are worth having, and the longest of the last minutes with the file that was waited for.

What was waited for is a place in a pack; the file is found in the trees that are mounted over it. That walks a tree, so it is done in
a thread, politely, and for the longest alone: `floe trace` finds the others when it is asked.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from floe.fuse.startup import Politely, image_of
from floe.store.errors import FloeError
from floe.store.eventlog import EventLog
from floe.store.filesat import files_at
from floe.store.waits import Stall

_log = logging.getLogger(__name__)
LONGEST = 10  # told by name
_REMEMBERED = 600.0  # seconds
_LOOK_PAUSE = 2.0  # seconds between looks for files' names
_EVENTS_MIN, _EVENTS_SECONDS = 500, 10.0  # events in so many seconds; above that only stalls of a second are told
_LONG = 1.0


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
        self._longest: list[_Told] = []
        self._window = (clock(), 0)
        self._namer: threading.Thread | None = None
        self._stopping = threading.Event()

    def add(self, stall: Stall) -> None:
        """A read took long. Returns at once."""
        now = self._clock()
        with self._lock:
            since, count = self._window
            if now - since > _EVENTS_SECONDS:
                since, count = now, 0
            self._window = (since, count + 1)
            self._longest = [told for told in self._longest if told.until > now]
            self._longest.append(_Told(stall, now + _REMEMBERED))
            self._longest.sort(key=lambda told: -told.stall.seconds)
            del self._longest[LONGEST:]
            if self._namer is None and self._longest:
                self._namer = threading.Thread(target=self._name, name="floe-stalls", daemon=True)
                self._namer.start()
        if count < _EVENTS_MIN or stall.seconds >= _LONG:
            self._events.add(
                "stall",
                at=time.time() - stall.seconds,
                pack=stall.pack_id,
                offset=stall.offset,
                bytes=stall.length,
                seconds=round(stall.seconds, 6),
                cause=stall.cause,
                detail=stall.detail,
            )

    def status(self) -> list[dict[str, Any]]:
        """The longest of the last ten minutes: seconds, cause, bytes, tree, and path where it is known, else pack and offset."""
        now = self._clock()
        with self._lock:
            found = [told for told in self._longest if told.until > now]
            return [
                {
                    "seconds": told.stall.seconds,
                    "cause": told.stall.cause,
                    "bytes": told.stall.length,
                    "tree": told.tree,
                    "path": told.path or f"pack {told.stall.pack_id[:12]} at {told.stall.offset}",
                }
                for told in found
            ]

    def close(self) -> None:
        """Look for no more names."""
        self._stopping.set()

    def _name(self) -> None:
        while not self._stopping.wait(_LOOK_PAUSE):
            with self._lock:
                nameless = [told for told in self._longest if not told.looked]
                if not nameless:
                    self._namer = None
                    return
            try:
                self._find(nameless)
            except Exception:
                if not self._stopping.is_set():  # else the cache may just have been closed under us
                    _log.exception("files that were waited for could not be named")
            for told in nameless:
                told.looked = True

    def _find(self, nameless: Sequence[_Told]) -> None:
        trees = dict.fromkeys(tree for told in nameless for tree in self._trees_of(told.stall.pack_id))
        for tree in trees:
            wanted = [(told.stall.pack_id, told.stall.offset, told.stall.length) for told in nameless]
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
