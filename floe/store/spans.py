"""Events as OpenTelemetry spans, sent by OTLP over HTTP to a collector, if the node has one.

What the daemons note for `floe trace` becomes spans here: `Prepare` of each layer and container, and `start` from the end of a
container's Prepare or of a model's mount to its last new read, with the first read and the longest stalls as its events; other
mounts make none.
Nobody waits for the collector: spans go through a bounded queue that a thread of OpenTelemetry's empties, and what finds no room in
it is dropped. The packages are those of the extra `otlp`, imported only when an endpoint is set.

A span belongs to the trace that containerd named for the call (W3C `traceparent`), if it did; else to one that is derived from the
key of the snapshot, so that Prepare and start of one container are one trace though two daemons tell them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any

from floe.store.errors import PreconditionError

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PACKAGES = "opentelemetry-sdk and opentelemetry-exporter-otlp-proto-http"
_QUEUE = 2048  # spans
_TIMEOUT = 5  # seconds for one request
_LAST = 0.5  # seconds for what is left when the daemon ends
_STALLS = 256  # of the whole node, the last: they wait for their start to be over
_STALL_KEPT = 64  # of one start, the longest of these
_log = logging.getLogger(__name__)

TRACEPARENT: ContextVar[str] = ContextVar("traceparent", default="")
"""What the caller of the request at hand named as its trace, as it came; empty where it named none."""


def endpoint_of(setting: str | None, environ: Mapping[str, str]) -> str | None:
    """Where traces go: the setting, an address of which `/v1/traces` is below, or OpenTelemetry's own variables; None: nowhere."""
    if setting:
        return f"{setting.rstrip('/')}/v1/traces"
    traces, base = (environ.get(name) for name in ENDPOINTS)
    return traces or (f"{base.rstrip('/')}/v1/traces" if base else None)


def trace_of(traceparent: str) -> tuple[int, int, int] | None:
    """Trace id, span id and flags of a W3C `traceparent`; None for anything that is none."""
    parts = traceparent.split("-")
    if len(parts) < 4 or [len(part) for part in parts[:4]] != [2, 32, 16, 2] or parts[0] == "ff":
        return None
    if any(char not in "0123456789abcdef" for part in parts[:4] for char in part):
        return None
    trace, span, flags = (int(part, 16) for part in parts[1:4])
    return (trace, span, flags) if trace and span else None


def trace_id_of(key: str) -> int:
    """The trace of what happens to a snapshot, or a mountpoint, that nobody named a trace for."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).digest(), "big") or 1


def trace_hex(key: str, traceparent: str = "") -> str:
    """The id of the trace that the spans of `key` are in, as logs and collectors write it; 32 digits."""
    named = trace_of(traceparent)
    return f"{named[0] if named else trace_id_of(key):032x}"


class Spans:
    """Spans of `daemon`, sent to `endpoint`; `add` takes what EventLog.add takes. PreconditionError: the packages are missing.

    `packs_of` gives the packs of a tree, by which a start knows its stalls; it raises nothing.
    """

    def __init__(
        self, endpoint: str, daemon: str, *, version: str, packs_of: Callable[[str], Iterable[str]] = lambda _tree: ()
    ) -> None:
        try:
            from opentelemetry import trace  # noqa: PLC0415 - an extra
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - likewise
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - likewise
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415 - likewise
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415 - likewise
        except ImportError as error:
            raise PreconditionError(
                f"spans cannot be sent to {endpoint}: {error}",
                hint=f"install {_PACKAGES} (docs/OPERATIONS.md#spans), or set no endpoint",
            ) from error
        self._trace = trace
        self._packs_of = packs_of
        self._stalls: deque[Mapping[str, Any]] = deque(maxlen=_STALLS)
        resource = Resource.create({"service.name": f"floe-{daemon}", "service.version": version})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_TIMEOUT)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=_QUEUE))
        self._tracer = self._provider.get_tracer("floe", version)
        logging.getLogger("opentelemetry").setLevel(logging.ERROR)  # a collector that is away is worth no line a second

    def add(self, kind: str, **fields: Any) -> None:
        """An event; what is none of a span's is passed over. Never raises, never waits."""
        try:
            if kind == "prepare":
                self._span(f"Prepare {fields['outcome']}", fields, fields["at"] + fields["seconds"], ())
            elif kind == "stall":
                self._stalls.append(fields)
            elif kind == "start":
                self._start(fields)
        except Exception:
            _log.debug("an event became no span", exc_info=True)

    def close(self) -> None:
        """Send what is left, for a moment."""
        # Apart, since a collector that hangs keeps it longer than it says, and a daemon that stops has little time.
        flush = threading.Thread(target=self._provider.force_flush, name="floe-spans", daemon=True)
        flush.start()
        flush.join(_LAST)

    def _start(self, fields: Mapping[str, Any]) -> None:
        began, packs = fields["at"], {pack for tree in fields["trees"] for pack in self._packs_of(tree)}
        end = began + fields["last_read"]
        ours = [stall for stall in list(self._stalls) if began <= stall["at"] <= end and stall["pack"] in packs]
        ours.sort(key=lambda stall: -float(stall["seconds"]))
        events: list[tuple[str, float, dict[str, Any]]] = [("first read", began + fields["first_read"], {})]
        for stall in ours[:_STALL_KEPT]:
            names = ("cause", "seconds", "bytes", "pack", "offset", "reads", "detail")
            events.append(("stall", stall["at"], {f"floe.{name}": stall[name] for name in names if name in stall}))
        self._span("start", fields, end, events)

    def _span(self, name: str, fields: Mapping[str, Any], end: float, events: Any) -> None:
        trace = self._trace
        named = trace_of(str(fields.get("traceparent", "")))
        key = str(fields.get("key") or "")
        # A parent that nobody sends, when containerd names none: it does no more than hold the trace together.
        trace_id, span_id, flags = named or (trace_id_of(key), trace_id_of(f"span {key}") & (1 << 64) - 1 or 1, 1)
        parent = trace.SpanContext(trace_id, span_id, is_remote=True, trace_flags=trace.TraceFlags(flags))
        context = trace.set_span_in_context(trace.NonRecordingSpan(parent))
        left_out = ("at", "by", "traceparent", "meanwhile", "seconds")
        attributes: dict[str, Any] = {
            f"floe.{k}": v for k, v in fields.items() if k not in left_out and isinstance(v, (str, int, float))
        }
        if fields.get("trees"):
            attributes["floe.trees"] = list(fields["trees"])
        span = self._tracer.start_span(name, context, start_time=_nanoseconds(fields["at"]), attributes=attributes)
        for what, at, more in events:
            span.add_event(what, more, _nanoseconds(at))
        if fields.get("outcome") == "refused":
            span.set_status(trace.StatusCode.ERROR, str(fields.get("detail", "")))
        span.end(_nanoseconds(end))


def spans_to(
    setting: str | None, daemon: str, *, version: str, packs_of: Callable[[str], Iterable[str]] = lambda _tree: ()
) -> Spans | None:
    """Spans as the setting and the environment say; None when they say nowhere, or when it cannot be, which the log tells."""
    endpoint = endpoint_of(setting, os.environ)
    if endpoint is None:
        return None
    try:
        return Spans(endpoint, daemon, version=version, packs_of=packs_of)
    except PreconditionError as error:
        _log.warning("%s; %s", error, error.hint)
        return None


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
