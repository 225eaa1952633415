"""How each Prepare went: a histogram by outcome, and an event for `floe trace`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from floe.snapshotter.metastore import REF
from floe.store.errors import AlreadyExistsError
from floe.store.histogram import Histogram
from floe.store.spans import TRACEPARENT, trace_hex
from floe.store.stub import ANNOTATION

# Set by containerd's CRI, and by its transfer service, at every layer of an image.
IMAGE = "containerd.io/snapshot/cri.image-ref"
LAZY, UNPACKED, CONTAINER, REFUSED = "lazy", "unpacked", "container", "refused"
OUTCOMES = (LAZY, UNPACKED, CONTAINER, REFUSED)
"""A layer that is there lazily; one that containerd unpacks; what is to be written to, a container's own layer above all; an error."""


class Prepares:
    """`told` is told of events, see EventLog.add. Thread-safe."""

    def __init__(self, told: Callable[..., object]) -> None:
        self._told = told
        self._lock = threading.Lock()
        self._seconds = {outcome: Histogram() for outcome in OUTCOMES}
        self._local = threading.local()

    @contextmanager
    def watch(self, key: str, parent: str, labels: Mapping[str, str]) -> Iterator[None]:
        """A Prepare, while the block runs; what `note` says in this thread is of it."""
        noted: dict[str, Any] = {}
        self._local.noted = noted
        self._local.trace = trace_hex(key, TRACEPARENT.get())
        at, started = time.time(), time.monotonic()
        outcome, detail = UNPACKED if labels.get(REF) else CONTAINER, ""
        try:
            yield
        except AlreadyExistsError as error:
            outcome, detail = (LAZY, "") if labels.get(REF) else (REFUSED, str(error))
            raise
        except BaseException as error:
            outcome, detail = REFUSED, str(error)
            raise
        finally:
            self._local.trace = None
            seconds = time.monotonic() - started
            with self._lock:
                self._seconds[outcome].add(seconds)
            said = {
                "chain": labels.get(REF, ""),
                "image": labels.get(IMAGE, ""),
                "detail": detail,
                "traceparent": TRACEPARENT.get(),
                **noted,
            }
            self._told(
                "prepare",
                at=at,
                key=key,
                parent=parent,
                outcome=outcome,
                seconds=round(seconds, 6),
                **{name: value for name, value in said.items() if value},
            )

    def note(self, **fields: Any) -> None:
        """More about the Prepare under way in this thread."""
        noted = getattr(self._local, "noted", None)
        if noted is not None:
            noted.update(fields)

    def about(self, labels: Mapping[str, str], **more: str) -> dict[str, str]:
        """What a line of the log is about, as fields: the Prepare under way in this thread, which has these labels."""
        found = {"layer": labels.get(REF), "image": labels.get(IMAGE), "model": labels.get(ANNOTATION), **more}
        found["trace"] = getattr(self._local, "trace", None)
        return {name: value for name, value in found.items() if value}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the Prepare under way in this thread: how long the block took is noted as `<name>_seconds`."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.note(**{f"{name}_seconds": round(time.monotonic() - started, 6)})

    def status(self) -> dict[str, dict[str, Any]]:
        """Histograms by outcome, as Histogram.encode gives them."""
        with self._lock:
            return {outcome: found.encode() for outcome, found in self._seconds.items()}
