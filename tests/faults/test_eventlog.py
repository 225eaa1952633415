import json
import stat
import threading

from support.floe_node import wait_until

from floe.store import eventlog
from floe.store.eventlog import EventLog, read_events


def test_events_of_all_daemons_come_back_in_order_and_outlive_who_wrote_them(tmp_path):
    first, second = EventLog(tmp_path, "packfs"), EventLog(tmp_path, "snapshotter")
    first.add("mounted", at=2.0, tree="a")
    second.add("prepare", at=1.0, key="k")
    first.close()
    second.close()
    again = EventLog(tmp_path, "packfs")
    again.add("stall", at=3.0)
    wait_until(lambda: len(read_events(tmp_path)) == 3)  # without a close: a killed daemon has none
    again.close()
    assert [(event["by"], event["kind"]) for event in read_events(tmp_path)] == [
        ("snapshotter", "prepare"), ("packfs", "mounted"), ("packfs", "stall"),
    ]  # fmt: skip
    assert stat.S_IMODE((tmp_path / "events/packfs.jsonl").stat().st_mode) == 0o600


def test_the_ring_is_bounded_and_keeps_the_latest(tmp_path, monkeypatch):
    monkeypatch.setattr(eventlog, "_BATCH", 0)
    log = EventLog(tmp_path, "packfs", limit=20_000)
    for number in range(2000):
        log.add("stall", at=float(number), detail="x" * 40)
        if number % 80 == 0:
            wait_until(lambda: not log._pending)
    log.close()
    found = read_events(tmp_path)
    assert sum(path.stat().st_size for path in (tmp_path / "events").iterdir()) <= 20_000
    assert found[-1]["at"] == 1999.0
    assert 50 < len(found) < 2000


def test_what_cannot_be_kept_up_with_is_counted_and_nobody_waits(tmp_path, monkeypatch):
    free = threading.Event()
    written = EventLog._write
    monkeypatch.setattr(EventLog, "_write", lambda self: (free.wait(20), written(self)))
    log = EventLog(tmp_path, "packfs")
    for number in range(eventlog._PENDING + 7):
        log.add("stall", at=float(number))
    free.set()
    log.close()
    (left_out,) = (event for event in read_events(tmp_path) if event["kind"] == "left_out")
    assert left_out["events"] == 7


def test_half_a_line_and_strange_ones_are_passed_over(tmp_path):
    folder = tmp_path / "events"
    folder.mkdir()
    good = json.dumps({"at": 1.5, "by": "packfs", "kind": "worker"})
    (folder / "packfs.jsonl").write_text(f'[1]\n{good}\n{{"at": "x", "kind": "a"}}\n{{"at": 2.0, "ki')
    assert [event["kind"] for event in read_events(tmp_path)] == ["worker"]
    assert read_events(tmp_path / "nowhere") == []


def test_a_folder_that_cannot_be_written_is_said_once_and_stops_nobody(tmp_path, caplog):
    (tmp_path / "events").write_text("no folder")
    log = EventLog(tmp_path, "packfs")
    for _ in range(3):
        log.add("worker")
        wait_until(lambda: not log._pending)
    log.close()
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["events are not kept"]
