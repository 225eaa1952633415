"""How long reads, requests and starts took, as the worker of the pack filesystem counts it: Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from floe.store.exposition import COUNTER, GAUGE, HISTOGRAM, Metric, distributions

_WAITED = "Reads that neither memory nor the cache answered at once, by what most of the wait was for."
_REQUESTED = "Requests to the object store that ended well: for a read, ahead of one, or for profiles and completion."
_ERRORS = "Requests to the object store that failed, by cause; each is tried again while a read waits for it."
_STALLED = "The longest reads of the last ten minutes: cause, file, and the tree it is in."
_STARTED = (
    "From the end of a container's Prepare, or of a model's mount, to its first read and to the last of its start."
)
_LEFT_OUT = "Starts that are in no histogram, since too many were followed at once: first those that had not read yet."
_LAST = "The last start of an image or a model: until its first read, and until the last new content of its start."


def timings(status: Mapping[str, Any]) -> Iterable[Metric]:
    """Metrics out of `waits`, `starts` and `stalls` of a worker's status."""
    waits: Mapping[str, Any] = status.get("waits", {})
    starts: Mapping[str, Any] = status.get("starts", {})
    yield Metric("floe_read_wait_seconds", _WAITED, HISTOGRAM, ("cause",), distributions(waits.get("read_seconds")))
    yield Metric(
        "floe_store_request_seconds", _REQUESTED, HISTOGRAM, ("class",), distributions(waits.get("request_seconds"))
    )
    if "requests_in_flight" in waits:
        text = "Requests to the object store that have not ended."
        yield Metric("floe_store_requests_in_flight", text, GAUGE, (), {(): waits["requests_in_flight"]})
    errors: dict[tuple[str, ...], float] = {
        (cause,): float(count) for cause, count in (waits.get("store_errors") or {}).items()
    }
    yield Metric("floe_store_errors", _ERRORS, COUNTER, ("cause",), errors)
    stalls: dict[tuple[str, ...], float] = {}
    for stall in status.get("stalls") or ():
        key = (stall["cause"], stall["path"], stall["tree"])
        stalls[key] = max(stall["seconds"], stalls.get(key, 0.0))
    yield Metric("floe_longest_stall_seconds", _STALLED, GAUGE, ("cause", "file", "tree"), stalls)
    yield Metric("floe_start_seconds", _STARTED, HISTOGRAM, ("until",), distributions(starts.get("seconds")))
    if "left_out" in starts:
        yield Metric("floe_starts_left_out", _LEFT_OUT, COUNTER, (), {(): starts["left_out"]})
    last: dict[tuple[str, ...], float] = {
        (name, until): seconds
        for name, found in (starts.get("last") or {}).items()
        for until, seconds in found.items()
        if until != "at"
    }
    yield Metric("floe_last_start_seconds", _LAST, GAUGE, ("name", "until"), last)
