"""Which starts are followed when there are more than places."""

import logging
from types import SimpleNamespace

import pytest
from support.floe_node import wait_until

from floe.cli.packfs_metrics import packfs_metrics
from floe.fuse import starts as module
from floe.fuse.starts import Starts
from floe.store import recorder as recording
from floe.store.recorder import Recorder

PLACES = 64


class Node:
    """Starts over one pack each, named like their key; `told` are the keys of events by kind."""

    def __init__(self):
        self.told = {"begun": [], "start": []}
        events = SimpleNamespace(add=lambda kind, **fields: self.told[kind].append(fields["key"]))
        self.recorder = Recorder()
        self.starts = Starts(self.recorder, events, lambda tree: [tree], dict)

    def begin(self, *keys):
        for key in keys:
            self.starts.begun(key, key, [key])

    def read(self, key):
        self.recorder.note(key, 0, 4096)

    def followed(self):
        return set(self.recorder.packs)

    def left_out(self):
        (metric,) = (m for m in packfs_metrics({"starts": self.starts.status()}) if m.name == "floe_starts_left_out")
        return metric.values[()]


@pytest.fixture
def node(monkeypatch):
    monkeypatch.setattr(module, "_LOOK_PAUSE", 0.01)
    made = Node()
    yield made
    made.starts.close()


def test_starts_that_read_nothing_give_way_the_oldest_first_and_are_counted(node, caplog):
    caplog.set_level(logging.INFO)
    native = [f"native{number}" for number in range(PLACES)]
    node.begin(*native)
    node.read("native0")
    assert node.left_out() == 0
    node.begin("cold", "colder")
    assert node.followed() == {"native0", "cold", "colder", *native[3:]}
    assert node.told["begun"][-2:] == ["cold", "colder"]
    assert node.starts.status()["under_way"] == PLACES
    assert node.left_out() == 2
    (line,) = (record.getMessage() for record in caplog.records if "gives way" in record.getMessage())
    assert line.startswith("64 starts")


def test_one_that_reads_keeps_its_place_and_is_told(node, monkeypatch):
    monkeypatch.setattr(recording, "QUIET", 3600.0)
    reading = [f"k{number}" for number in range(PLACES)]
    node.begin(*reading)
    for key in reading:
        node.read(key)
    node.begin("late")
    assert node.followed() == set(reading)
    assert "late" not in node.told["begun"]
    assert node.left_out() == 1
    node.starts.close()
    wait_until(lambda: not node.starts.status()["under_way"])
    assert sorted(node.told["start"]) == sorted(reading)
    assert not node.followed()


def test_one_that_gives_way_while_it_ends_is_missed_by_nobody(node, monkeypatch):
    unfollow = node.recorder.unfollow

    def gave_way(one):
        with node.starts._lock:
            node.starts._under_way.clear()
        unfollow(one)
        unfollow(one)

    monkeypatch.setattr(recording, "WAIT", 0.0)
    monkeypatch.setattr(node.recorder, "unfollow", gave_way)
    node.begin("one")
    wait_until(lambda: node.starts._watcher is None)
    monkeypatch.undo()
    monkeypatch.setattr(module, "_LOOK_PAUSE", 0.01)
    monkeypatch.setattr(recording, "QUIET", 0.05)
    node.begin("two")
    node.read("two")
    wait_until(lambda: node.told["start"] == ["two"])
