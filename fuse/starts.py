"""Starts as the worker sees them: from a container's Prepare, or a model's mount, to the first read and to the last new one.

They begin when the worker is told of them, which is at the end of Prepare or of the mount.

What is read is noted by the recorder, beside what it notes for profiles: a reader pays nothing for it that it does not pay then. A
thread looks once a second which starts are over; their figures and an event `start` say how they went, after one `begun`.

The recorder follows some at a time. What is mounted natively never reads here, and keeps its place for the quarter of an hour that a
start may take to its first read: when places are wanted, the oldest without a read goes.
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
from floe.store.spans import trace_hex
from floe.store.threads import try_start

_log = logging.getLogger(__name__)
_LOOK_PAUSE = 1.0  # seconds
_NAMES_MAX = 64  # images and models whose last start is told
_NAME_MAX = 200  # characters
_SOURCES = ("cache_", "prefetched_", "store_", "readahead_", "profile_", "completion_", "front_")
_UNITS = ("_requests", "_bytes", "_frames")
FIRST, LAST = "first_read", "last_read"


class _Start:
    def __init__(self, key: str, name: str, trees: Sequence[str], recording: Recording, traceparent: str) -> None:
        self.key = key
        self.name = name
        self.trees = list(trees)
        self.trace = {"traceparent": traceparent} if traceparent else {}
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
        self._left_out = 0
        self._stopping = threading.Event()

    def begun(self, key: str, name: str, trees: Sequence[str], traceparent: str = "") -> None:
        """`key`, a container or a mountpoint, begins to use `trees`; `name` is its image's or model's, "" when unknown.

        `traceparent`: the trace that it belongs to, as W3C writes it; "" for one of its own.
        """
        packs: set[str] = set()
        for tree in trees:
            try:
                packs.update(self._packs_of(tree))
            except (FloeError, OSError) as error:
                _log.debug("the start of %s is followed without tree %s: %s", key, tree, error)
        recording = self._follow(key, sorted(packs)) if packs and not self._stopping.is_set() else None
        if recording is None:
            return
        with self._lock:
            start = _Start(key, name[:_NAME_MAX], trees, recording, traceparent[:_NAME_MAX])
            self._under_way[start] = dict(self._counters())
            self._events.add("begun", key=key, name=start.name, trees=start.trees, **start.trace)
            if self._watcher is None:
                self._watcher = try_start("floe-starts", self._watch)

    def status(self) -> dict[str, Any]:
        """`seconds`: histograms until FIRST and LAST; `last`: seconds of the last start by name, and `at`; `under_way`; `left_out`."""
        with self._lock:
            return {
                "seconds": {until: found.encode() for until, found in self._seconds.items()},
                "last": {name: dict(found) for name, found in self._last.items()},
                "under_way": len(self._under_way),
                "left_out": self._left_out,
            }

    def close(self) -> None:
        """Follow nothing more; what was followed is told as far as it went."""
        self._stopping.set()
        with self._lock:
            watcher = self._watcher
        if watcher is not None:
            watcher.join(_LOOK_PAUSE)

    def _follow(self, key: str, packs: Sequence[str]) -> Recording | None:
        """A recording, in the place of the oldest start without a read where there is no other; None: all of them read."""
        recording = self._recorder.follow(key, packs)
        if recording is not None:
            return recording
        with self._lock:
            if not self._left_out:
                _log.info(
                    "%d starts are followed, which is all there is room for: the oldest that reads nothing gives way to a new one",
                    len(self._under_way),
                )
            self._left_out += 1
            silent = next((start for start in self._under_way if not start.recording.reads), None)
            if silent is not None:
                del self._under_way[silent]
        if silent is None:
            return None
        self._recorder.unfollow(silent.recording)
        return self._recorder.follow(key, packs)

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
                    self._under_way.pop(start, None)  # it may have given way
                if not self._under_way:
                    self._watcher = None
                    return

    def _tell(self, start: _Start, before: Mapping[str, int]) -> None:
        recording, name = start.recording, start.name or self._name(start.trees)
        first, last = recording.began_reading - recording.began, recording.news - recording.began
        # Of the whole worker: what others read meanwhile is among it.
        now = self._counters()
        grown = {name: value - before.get(name, 0) for name, value in now.items() if value != before.get(name, 0)}
        self._events.add(
            "start",
            at=start.at,
            key=start.key,
            name=name,
            trees=start.trees,
            **start.trace,
            first_read=round(first, 6),
            last_read=round(last, 6),
            reads=len(recording.reads),
            bytes=recording.size,
            meanwhile={n: grown[n] for n in sorted(grown) if n.startswith(_SOURCES) and n.endswith(_UNITS)},
        )
        _log.info(
            "start of %s: first read after %.3f s, last new read after %.3f s, %d bytes",
            *(start.key, first, last, recording.size),
            extra={
                **({"model" if start.key.startswith("/") else "image": name} if name else {}),
                "trace": trace_hex(start.key, start.trace.get("traceparent", "")),
            },
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
