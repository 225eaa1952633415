"""The worker's start-up profiles from mount to mount, over a store in memory: what goes wrong harms no reader."""

import logging
import stat
import time

import pytest
from support.floe_node import wait_until
from support.packs import make_pack, random_content
from support.reading import read
from support.stores import CountdownFailureStore, RecordingStore, SilentStore, StoreWrapper
from support.trees import TestPack, file_node

from floe.fuse import startup as module
from floe.fuse.pack_reader import PackReader
from floe.fuse.startup import StartUp
from floe.ingest.entries import Node, walk
from floe.ingest.erofs_writer import build_image
from floe.store import layout
from floe.store.cache import CacheWriter, NodeCache
from floe.store.catalog import Catalog
from floe.store.errors import AccessDeniedError, UnavailableError
from floe.store.ids import hexdigest
from floe.store.index import NullIndex
from floe.store.objects.memory import MemoryStore
from floe.store.packindex import LAYER_FRAME
from floe.store.profile import Profile, Touch
from floe.store.profiles import ProfileStore
from floe.store.recorder import Recorder

FILES = 60
SIZE = 200_000  # bytes of a file: two frames, one of them shared with its neighbour


class Version:
    """A tree of FILES files, published; `first`: a file of so many bytes before them moves all others."""

    def __init__(self, store, first=0):
        laid_out = TestPack(f"layout {first}")
        root = Node(stat.S_IFDIR | 0o755)
        if first:
            root.children[b"0"] = file_node(laid_out, random_content(first, 999))
        for number in range(FILES):
            root.children[b"file%02d" % number] = file_node(laid_out, random_content(SIZE, number))
        self.pack = make_pack(bytes(laid_out.data), LAYER_FRAME)
        for _, node in walk(root):
            for chunk in node.content.chunks if node.content else ():
                chunk.pack_id = self.pack.id
        self.root = root
        self.image = build_image(root, {self.pack.id: len(self.pack.content) // 4096})
        self.tree = hexdigest(self.image)
        self.pack.publish(store)

    def frames(self, *numbers):
        found = set()
        for number in numbers:
            start = self.offset(number)
            found |= set(range(start // LAYER_FRAME, (start + SIZE - 1) // LAYER_FRAME + 1))
        return {(self.pack.id, frame) for frame in found}

    def offset(self, number):
        return self.root.children[b"file%02d" % number].content.chunks[0].block * 4096


class Machine:
    """A node with an empty cache."""

    def __init__(self, folder, store, version, **options):
        self.version = version
        self.writer = CacheWriter(NodeCache(folder))
        self.writer.cache.add_index(version.pack.id, version.pack.index.encode())
        self.writer.cache.add_tree(version.tree, version.image)
        recorder = Recorder()
        self.reader = PackReader(store, self.writer, readahead=0, recorder=recorder)
        profiles = ProfileStore(Catalog(store, NullIndex()))
        self.startup = StartUp(profiles, self.writer, self.reader, recorder, spread=0.0, **options)

    def mount(self):
        self.startup.mounted(self.version.tree, [self.version.pack.id])
        return self

    def expect(self, nbytes=1 << 30):
        self.startup.expected(self.version.tree, nbytes)
        return self

    def read(self, *numbers):
        for number in numbers:
            found = read(self.reader, self.version.pack.id, self.version.offset(number), SIZE)
            assert found == random_content(SIZE, number)
        return self

    def counters(self):
        return self.reader.counters()

    def close(self):
        self.startup.close()
        self.reader.close()
        self.writer.close()


@pytest.fixture
def store():
    made = MemoryStore()
    Catalog(made, NullIndex()).ensure_store()
    return made


@pytest.fixture
def machine(tmp_path):
    made = []

    def make(store, version, **options):
        made.append(Machine(tmp_path / str(len(made)), store, version, **options))
        return made[-1]

    yield make
    for node in made:
        node.close()


def start(machine, store, version, *numbers, **options):
    """A start on a node of its own, from mount to stop."""
    node = machine(store, version, **options).mount().read(*numbers)
    node.startup.close()
    return node


def profile_of(store, version):
    return ProfileStore(Catalog(store, NullIndex())).of_tree(version.tree)


def test_the_next_node_fetches_what_the_first_one_read_in_that_order(machine, store):
    version = Version(store)
    start(machine, store, version, 40, 3, 20)
    recording = RecordingStore(store)
    node = machine(recording, version).mount()
    wanted = version.frames(40, 3, 20)
    wait_until(lambda: node.counters()["kept_stored_frames"] == len(wanted))
    asked = [request.start for request in recording.ops("get_async")]
    assert asked == [min(stored(version, frame) for frame in version.frames(number)) for number in (40, 3, 20)]
    before = recording.bytes_read
    node.read(40, 3, 20)
    assert recording.bytes_read == before
    node.startup.close()
    counters = node.counters()
    assert (counters["profiles_found"], counters["store_requests"]) == (1, 0)
    assert (counters["profile_used_frames"], counters["profile_unused_frames"]) == (len(wanted), 0)
    assert profile_of(store, version).starts == 2


def stored(version, frame):
    return version.pack.index.stored_offsets[frame[1]]


def test_a_node_that_has_it_all_in_its_cache_teaches_others(machine, store):
    version = Version(store)
    node = machine(store, version).read(7)
    wait_until(lambda: node.counters()["kept_stored_frames"] == len(version.frames(7)))
    node.mount().read(7)
    node.startup.close()
    counters = node.counters()
    assert counters["cache_requests"] + counters["prefetched_requests"] == 1
    assert profile_of(store, version).hot_pieces() == [(b"file07", 0), (b"file07", 1)]


def test_a_new_version_profits_from_its_predecessor(machine, store):
    old, new = Version(store), Version(store, first=90_000)
    profiles = ProfileStore(Catalog(store, NullIndex()))
    for version in (old, new):
        profiles.seed(version.tree, "models/m")
    start(machine, store, old, 40, 3, 20)
    recording = RecordingStore(store)
    node = machine(recording, new).mount()
    wanted = new.frames(40, 3, 20)
    wait_until(lambda: node.counters()["kept_stored_frames"] == len(wanted))
    before = recording.bytes_read
    node.read(40, 3, 20)
    assert recording.bytes_read == before
    node.startup.close()
    assert node.counters()["profile_unused_frames"] == 0
    assert profiles.of_source("models/m").starts == 2


def test_what_one_of_many_starts_read_is_not_fetched(machine, store):
    version = Version(store)
    start(machine, store, version, 1, 50)
    for _ in range(4):
        start(machine, store, version, 1)
    node = machine(store, version).mount()
    wait_until(lambda: node.counters()["kept_stored_frames"] == len(version.frames(1)))
    node.read(1)
    node.startup.close()
    assert node.counters()["profile_frames"] == len(version.frames(1))


def test_a_node_without_permission_says_so_once_and_reads_on(machine, store, caplog):
    version = Version(store)
    denied = CountdownFailureStore(store, fail_put=dict.fromkeys(range(1, 9), AccessDeniedError("PutObject is denied")))
    node = machine(denied, version)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            node.mount().read(1)
            for recording in node.startup._recorder.finished(all_of_them=True):
                node.startup._evaluate_safely(recording)
    assert [r.levelname for r in caplog.records if "may not write" in r.message] == ["INFO"]
    assert denied.calls["put"] == 1
    assert profile_of(store, version) is None


def test_a_store_that_fails_costs_the_profile_only(machine, store, caplog):
    version = Version(store)
    start(machine, store, version, 1)

    class Away(StoreWrapper):
        def get(self, key, start=0, length=None):
            raise UnavailableError("away")

        def get_versioned(self, key):
            raise UnavailableError("away")

    with caplog.at_level(logging.INFO):
        node = start(machine, Away(store), version, 1, 2)
    assert node.counters()["profiles_found"] == node.counters()["profiles_published"] == 0
    assert "without its profile" in caplog.text
    assert "is not kept" in caplog.text


def test_a_damaged_profile_is_passed_over_and_replaced(machine, store, caplog):
    version = Version(store)
    store.put(layout.tree_profile_key(version.tree), b"FLOEPROF and no more")
    node = start(machine, store, version, 5)
    assert node.counters()["profiles_found"] == 0
    assert "goes on without it" in caplog.text
    assert profile_of(store, version).starts == 1


def test_a_profile_that_does_not_fit_its_tree_fetches_nothing_wrong(machine, store):
    """Frames and packs past the end, as after a mistake: what is not there is passed over."""
    version = Version(store)
    odd = Profile(1, frames={(0, 1): Touch(0, 1), (0, 1 << 30): Touch(1, 1), (9, 0): Touch(2, 1)})
    store.put(layout.tree_profile_key(version.tree), odd.encode())
    node = machine(store, version).mount()
    wait_until(lambda: node.counters()["kept_stored_frames"] == 1)
    node.read(1)


def test_a_silent_store_delays_neither_mounts_nor_the_end(machine, store, monkeypatch):
    monkeypatch.setattr(module, "_STOP", 0.1)
    version = Version(store)
    silent = SilentStore(store, matches="profiles/")
    node = machine(silent, version)
    began = time.monotonic()
    node.mount()
    node.read(1, 2)
    wait_until(lambda: silent.waiting == 1)
    node.startup.close()
    assert time.monotonic() - began < 15  # not for ever: the look-up still hangs
    silent.release()


@pytest.mark.parametrize(("mode", "replayed", "published"), [("on", 1, 1), ("read", 1, 0), ("off", 0, 0)])
def test_the_setting(machine, store, mode, replayed, published):
    version = Version(store)
    start(machine, store, version, 1)
    node = machine(store, version, mode=mode).mount()
    wait_until(lambda: node.counters()["profiles_found"] == replayed)
    node.read(1)
    node.startup.close()
    assert node.counters()["profiles_published"] == published
    assert profile_of(store, version).starts == 1 + published


def test_nonsense_over_the_socket_is_refused_or_harmless(machine, store):
    version = Version(store)
    node = machine(store, version)
    node.startup.mounted("../../etc", ["x"])
    node.startup.mounted("f" * 64, ["../x", version.pack.id])
    node.read(1)
    node.startup.close()
    assert node.counters()["profiles_published"] == 0


def numbers_of(requests, version):
    """The frames whose stored bytes these requests began with."""
    starts = version.pack.index.stored_offsets
    return [starts.index(request.start) for request in requests]


def test_a_tree_that_is_expected_is_fetched_from_the_front(machine, store):
    version = Version(store)
    recording = RecordingStore(store)
    node = machine(recording, version, mode="off").expect()
    frames = len(version.pack.index.frames)
    wait_until(lambda: node.counters()["kept_stored_frames"] == frames)
    assert not [request for request in recording.ops("get") if "profiles" in request.key]  # the mode is off
    asked = numbers_of(recording.ops("get_async"), version)
    assert asked == sorted(asked)
    before = recording.bytes_read
    node.mount().read(0, 30, 59)
    assert recording.bytes_read == before
    assert (node.counters()["front_frames"], node.counters()["profile_frames"]) == (frames, 0)


def test_what_is_fetched_from_the_front_is_bounded_by_bytes_and_by_the_cache(machine, store):
    version = Version(store)
    node = machine(store, version).expect(5 * LAYER_FRAME)
    wait_until(lambda: node.counters()["kept_stored_frames"] == 5)
    small = machine(store, version)
    small.writer.cache.size = 3 * LAYER_FRAME
    small.expect()
    wait_until(lambda: small.counters()["kept_stored_frames"] == 3)
    small.startup.unexpected(version.tree)
    small.expect()  # with the cache full nothing goes for it
    small.startup.close()
    wait_until(lambda: not small.startup._threads)
    assert (small.counters()["front_frames"], small.counters()["kept_evicted_bytes"]) == (3, 0)
    assert not node.counters()["profile_frames"]


def test_a_tree_that_is_expected_is_fetched_by_its_profile_where_there_is_one(machine, store):
    version = Version(store)
    start(machine, store, version, 40, 3, 20)
    node = machine(store, version).expect()
    wanted = version.frames(40, 3, 20)
    wait_until(lambda: node.counters()["kept_stored_frames"] == len(wanted))
    node.mount().read(40, 3)
    node.startup.close()
    counters = node.counters()
    assert (counters["profile_frames"], counters["front_frames"], counters["store_requests"]) == (len(wanted), 0, 0)
    used = len(version.frames(40, 3))
    assert (counters["profile_used_frames"], counters["profile_unused_frames"]) == (used, len(wanted) - used)


def test_what_is_expected_no_more_is_not_fetched(machine, store):
    version = Version(store)
    silent = SilentStore(store)
    node = machine(silent, version, mode="off").expect(1 << 20).expect(1 << 30)  # said once
    wait_until(lambda: node.counters()["front_requests"])
    node.startup.unexpected(version.tree)
    node.startup.unexpected("a" * 64)  # of which nobody knows
    silent.release()
    wait_until(lambda: not node.reader._fetcher._replayer.busy)
    assert node.counters()["front_frames"] == 8
    node.expect()
    wait_until(lambda: node.counters()["kept_stored_frames"] == len(version.pack.index.frames))


def test_a_tree_laid_out_anew_profits_from_its_former_self(machine, store):
    """The same files, elsewhere in the pack: starts of the old tree count for the new one, by path."""
    old, new = Version(store), Version(store, first=700_000)
    profiles = ProfileStore(Catalog(store, NullIndex()))
    profiles.seed(old.tree, "images/app@linux/amd64#0")
    start(machine, store, old, 40, 3, 20)
    store.delete(layout.source_profile_key("images/app@linux/amd64#0"))
    profiles.seed(new.tree, "images/other@linux/amd64#0", of=old.tree)
    known = profile_of(store, new)
    assert (known.starts, known.source, len(known.frames)) == (1, "images/app@linux/amd64#0", 0)
    node = machine(store, new).mount()
    wanted = new.frames(40, 3, 20)
    wait_until(lambda: node.counters()["kept_stored_frames"] == len(wanted))
    before = node.counters()["readahead_bytes"]
    node.read(40, 3, 20)
    assert node.counters()["readahead_bytes"] == before
    assert node.counters()["store_requests"] == 0
