"""Warm orders in the worker: frames come and are verified, whatever is full, damaged, evicted or asked again."""

import os
import threading

import pytest
from support.floe_node import wait_until
from support.stores import LastByteFlipStore, RecordingStore, SilentStore, UnreachableStore
from test_residency import FILE, Pack

from floe.fuse import warming
from floe.fuse.joined import Joined
from floe.fuse.pack_reader import PackReader
from floe.fuse.warming import Warming, Wish
from floe.store import completion
from floe.store.cache import CacheWriter, NodeCache
from floe.store.cache.shares import WARM_PIN
from floe.store.completion import Order
from floe.store.errors import BadInputError
from floe.store.frames import VerifiedFrame
from floe.store.objects.memory import MemoryStore
from floe.store.packindex import LAYER_FRAME


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(completion, "_REST_FIRST", 0.02)
    monkeypatch.setattr(completion, "_TICK_FULL", 0.05)
    monkeypatch.setattr(warming, "_LOOK", 0.02)
    monkeypatch.setattr(warming, "_AGAIN", 0.05)


@pytest.fixture
def store():
    return RecordingStore(MemoryStore())


class Worker:
    """Cache, reader and warm orders of a worker. `profiles`: by tree, what `profile_of` tells."""

    def __init__(self, folder, store, *, size=None):
        self.writer = CacheWriter(NodeCache(folder, size=size))
        self.cache = self.writer.cache
        self.reader = PackReader(store, self.writer, readahead=0, damage_memory=0.05)
        self.profiles = {}
        self.joined = Joined(self.reader, 2)
        self.warming = Warming(
            self.writer,
            self.joined.part(0),
            profile_of=lambda tree: self.profiles[tree],
            damage=lambda: self.reader.known_damage.frames,
        )

    def warm(self, *trees, name="order", **flags):
        return self.warming.warm(name, Wish(trees, **flags))

    def wait(self, state, *trees, **flags):
        wait_until(lambda: self.warm(*trees, **flags)["state"] == state)
        return self.warm(*trees, **flags)

    def close(self):
        self.warming.close()
        self.reader.close()
        self.writer.close()


@pytest.fixture
def worker(tmp_path, store):
    made = []

    def make(wrap=lambda inner: inner, **options):
        for old in made:
            old.close()
        made[:] = [Worker(tmp_path / "cache", wrap(store), **options)]
        return made[0]

    yield make
    made[0].close()


def test_all_frames_of_a_tree_come_once_and_are_verified(worker, store):
    node, pack = worker(), Pack(store, "a")
    tree = pack.tree(node.cache, *range(8))
    found = node.wait("done", tree)
    assert (found["content_bytes"], found["verified_bytes"], found["problem"]) == (8 * FILE, 8 * FILE, "")
    assert all(node.writer.has(pack.pack.id, frame) for frame in range(32))
    wait_until(lambda: node.cache.is_complete(pack.pack.id))
    before = store.bytes_read
    assert node.warm(tree, name="another")["state"] in ("planning", "done")
    node.wait("done", tree, name="another")
    assert store.bytes_read == before


def test_only_the_tree_s_own_frames_come(worker, store):
    node, pack = worker(), Pack(store, "a")
    tree = pack.tree(node.cache, 2, 5)
    found = node.wait("done", tree)
    assert found["content_bytes"] == 2 * FILE
    assert [f for f in range(32) if node.writer.has(pack.pack.id, f)] == [8, 9, 10, 11, 20, 21, 22, 23]


def test_only_what_the_profile_names_comes(worker, store):
    node, pack = worker(), Pack(store, "a")
    tree = pack.tree(node.cache, *range(8))
    node.profiles[tree] = [(pack.pack.id, 30), (pack.pack.id, 3), (pack.pack.id, 4)]
    found = node.wait("done", tree, profile=True)
    assert found["content_bytes"] == found["verified_bytes"] == 3 * LAYER_FRAME
    assert [f for f in range(32) if node.writer.has(pack.pack.id, f)] == [3, 4, 30]


def test_frames_of_a_profile_that_no_pack_has_are_not_waited_for(worker, store):
    """Anybody who may write to the store may have made it."""
    node, pack = worker(), Pack(store, "a")
    tree = pack.tree(node.cache, *range(8))
    node.profiles[tree] = [(pack.pack.id, 3), (pack.pack.id, 32), (pack.pack.id, (1 << 32) - 1)]
    found = node.wait("done", tree, profile=True)
    assert found["content_bytes"] == LAYER_FRAME


def test_an_order_that_cannot_be_planned_keeps_no_other_from_its_work(worker, store):
    node, pack = worker(), Pack(store, "a")
    one, two = pack.tree(node.cache, 1), pack.tree(node.cache, 2)
    node.profiles[two] = [(pack.pack.id, 9)]  # and of the first there is none: a KeyError
    assert node.warm(one, name="first", profile=True)["state"] == "planning"
    node.wait("done", two, profile=True)
    wait_until(lambda: "cannot be planned" in node.warm(one, name="first", profile=True)["problem"])


def test_a_worker_s_successor_goes_on_with_what_is_missing(worker, store):
    node, pack = worker(), Pack(store, "a")
    tree = pack.tree(node.cache, *range(8))
    node.profiles[tree] = [(pack.pack.id, frame) for frame in range(20)]
    node.wait("done", tree, profile=True)
    assert store.bytes_read < len(pack.pack.stored)
    node = worker()
    assert node.wait("done", tree)["verified_bytes"] == 8 * FILE
    assert store.bytes_read == len(pack.pack.stored)


def test_a_check_fetches_nothing(worker, store):
    node, pack = worker(), Pack(store, "a")
    tree = pack.tree(node.cache, *range(8))
    found = node.wait("incomplete", tree, fetch=False)
    assert (found["content_bytes"], found["verified_bytes"]) == (8 * FILE, 0)
    node.wait("done", tree)
    node.warming.forget("order")
    read = store.bytes_read
    assert node.wait("done", tree, name="check", fetch=False)["verified_bytes"] == 8 * FILE
    node.writer.discard(pack.pack.id, [5])
    found = node.wait("incomplete", tree, name="check", fetch=False)
    assert found["verified_bytes"] == 8 * FILE - LAYER_FRAME
    assert store.bytes_read == read


def damage(node, pack, frame):
    """Change a frame on the disk behind the worker's back."""
    fd = os.open(node.cache.data_path(pack.pack.id), os.O_RDWR)
    byte = os.pread(fd, 1, frame * LAYER_FRAME)
    os.pwrite(fd, bytes([byte[0] ^ 1]), frame * LAYER_FRAME)
    os.fsync(fd)
    os.close(fd)


def test_a_frame_that_the_disk_changed_is_found_by_a_deep_check_and_healed_by_the_next_order(worker, store):
    node, pack = worker(), Pack(store, "a")
    tree = pack.tree(node.cache, *range(8))
    node.wait("done", tree)
    wait_until(lambda: node.cache.is_complete(pack.pack.id))
    assert node.wait("done", tree, name="deep", fetch=False, deep=True)["damaged_frames"] == 0
    damage(node, pack, 7)
    node.warming.forget("order")  # which would fetch it again at once
    # Bits in the cache say that it was verified, which it was: only hashing tells.
    assert node.wait("done", tree, name="shallow", fetch=False)["verified_bytes"] == 8 * FILE
    found = node.wait("failed", tree, name="again", fetch=False, deep=True)
    assert (found["damaged_frames"], found["verified_bytes"]) == (1, 8 * FILE - LAYER_FRAME)
    assert "1 frames" in found["problem"]
    node.wait("done", tree, name="heal")
    node.wait("done", tree, name="deep again", fetch=False, deep=True)


def test_what_an_unclean_stop_left_is_hashed_before_it_counts(worker, store):
    node, pack = worker(), Pack(store, "a")
    tree = pack.tree(node.cache, *range(8))
    node.wait("done", tree)
    node.warming.forget("order")
    cached = node.writer.pack(pack.pack.id)
    with cached.lock:
        cached.bits.distrust()
    damage(node, pack, 3)
    found = node.wait("incomplete", tree, name="check", fetch=False)
    wait_until(lambda: node.warm(tree, name="check", fetch=False)["verified_bytes"] == 8 * FILE - LAYER_FRAME)
    assert found["content_bytes"] == 8 * FILE


def fill(node, pack, *, read):
    """All of another pack in the cache, read by somebody or not."""
    for frame in range(32):
        content = pack.pack.content[frame * LAYER_FRAME : (frame + 1) * LAYER_FRAME]
        verified = VerifiedFrame(content, pack.pack.index.frames[frame].digest)
        assert node.writer.put_run(pack.pack.id, frame, [verified], unread=not read)


def test_without_a_pin_nothing_is_evicted_for_an_order(worker, store):
    node = worker(size=36 * LAYER_FRAME)
    others, pack = Pack(store, "b"), Pack(store, "a")
    others.tree(node.cache, 0)
    fill(node, others, read=True)
    tree = pack.tree(node.cache, *range(8))
    found = node.wait("full", tree)
    assert "--pin" in found["problem"]
    assert all(node.writer.has(others.pack.id, frame) for frame in range(32))


def test_with_a_pin_what_was_not_used_goes_and_what_is_pinned_stays(worker, store):
    node = worker(size=36 * LAYER_FRAME)
    others, pack = Pack(store, "b"), Pack(store, "a")
    others.tree(node.cache, 0)
    fill(node, others, read=True)
    tree = pack.tree(node.cache, *range(8))
    node.cache.pin(pack.pack.id, WARM_PIN + tree, "{}")
    found = node.wait("done", tree, pinned=True)
    assert found["verified_bytes"] == 8 * FILE
    # And stays when readers want room.
    third = Pack(store, "c")
    third.tree(node.cache, 0)
    for frame in range(32):
        content = third.pack.content[frame * LAYER_FRAME : (frame + 1) * LAYER_FRAME]
        node.writer.put(third.pack.id, frame, VerifiedFrame(content, third.pack.index.frames[frame].digest))
    assert node.warm(tree, pinned=True)["state"] == "done"
    node.cache.unpin(pack.pack.id, WARM_PIN + tree)
    for frame in range(32):
        content = third.pack.content[frame * LAYER_FRAME : (frame + 1) * LAYER_FRAME]
        node.writer.put(third.pack.id, frame, VerifiedFrame(content, third.pack.index.frames[frame].digest))
    assert node.warm(tree, name="check", fetch=False)["state"] in ("planning", "incomplete")


def test_frames_that_are_damaged_in_the_store_fail_the_order_and_say_so(worker, store):
    node, pack = worker(LastByteFlipStore), Pack(store, "a")
    tree = pack.tree(node.cache, *range(8))
    found = node.wait("failed", tree)
    assert "damaged in the store" in found["problem"]
    assert found["verified_bytes"] < 8 * FILE


def test_while_the_store_fails_the_order_rests_and_goes_on_afterwards(worker, store):
    gate = {}

    def wrap(inner):
        gate["store"] = UnreachableStore(inner)
        return gate["store"]

    node, pack = worker(wrap), Pack(store, "a")
    tree = pack.tree(node.cache, *range(8))
    found = node.wait("resting", tree)
    assert "tried again" in found["problem"]
    node = worker()
    node.wait("done", tree)


def test_an_order_that_is_forgotten_is_given_up(worker, store, monkeypatch):
    node, pack = worker(SilentStore), Pack(store, "a")
    tree = pack.tree(node.cache, *range(8))
    node.wait("running", tree)
    node.warming.forget("order")
    wait_until(lambda: node.warming.count() == 0 and not node.warming._orders)
    monkeypatch.setattr(warming, "_FORGOTTEN", -1.0)
    node.warm(tree, name="nobody asks")
    node.warming._wake.set()
    wait_until(lambda: node.warming.count() == 0)


def test_what_cannot_be_meant_is_refused(worker, store):
    node, pack = worker(), Pack(store, "a")
    tree = pack.tree(node.cache, 0)
    for value in ({}, {"trees": []}, {"trees": [7]}, {"trees": [tree] * 257}, {"trees": [tree], "pinned": 1}):
        with pytest.raises(BadInputError):
            Wish.decode(value)
    assert Wish.decode({"trees": [tree, tree], "deep": True, "fetch": False}) == Wish((tree,), fetch=False, deep=True)
    for number in range(warming._MOST):
        node.warm(tree, name=str(number), fetch=False)
    with pytest.raises(BadInputError, match="256"):
        node.warm(tree, name="one more")


def test_a_tree_that_is_not_here_is_asked_for_again_until_it_is(worker, store):
    node, pack = worker(), Pack(store, "a")
    tree = pack.tree(node.cache, *range(8))
    path = node.cache.tree_path(tree)
    aside = path.rename(path.with_suffix(".aside"))
    wait_until(lambda: "not on this node" in node.warm(tree)["problem"])
    assert node.warm(tree)["state"] == "planning"
    aside.rename(path)
    node.wait("done", tree)


def test_orders_of_two_parts_are_one_list_and_replace_their_own_alone():
    told = []

    class Reader:
        def complete(self, orders):
            told.append([order.tree for order in orders])

    joined = Joined(Reader(), 2)
    first, second = joined.part(0), joined.part(1)
    second.complete([Order("mounted", ())])
    first.complete([Order("a", ()), Order("b", ())])
    first.complete([Order("c", ())])
    second.complete([])
    assert told == [["mounted"], ["a", "b", "mounted"], ["c", "mounted"], ["c"]]
    threads = [
        threading.Thread(target=part.complete, args=([Order(name, ())],))
        for part, name in ((first, "x"), (second, "y"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told[-1] == ["x", "y"]
