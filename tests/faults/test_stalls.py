"""A slow store, a short one of memory, a lying one: what readers waited for is counted by cause, told as an event, and named by file."""

import stat
import threading

import pytest
from support.floe_node import wait_until
from support.packs import make_pack, random_content
from support.reading import read
from support.stores import CountdownFailureStore, LastByteFlipStore, SlowStore
from support.trees import TestPack, file_node

from floe.fuse import stalls as module
from floe.fuse.pack_reader import PackReader
from floe.fuse.stalls import LONGEST, Stalls, Wait, together
from floe.fuse.starts import Starts
from floe.ingest.entries import Node
from floe.ingest.erofs_writer import build_image
from floe.store import recorder as recording
from floe.store.cache import CacheWriter, NodeCache
from floe.store.errors import ThrottledError
from floe.store.eventlog import EventLog, read_events
from floe.store.ids import hexdigest
from floe.store.objects.memory import MemoryStore
from floe.store.recorder import Recorder
from floe.store.waits import Stall

FRAME = 128 << 10
SIZE = 3 * FRAME


class Machine:
    """One tree of the files `first` and `second`, each three frames of its own; nothing of it is in the cache."""

    def __init__(self, folder, wrap):
        laid_out = TestPack("layout")
        root = Node(stat.S_IFDIR | 0o755)
        for number, name in enumerate((b"first", b"second")):
            root.children[name] = file_node(laid_out, random_content(SIZE, number))
        self.pack = make_pack(bytes(laid_out.data), FRAME)
        for node in root.children.values():
            for chunk in node.content.chunks:
                chunk.pack_id = self.pack.id
        image = build_image(root, {self.pack.id: len(self.pack.content) // 4096})
        self.tree = hexdigest(image)
        memory = MemoryStore()
        self.pack.publish(memory)
        self.writer = CacheWriter(NodeCache(folder / "cache"))
        self.writer.cache.add_index(self.pack.id, self.pack.index.encode())
        self.writer.cache.add_tree(self.tree, image)
        self.run_dir = folder
        self.events = EventLog(folder, "packfs")
        self.stalls = Stalls(
            self.events, lambda pack: [self.tree] * (pack == self.pack.id), self.writer.cache.tree_path
        )
        self.recorder = Recorder()
        self.reader = PackReader(
            wrap(memory), self.writer, readahead=0, recorder=self.recorder, stalled=self.stalls.add
        )
        self.starts = Starts(self.recorder, self.events, lambda _tree: [self.pack.id], self.reader.counters)

    def read(self, file):
        assert read(self.reader, self.pack.id, file * SIZE, SIZE) == random_content(SIZE, file)

    def told(self, kind):
        return [event for event in read_events(self.run_dir) if event["kind"] == kind]

    def causes(self):
        found = self.reader.waits()["read_seconds"]
        return {cause: sum(data["counts"]) for cause, data in found.items() if sum(data["counts"])}

    def close(self):
        self.stalls.close()
        self.starts.close()
        self.reader.close()
        self.writer.close()
        self.events.close()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LOOK_PAUSE", 0.05)
    made = []

    def make(wrap):
        made.append(Machine(tmp_path, wrap))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_stall_is_named_by_file_and_cause(machine):
    made = machine(lambda store: SlowStore(store, 0.3))
    made.read(1)
    wait_until(lambda: [stall["path"] for stall in made.stalls.status()] == ["second"])
    (longest,) = made.stalls.status()
    assert (longest["cause"], longest["tree"], longest["bytes"]) == ("store", made.tree, SIZE)
    assert longest["seconds"] >= 0.3
    wait_until(lambda: made.told("stall"))
    (event,) = made.told("stall")
    assert (event["pack"], event["offset"], event["bytes"], event["cause"]) == (made.pack.id, SIZE, SIZE, "store")
    assert event["seconds"] >= 0.3
    assert made.causes() == {"store": 1}
    assert sum(made.reader.waits()["request_seconds"]["demand"]["counts"]) == 1
    made.read(1)  # the cache answers now: nobody waits
    assert made.causes() == {"store": 1}


def test_a_store_that_asks_to_slow_down_is_the_cause_and_is_counted(machine):
    made = machine(lambda store: CountdownFailureStore(store, fail_get={1: ThrottledError("slow down")}))
    made.read(0)
    assert made.causes() == {"store_error": 1}
    counted = made.reader.waits()["store_errors"]
    assert {cause for cause, count in counted.items() if count} == {"throttled"}
    assert sum(counted.values()) == 1


def test_content_that_was_damaged_on_its_way_is_the_cause(machine):
    made = machine(lambda store: LastByteFlipStore(store, times=1))
    made.read(0)
    assert made.causes() == {"damaged_in_transit": 1}


def test_a_second_reader_of_what_is_fetched_waits_for_the_same_request(machine):
    gate = threading.Event()
    slow = []
    made = machine(lambda store: slow.append(SlowStore(store, gate=gate)) or slow[0])
    readers = [threading.Thread(target=made.read, args=(0,)) for _ in range(2)]
    for reader in readers:
        reader.start()
    wait_until(lambda: slow[0].waiting and made.reader.counters()["reads"] == 2)
    assert made.reader.waits()["requests_in_flight"] == 1
    gate.set()
    for reader in readers:
        reader.join(20)
    assert made.causes() == {"store": 2}


def test_a_flood_of_stalls_keeps_the_longest_and_does_not_fill_the_ring(machine, monkeypatch):
    monkeypatch.setattr(module, "_EVENTS_MAX", 0)
    monkeypatch.setattr(module, "_EVENTS_SECONDS", 1e9)
    made = machine(lambda store: store)
    for number in range(40):
        made.stalls.add(Stall(made.pack.id, number * 100_000, 1, 0.1 + number / 1000, "store", ""))
    made.stalls.add(Stall(made.pack.id, 7_000_000, 1, 2.0, "store", "long"))
    made.stalls.close()
    made.events.close()
    assert [stall["seconds"] for stall in made.stalls.status()][:2] == [2.0, 0.139]
    assert len(made.stalls.status()) == LONGEST
    assert [event["seconds"] for event in made.told("stall")] == [2.0]


def test_a_start_is_told_when_nothing_new_is_read(machine, monkeypatch):
    monkeypatch.setattr(recording, "QUIET", 0.2)
    monkeypatch.setattr("floe.fuse.starts._LOOK_PAUSE", 0.02)
    made = machine(lambda store: SlowStore(store, 0.05))
    made.starts.begun("k8s.io/7/abc", "registry.example/app:1", [made.tree])
    assert made.starts.status()["under_way"] == 1
    made.read(0)
    made.read(1)
    wait_until(lambda: not made.starts.status()["under_way"])
    last = made.starts.status()["last"]["registry.example/app:1"]
    assert 0 <= last["first_read"] <= last["last_read"] - 0.05
    assert [sum(data["counts"]) for data in made.starts.status()["seconds"].values()] == [1, 1]
    wait_until(lambda: made.told("start"))
    (event,) = made.told("start")
    assert (event["key"], event["trees"], event["bytes"]) == ("k8s.io/7/abc", [made.tree], 2 * SIZE)
    assert event["meanwhile"]["store_requests"] == 2
    assert not made.recorder.packs  # a reader pays nothing for starts that are over


def test_a_start_that_nobody_names_has_the_name_of_its_repository(machine, monkeypatch):
    monkeypatch.setattr(recording, "QUIET", 0.05)
    monkeypatch.setattr("floe.fuse.starts._LOOK_PAUSE", 0.01)
    made = machine(lambda store: store)
    made.starts = Starts(
        *(made.recorder, made.events, lambda _tree: [made.pack.id], made.reader.counters),
        lambda tree: "images/registry.example:5000/app@linux/amd64#3" if tree == made.tree else None,
    )
    made.starts.begun("key", "", [made.tree])
    made.read(0)
    wait_until(lambda: not made.starts.status()["under_way"])
    wait_until(lambda: set(made.starts.status()["last"]) == {"registry.example:5000/app"})


def test_names_of_starts_are_bounded(machine, monkeypatch):
    monkeypatch.setattr(recording, "QUIET", 0.05)
    monkeypatch.setattr("floe.fuse.starts._LOOK_PAUSE", 0.01)
    monkeypatch.setattr("floe.fuse.starts._NAMES_MAX", 2)
    made = machine(lambda store: store)
    for number in range(4):
        made.starts.begun("key", f"image{number}", [made.tree])
        made.read(0)
        wait_until(lambda: not made.starts.status()["under_way"])
    assert set(made.starts.status()["last"]) == {"image2", "image3"}


def test_parts_of_a_read_that_wait_side_by_side_are_one_stall():
    def wait(at, offset, seconds, cause="store"):
        return Wait(at, Stall("a" * 64, offset, 4096, seconds, cause, ""))

    one, two, three = wait(1.1, 8192, 0.3), wait(1.0, 4096, 0.35), wait(1.0, 0, 0.2)
    (found,) = together([one, two, three])
    assert (found.at, found.reads, found.stall.offset, found.stall.length) == (1.0, 3, 0, 12288)
    assert found.stall.seconds == pytest.approx(0.4)
    apart = [wait(1.0, 0, 0.2), wait(1.3, 4096, 0.2), wait(1.0, 1 << 20, 0.2), wait(1.0, 4096, 0.2, "disk")]
    assert sorted(together(apart)) == sorted(apart)
