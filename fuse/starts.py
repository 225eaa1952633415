"""Starts as the worker sees them: from the Prepare of a container, or the mount of a model, to the first read and to the last new one.

What is read is noted by the recorder, beside what it notes for profiles: a reader pays nothing for it that it does not pay then. A
thread looks once a second which starts are over; their figures and an event `start` say how they went, after one `begun`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from floe.store.errors import FloeError
from floe.store.eventlog import EventLog
from floe.store.histogram import Histogram
from floe.store.recorder import Recorder, Recording

_log = logging.getLogger(__name__)
_LOOK_PAUSE = 1.0  # seconds
_NAMES_MAX = 64  # images and models whose last start is told
_NAME_MAX = 200  # characters
_SOURCES = ("cache_", "prefetched_", "store_", "readahead_", "profile_", "completion_", "front_")
_UNITS = ("_requests", "_bytes", "_frames")
FIRST, LAST = "first_read", "last_read"


class _Start:
    def __init__(self, key: str, name: str, trees: Sequence[str], recording: Recording) -> None:
        self.key = key
        self.name = name
        self.trees = list(trees)
        self.recording = recording
        self.at = time.time()


class Starts:
    """`packs_of` a tree, which may raise FloeError or OSError; `counters` are the reader's. Thread-safe.

    `source_of` a tree (see profiles.py) names a start whose image nobody told; it may raise the store's errors.
    """

    def __init__(
        self,
        recorder: Recorder,
        events: EventLog,
        packs_of: Callable[[str], Sequence[str]],
        counters: Callable[[], Mapping[str, int]],
        source_of: Callable[[str], str | None] = lambda _tree: None,
    ) -> None:
        self._recorder = recorder
        self._events = events
        self._packs_of = packs_of
        self._counters = counters
        self._source_of = source_of
        self._lock = threading.Lock()  # guards what follows
        self._under_way: dict[_Start, Mapping[str, int]] = {}  # and what was counted at its beginning
        self._watcher: threading.Thread | None = None
        self._seconds = {FIRST: Histogram(), LAST: Histogram()}
        self._last: OrderedDict[str, dict[str, float]] = OrderedDict()
        self._stopping = threading.Event()

    def begun(self, key: str, name: str, trees: Sequence[str]) -> None:
        """`key`, a container or a mountpoint, begins to use `trees`; `name` is its image's or model's, "" when unknown."""
        packs: set[str] = set()
        for tree in trees:
            try:
                packs.update(self._packs_of(tree))
            except (FloeError, OSError) as error:
                _log.debug("the start of %s is followed without tree %s: %s", key, tree, error)
        recording = self._recorder.follow(key, sorted(packs)) if packs else None
        if recording is None or self._stopping.is_set():
            return
        with self._lock:
            self._under_way[_Start(key, name[:_NAME_MAX], trees, recording)] = dict(self._counters())
            self._events.add("begun", key=key, name=name[:_NAME_MAX], trees=list(trees))
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, name="floe-starts", daemon=True)
                self._watcher.start()

    def status(self) -> dict[str, Any]:
        """`seconds`: histograms until FIRST and LAST; `last`: seconds of the last start by name, and `at`; `under_way`."""
        with self._lock:
            return {
                "seconds": {until: found.encode() for until, found in self._seconds.items()},
                "last": {name: dict(found) for name, found in self._last.items()},
                "under_way": len(self._under_way),
            }

    def close(self) -> None:
        """Follow nothing more; what was followed is told as far as it went."""
        self._stopping.set()
        with self._lock:
            watcher = self._watcher
        if watcher is not None:
            watcher.join(_LOOK_PAUSE)

    def _watch(self) -> None:
        while True:
            stopping = self._stopping.wait(_LOOK_PAUSE)
            now = time.monotonic()
            with self._lock:
                over = [item for item in self._under_way.items() if item[0].recording.is_over(now) or stopping]
            for start, counted in over:
                self._recorder.unfollow(start.recording)
                if start.recording.reads:
                    self._tell(start, counted)
            with self._lock:
                for start, _ in over:
                    del self._under_way[start]
                if not self._under_way:
                    self._watcher = None
                    return

    def _tell(self, start: _Start, before: Mapping[str, int]) -> None:
        recording, name = start.recording, start.name or self._name(start.trees)
        first, last = recording.reads[0].when - recording.began, recording.news - recording.began
        # Of the whole worker: what others read meanwhile is among it.
        now = self._counters()
        grown = {name: value - before.get(name, 0) for name, value in now.items() if value != before.get(name, 0)}
        self._events.add(
            "start",
            at=start.at,
            key=start.key,
            name=name,
            trees=start.trees,
            first_read=round(first, 6),
            last_read=round(last, 6),
            reads=len(recording.reads),
            bytes=recording.size,
            meanwhile={n: grown[n] for n in sorted(grown) if n.startswith(_SOURCES) and n.endswith(_UNITS)},
        )
        with self._lock:
            self._seconds[FIRST].add(first)
            self._seconds[LAST].add(last)
            self._last[name or "unnamed"] = {FIRST: first, LAST: last, "at": start.at}
            self._last.move_to_end(name or "unnamed")
            while len(self._last) > _NAMES_MAX:
                self._last.popitem(last=False)

    def _name(self, trees: Sequence[str]) -> str:
        """The repository of the topmost layer, or the model, as the store knows it; "" when it does not tell."""
        try:
            source = self._source_of(trees[0]) or ""
        except FloeError as error:
            _log.debug("nobody names the start over tree %s: %s", trees[0], error)
            return ""
        return source.partition("/")[2].partition("@")[0][:_NAME_MAX]
