import os
import socket
import threading

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from floe.cli.packfs_metrics import packfs_metrics
from floe.store import process
from floe.store.errors import AccessDeniedError, BadInputError, BusyError, UnavailableError
from floe.store.exposition import COUNTER, GAUGE, HISTOGRAM, Metric, MetricsServer, distributions, read_metrics
from floe.store.histogram import Histogram
from floe.store.metricsaddress import parse_address


def source():
    return [
        Metric("floe_mounts", "Trees mounted.", GAUGE, values={(): 3}),
        Metric("floe_read_bytes", "Bytes by source.", COUNTER, ("source",), {("cache",): 10, ("store",): 2.5}),
        Metric("floe_odd", 'Help with "quotes"\nand lines.', COUNTER, ("what",), {('a"b\n\\',): 1}),
    ]


def check(text):
    assert "# HELP floe_mounts Trees mounted.\n# TYPE floe_mounts gauge\nfloe_mounts 3.0\n" in text
    assert "# TYPE floe_read_bytes_total counter\n" in text
    assert 'floe_read_bytes_total{source="cache"} 10.0\n' in text
    assert 'floe_read_bytes_total{source="store"} 2.5\n' in text
    assert 'floe_odd_total{what="a\\"b\\n\\\\"} 1.0\n' in text


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:0", "localhost:0"])
def test_loopback(address):
    server = MetricsServer(address, source)
    try:
        check(read_metrics(server.address))
    finally:
        server.close()
    with pytest.raises(UnavailableError):
        read_metrics(server.address)


def test_unix_socket_is_private_and_goes_away(tmp_path):
    path = tmp_path / "metrics.sock"
    server = MetricsServer(f"unix:{path}", source)
    try:
        assert path.stat().st_mode & 0o007 == 0
        check(read_metrics(f"unix:{path}"))
        with pytest.raises(BusyError, match=r"metrics\.sock"):
            MetricsServer(f"unix:{path}", source)
    finally:
        server.close()
    assert not path.exists()


def test_the_socket_of_a_process_that_hangs_after_a_kill_is_replaced(tmp_path, monkeypatch):
    path = tmp_path / "metrics.sock"
    with socket.socket(socket.AF_UNIX) as hanging:
        hanging.bind(str(path))
        hanging.listen(0)
        monkeypatch.setattr(process, "is_doomed", lambda pid: pid == os.getpid())
        server = MetricsServer(f"unix:{path}", source)
        try:
            check(read_metrics(f"unix:{path}"))
        finally:
            server.close()


def test_a_socket_left_by_a_killed_process_is_replaced(tmp_path):
    path = tmp_path / "metrics.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    server = MetricsServer(f"unix:{path}", source)
    try:
        check(read_metrics(f"unix:{path}"))
    finally:
        server.close()


def test_a_file_is_not_replaced(tmp_path):
    path = tmp_path / "precious"
    path.write_text("x")
    with pytest.raises(BusyError, match="no socket"):
        MetricsServer(f"unix:{path}", source)
    assert path.read_text() == "x"


def test_a_taken_port():
    first = MetricsServer("127.0.0.1:0", source)
    try:
        with pytest.raises(BusyError):
            MetricsServer(first.address, source)
    finally:
        first.close()


@pytest.mark.parametrize(
    "text", ["0.0.0.0:9100", "192.0.2.1:9100", "[::]:9100", "example.org:9100", ":9100", "9100", "127.0.0.1:", "unix:x"]
)
def test_only_this_node_can_ask(text):
    with pytest.raises(BadInputError):
        parse_address(text)
    with pytest.raises(BadInputError):
        MetricsServer(text, source)


@pytest.mark.parametrize("text", ["127.0.0.1:65536", "127.0.0.1:x", "unix:", "127.0.0.1:٣"])
def test_bad_addresses(text):
    with pytest.raises(BadInputError):
        parse_address(text)


def test_a_failing_source_is_an_error_and_the_next_request_works():
    broken = threading.Event()
    broken.set()

    def flaky():
        if broken.is_set():
            raise RuntimeError("no figures")
        return source()

    server = MetricsServer("127.0.0.1:0", flaky)
    try:
        with pytest.raises(UnavailableError, match="500"):
            read_metrics(server.address)
        broken.clear()
        check(read_metrics(server.address))
    finally:
        server.close()


def test_a_silent_client_holds_nobody_up():
    server = MetricsServer("127.0.0.1:0", source)
    try:
        with socket.create_connection(parse_address(server.address)):
            check(read_metrics(server.address))
    finally:
        server.close()


def test_a_directory_that_cannot_be_written():
    with pytest.raises((AccessDeniedError, BusyError)):
        MetricsServer("unix:/proc/nowhere/metrics.sock", source)


def test_a_histogram_and_openmetrics_with_units_for_who_asks_for_that():
    histogram = Histogram((0.1, 1.0))
    histogram.add(0.5)
    metrics = [
        Metric("floe_wait_seconds", "Waits.", HISTOGRAM, ("cause",), distributions({"store": histogram.encode()})),
        *source(),
    ]
    server = MetricsServer("127.0.0.1:0", lambda: metrics)
    try:
        plain, text = (
            read_metrics(server.address, accept=accept)
            for accept in ("text/plain", "application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
        )
    finally:
        server.close()
    assert '\nfloe_wait_seconds_bucket{cause="store",le="1.0"} 1.0\n' in plain
    assert '\nfloe_wait_seconds_sum{cause="store"} 0.5\n' in plain
    assert text.endswith("# EOF\n")
    assert "# UNIT floe_wait_seconds seconds\n" in text
    assert "# UNIT floe_read_bytes bytes\n" in text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["floe_wait_seconds"].type == "histogram"
    assert families["floe_read_bytes"].unit == "bytes"


@pytest.mark.parametrize("accept", ["*/*", "application/openmetrics-text"])
def test_a_figure_that_cannot_be_read_just_now_is_left_out_and_takes_nothing_with_it(accept):
    status = {"waiting": None, "uptime": 1.0, "counters": {}}
    server = MetricsServer("127.0.0.1:0", lambda: packfs_metrics(status))
    try:
        said = read_metrics(server.address, accept=accept)
        assert "floe_packfs_uptime_seconds 1.0" in said
        assert "waiting" not in said
        status["waiting"] = 0
        assert "floe_packfs_waiting_requests 0.0" in read_metrics(server.address, accept=accept)
    finally:
        server.close()
