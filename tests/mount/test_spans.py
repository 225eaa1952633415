"""Spans of real daemons at a collector that parses the protocol; and daemons whose collector hangs or is not there."""

import json
import os
import socket
from contextlib import closing

import pytest
from support.collector import Collector, attributes
from support.floe_daemons import Daemons
from support.floe_node import wait_until

from floe.protos.packfs_control import started
from floe.store.errors import PreconditionError
from floe.store.spans import Spans, endpoint_of, spans_to, trace_id_of, trace_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def lines(daemons, message):
    """Lines of the worker's log, by the beginning of their message."""
    found = map(json.loads, filter(lambda line: line.startswith("{"), daemons.log("packfs").read_text().splitlines()))
    return [line for line in found if line["message"].startswith(message)]


def test_prepare_and_start_reach_the_collector(tmp_path):
    with closing(Collector()) as collector:
        daemons = Daemons(tmp_path / "h", {"FLOE_OTLP_ENDPOINT": collector.address, "FLOE_LOG_FORMAT": "json"})
        try:
            ordinary = daemons.client.metadata
            daemons.client.metadata = (*ordinary, ("traceparent", PARENT))
            daemons.client.prepare("k8s.io/1/named", "")
            daemons.client.metadata = ordinary
            daemons.client.prepare("k8s.io/2/unnamed", "")
            folder, mountpoint = tmp_path / "m", daemons.home / "mnt"
            folder.mkdir()
            (folder / "weights").write_bytes(os.urandom(1 << 20))
            daemons.floe("model", "push", folder, "iris:1")
            daemons.floe("model", "mount", "iris:1", mountpoint)
            (mount,) = daemons.json("status")["mounts"]
            started(daemons.run_dir, "k8s.io/3/container", "app:1", [mount["tree"]], PARENT)
            wait_until(lambda: daemons.json("status")["packfs"]["starts"]["under_way"] == 2)
            (mountpoint / "weights").read_bytes()
            wait_until(lambda: len(collector.spans) >= 4, 60)
            wait_until(lambda: len(lines(daemons, "start of ")) == 2, 60)
            told = {line["message"].split()[2].rstrip(":"): line for line in lines(daemons, "start of ")}
            daemons.floe("umount", mountpoint)
        finally:
            daemons.close()
    found = {attributes(span)["floe.key"]: (service, span) for service, span in collector.spans}
    service, named = found["k8s.io/1/named"]
    assert service == "floe-snapshotter"
    assert (named.trace_id.hex(), named.parent_span_id.hex()) == tuple(PARENT.split("-")[1:3])
    _, unnamed = found["k8s.io/2/unnamed"]
    assert unnamed.trace_id == trace_id_of("k8s.io/2/unnamed").to_bytes(16, "big")
    _, of_container = found["k8s.io/3/container"]
    assert (of_container.name, of_container.trace_id.hex()) == ("start", PARENT.split("-")[1])
    service, start = found[str(mountpoint)]
    assert (service, attributes(start)["floe.name"]) == ("floe-packfs", "iris:1")
    assert start.end_time_unix_nano > start.start_time_unix_nano
    assert "first read" in {event.name for event in start.events}
    # The log names the trace in which the collector has the span.
    line, of_model = told["k8s.io/3/container"], told[str(mountpoint)]
    assert (line["image"], line["trace"]) == ("app:1", of_container.trace_id.hex())
    assert (of_model["model"], of_model["trace"]) == ("iris:1", start.trace_id.hex())


def test_stalls_are_events_of_the_start_that_they_are_of():
    fields = {"by": "test", "key": "/mnt", "name": "iris:1", "trees": ["t"], "first_read": 0.1, "last_read": 2.0}
    with closing(Collector()) as collector:
        asked = []
        spans = Spans(
            collector.address + "/v1/traces",
            "packfs",
            version="1",
            packs_of=lambda tree: asked.append(tree) or ["p", "r"],
        )
        for at, pack, cause in ((10.5, "p", "store"), (10.6, "q", "others"), (50.0, "p", "late")):
            spans.add("stall", at=at, pack=pack, offset=0, bytes=7, seconds=0.3, cause=cause)
        spans.add("start", at=10.0, **fields)
        assert asked == ["t"]  # once, however many stalls there are
        spans.add("start", at="no time", **fields)  # tells nobody, and raises nothing
        spans.close()
        wait_until(lambda: collector.spans, 60)
    ((_, span),) = collector.spans
    (stall,) = [event for event in span.events if event.name == "stall"]
    assert attributes(stall) == {
        "floe.cause": "store",
        "floe.seconds": 0.3,
        "floe.bytes": 7,
        "floe.pack": "p",
        "floe.offset": 0,
    }
    assert stall.time_unix_nano == 10_500_000_000


def test_a_collector_that_hangs_holds_nothing_up(tmp_path):
    with closing(socket.create_server(("127.0.0.1", 0), backlog=1)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        daemons = Daemons(tmp_path / "h", {"FLOE_OTLP_ENDPOINT": address})
        try:
            for number in range(50):
                daemons.client.prepare(f"k8s.io/{number}/x", "")
            daemons.snapshotter.terminate()
            assert daemons.snapshotter.wait(60) == 0
        finally:
            daemons.close()


def test_where_spans_go():
    assert endpoint_of(None, {}) is None
    assert endpoint_of("http://c:4318/", {}) == "http://c:4318/v1/traces"
    assert endpoint_of(None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://d:4318"}) == "http://d:4318/v1/traces"
    assert endpoint_of(None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://e/x"}) == "http://e/x"


def test_without_the_packages_the_log_says_what_to_install(monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry", None)
    with pytest.raises(PreconditionError) as refused:
        Spans("http://c:4318/v1/traces", "packfs", version="1")
    assert "opentelemetry-sdk" in refused.value.hint
    assert spans_to("http://c:4318", "packfs", version="1") is None
    assert "opentelemetry-sdk" in caplog.text


@pytest.mark.parametrize(
    "text",
    ["", "00-1-2-3", PARENT.upper(), PARENT.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32), "ff" + PARENT[2:]],
)
def test_what_is_no_traceparent_names_no_trace(text):
    assert trace_of(text) is None
    assert trace_of(PARENT) == (0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331, 1)
