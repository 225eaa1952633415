"""Prometheus metrics of a daemon, served over HTTP on a unix socket or a loopback port.

A daemon describes what it counts as `Metric` values each time it is asked; nothing is kept here. The format is
Prometheus' text, or OpenMetrics for who asks for that. Only this node can ask: other addresses are refused at the start.
"""

from __future__ import annotations

import logging
import os
import socket
import socketserver
import stat
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client import exposition as plain
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from floe.store import process
from floe.store.errors import AccessDeniedError, BusyError, UnavailableError
from floe.store.histogram import Distribution
from floe.store.metricsaddress import parse_address

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
_UNITS = ("seconds", "bytes")
# A scraper that sends nothing does not hold a thread for longer (seconds).
_REQUEST_TIMEOUT = 5.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metric:
    """One metric: `name` without the `_total` of counters, `kind` COUNTER, GAUGE or HISTOGRAM, and its values.

    `values` maps label values, in the order of `labels`, to numbers, those of a histogram to distributions; a metric without
    labels has the one key ().
    Units are in the name: `floe_read_bytes`, `floe_uptime_seconds`.
    """

    name: str
    help: str
    kind: str
    labels: tuple[str, ...] = ()
    values: Mapping[tuple[str, ...], float | Distribution] = field(default_factory=dict)


def distributions(found: Mapping[str, Any] | None) -> dict[tuple[str, ...], float | Distribution]:
    """The values of a histogram with one label out of what Histogram.encode gave for each of its values."""
    return {(name,): Distribution.decode(data) for name, data in (found or {}).items()}


Source = Callable[[], Iterable[Metric]]


class MetricsServer:
    """Serves GET /metrics until `close()`; `address` is where, with the port that was found for port 0."""

    def __init__(self, address: str, source: Source) -> None:
        """Listen at `address` (see parse_address). BusyError: taken; AccessDeniedError: not allowed there."""
        place = parse_address(address)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_SourceCollector(source))
        handler = _handler(registry)
        self._path: Path | None = None
        try:
            if isinstance(place, Path):
                _clear_stale(place)
                unix = _UnixServer(str(place), handler, bind_and_activate=False)
                self._server: socketserver.BaseServer = unix
                try:
                    unix.server_bind()
                    place.chmod(0o600)  # before it listens: nobody else ever connects
                    unix.server_activate()
                except BaseException:
                    unix.server_close()
                    raise
                self._path = place
                self.address = f"unix:{place}"
            else:
                family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
                server = type("_Server", (_TcpServer,), {"address_family": family})(place, handler)
                self._server = server
                port = server.server_address[1]
                self.address = f"[{place[0]}]:{port}" if ":" in place[0] else f"{place[0]}:{port}"
        except PermissionError as error:
            raise AccessDeniedError(f"cannot serve metrics at {address}: {error.strerror}") from error
        except OSError as error:
            raise BusyError(
                f"cannot serve metrics at {address}: {error.strerror or error}",
                hint="choose another metrics address, or none",
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering and remove the socket."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)


_FAMILIES: Mapping[str, Any] = {
    COUNTER: CounterMetricFamily,
    GAUGE: GaugeMetricFamily,
    HISTOGRAM: HistogramMetricFamily,
}


class _SourceCollector(Collector):
    def __init__(self, source: Source) -> None:
        self._source = source

    def collect(self) -> Iterator[Family]:
        for metric in self._source():
            unit = next((unit for unit in _UNITS if metric.name.endswith(f"_{unit}")), "")
            family = _FAMILIES[metric.kind](metric.name, metric.help, labels=metric.labels, unit=unit)
            for labels, value in sorted(metric.values.items(), key=lambda item: item[0]):
                if isinstance(value, Distribution):
                    family.add_metric(labels, value.buckets(), value.total)
                else:
                    family.add_metric(labels, value)
            yield family


_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


def _clear_stale(path: Path) -> None:
    """Remove a socket nobody listens on, or only a killed process that hangs; BusyError for any other, and no socket."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise BusyError(f"{path} exists and is no socket", hint="choose another metrics address")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
            pid, _, _ = _CREDENTIALS.unpack(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        except ConnectionRefusedError:
            pid = 0
        except (BlockingIOError, TimeoutError):  # somebody who does not take what is asked of it
            pid = -1
    if not pid or process.is_doomed(pid):
        path.unlink(missing_ok=True)
        return
    raise BusyError(f"another process serves metrics at {path}", hint="stop it or choose another metrics address")


class _TcpServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True


class _UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


def _handler(registry: CollectorRegistry) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _REQUEST_TIMEOUT

        def do_GET(self) -> None:
            if self.path.partition("?")[0] not in ("/", "/metrics"):
                self._answer(404, b"metrics are at /metrics\n", "text/plain; charset=utf-8")
                return
            try:
                # As prometheus-client chooses; its own way of choosing also gzips, and renames what it cannot write.
                way: Any = openmetrics if "application/openmetrics-text" in self.headers.get("Accept", "") else plain
                body, kind = way.generate_latest(registry), way.CONTENT_TYPE_LATEST
            except Exception:
                _log.exception("metrics could not be collected")
                self._answer(500, b"metrics could not be collected\n", "text/plain; charset=utf-8")
                return
            self._answer(200, body, kind)

        def _answer(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def address_string(self) -> str:
            return "local"  # a unix socket's client has no address, which the base class would index

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            _log.debug(format, *args)

    return Handler


def read_metrics(address: str, timeout: float = 5.0, *, accept: str = "*/*") -> str:
    """The text that a daemon on this node serves at `address`. UnavailableError: nobody answers in `timeout` s."""
    place = parse_address(address)
    try:
        with _connect(place, timeout) as connection:
            connection.sendall(f"GET /metrics HTTP/1.0\r\nAccept: {accept}\r\n\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    except OSError as error:
        raise UnavailableError(f"nobody serves metrics at {address}: {error}") from error
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head.partition(b"\r\n")[0]:
        raise UnavailableError(f"{address} answered {head[:100]!r}")
    return body.decode()


def _connect(place: Path | tuple[str, int], timeout: float) -> socket.socket:
    if not isinstance(place, Path):
        return socket.create_connection(place, timeout)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(timeout)
    try:
        connection.connect(os.fspath(place))
    except OSError:
        with suppress(OSError):
            connection.close()
        raise
    return connection
