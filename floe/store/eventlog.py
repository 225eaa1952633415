"""What happened on this node lately, as lines of JSON in two small files a daemon: a ring that outlives the daemon.

`<folder>/<daemon>.jsonl` is written, `<daemon>.old.jsonl` is what was written before it: together they hold LIMIT bytes. Whoever adds an
event never waits: a thread writes, and what it cannot keep up with is left out and counted. `floe trace` reads them.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from floe.store.spans import Spans

FOLDER = "events"
LIMIT = 8 << 20  # bytes of a daemon's two files
_PENDING = 4096  # events that wait to be written
_BATCH = 0.2  # seconds between two writes
_log = logging.getLogger(__name__)


class EventLog:
    """The events of one daemon, `name`, below `run_dir`. Thread-safe; nothing is raised for what cannot be written.

    `spans` are told of every event, too, by the thread that writes.
    """

    def __init__(self, run_dir: Path, name: str, *, limit: int = LIMIT, spans: Spans | None = None) -> None:
        self._path = run_dir / FOLDER / f"{name}.jsonl"
        self._name = name
        self._limit = limit // 2
        self._pending: deque[dict[str, Any]] = deque(maxlen=_PENDING)
        self._added = self._written = 0
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._broken = False
        self._spans = spans
        self._thread = threading.Thread(target=self._run, name="floe-events", daemon=True)
        self._thread.start()

    def add(self, kind: str, **fields: Any) -> None:
        """Note an event, now; `fields` are JSON. `at`, seconds since 1970, may be among them."""
        self._added += 1  # a race costs exactness only
        self._pending.append({"at": time.time(), "by": self._name, "kind": kind, **fields})
        self._wake.set()

    def close(self) -> None:
        """Write what is left."""
        self._closing.set()
        self._wake.set()
        self._thread.join(1.0)  # a disk may hang, and a worker that stops has little time

    def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.wait()
            self._closing.wait(_BATCH)
            self._wake.clear()
            self._write()
        self._write()

    def _write(self) -> None:
        lines = []
        while self._pending:
            event = self._pending.popleft()
            lines.append(json.dumps(event, separators=(",", ":"), default=str))
            if self._spans is not None:
                self._spans.add(**event)
        lost, self._written = self._added - self._written - len(lines), self._added
        if lost > 0:
            lines.append(json.dumps({"at": time.time(), "by": self._name, "kind": "left_out", "events": lost}))
        if not lines:
            return
        try:
            self._append(("\n".join(lines) + "\n").encode())
            self._broken = False
        except OSError as error:
            if not self._broken:
                _log.warning("events are not kept: %s", error)
            self._broken = True

    def _append(self, data: bytes) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            if self._path.stat().st_size + len(data) > self._limit:
                self._path.rename(self._path.with_suffix(".old.jsonl"))
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """All daemons' events in the order in which they happened; each has `at` (seconds since 1970), `by` and `kind`.

    Lines that are none are passed over: a daemon may have been killed while it wrote. PermissionError: another user's.
    """
    folder = run_dir / FOLDER
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".jsonl")
    except FileNotFoundError:
        return []
    return sorted((event for path in paths for event in _events(path)), key=lambda event: float(event["at"]))


def _events(path: Path) -> Iterator[dict[str, Any]]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:  # it was just renamed
        return
    for line in data.splitlines():
        with suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("at"), (int, float)) and "kind" in event:
                yield event
