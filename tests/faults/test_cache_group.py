"""Several cache directories: each pack in one of them, found wherever it lies, bounded and evicted one by one; some fail."""

import contextlib
import errno
import logging
import os
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest
from support import slow_disk
from support.mounts import until
from support.packs import make_pack, random_content
from support.reading import read
from support.stores import RecordingStore

from floe.fuse.pack_reader import PackReader
from floe.fuse.pins import PolicyPins
from floe.ingest.entries import Node
from floe.ingest.erofs_writer import build_image
from floe.store.cache import (
    CacheGroup,
    CacheWriter,
    GroupWriter,
    NodeCache,
    group,
    group_writer,
    open_cache,
    open_writer,
    placing,
)
from floe.store.cache.shares import POLICY_PIN, Share
from floe.store.errors import BadInputError, BusyError, DiskError, NoSpaceError, NotFoundError
from floe.store.frames import VerifiedFrame
from floe.store.ids import hexdigest
from floe.store.objects.memory import MemoryStore
from floe.store.policy import Policy

MIB = 1 << 20
FRAME = 128 << 10
PAGE = 4096


class Machine:
    """Packs in a store, and a cache in directories below `base`."""

    def __init__(self, base, stack):
        self.base = base
        self.stack = stack
        self.memory = MemoryStore()
        self.store = RecordingStore(self.memory)
        self.packs = [make_pack(random_content(MIB, seed), FRAME).publish(self.memory) for seed in range(12)]
        self.life = contextlib.ExitStack()

    def start(self, *names, size=None):
        """The cache in these directories, its writer and a reader; in place of what was before."""
        self.stop()
        self.life = self.stack.enter_context(contextlib.ExitStack())
        cache = open_cache([self.base / name for name in names], lambda _total: (size, 0))
        for pack in self.packs:
            cache.add_index(pack.id, pack.index.encode())
        self.cache = cache
        self.writer = self.life.enter_context(contextlib.closing(GroupWriter(cache)))
        self.reader = self.life.enter_context(contextlib.closing(PackReader(self.store, self.writer, readahead=0)))

    def stop(self):
        self.life.close()

    def read_all(self, packs=None):
        for pack in self.packs if packs is None else packs:
            assert read(self.reader, pack.id, 0, MIB) == pack.content

    def fill(self):
        self.read_all()
        until(lambda: self.writer.counters()["stored_bytes"] >= len(self.packs) * MIB)

    def places(self):
        """By pack the names of the directories with content of it."""
        found = {pack.id: [] for pack in self.packs}
        for data in self.base.glob("*/packs/*/data"):
            if data.stat().st_blocks:
                found[data.parent.name].append(data.parent.parent.parent.name)
        return found

    def at(self, name):
        return [pack for pack in self.packs if self.places()[pack.id] == [name]]

    def state(self, name):
        (disk,) = [disk for disk in self.writer.disks() if disk["path"] == str(self.base / name)]
        return disk["state"]


@pytest.fixture
def stack():
    with contextlib.ExitStack() as made:
        yield made


@pytest.fixture
def machine(tmp_path, stack, monkeypatch):
    """With places that follow from the directories' names, and not from the paths and disks of this test run."""

    def by_name(pack_id, weights):
        paths = {Path(path).name: path for path in weights}
        return [paths[name] for name in placing.ranked(pack_id, dict.fromkeys(paths, 1))]

    monkeypatch.setattr(group, "ranked", by_name)
    return Machine(tmp_path, stack)


@pytest.fixture
def disk(tmp_path, machine):
    """A small file system of its own at the directory b."""
    place = tmp_path / "b"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "none", place], check=True)
    yield place
    machine.stop()
    subprocess.run(["umount", "-l", place], check=True)


def test_each_pack_lies_in_one_directory_and_is_found_there_again(machine):
    machine.start("a", "b", "c")
    machine.fill()
    places = machine.places()
    assert all(len(names) == 1 for names in places.values())
    assert {names[0] for names in places.values()} == {"a", "b", "c"}
    fetched = machine.store.bytes_read
    machine.start("c", "a", "b")  # the order of the list means nothing
    machine.read_all()
    assert machine.store.bytes_read == fetched
    assert machine.places() == places


def test_a_start_parses_no_index_of_a_pack_that_lies_where_it_belongs(machine, monkeypatch):
    machine.start("a", "b")
    machine.fill()
    machine.stop()
    parsed = []
    real = NodeCache.index
    monkeypatch.setattr(NodeCache, "index", lambda self, pack_id: (parsed.append(pack_id), real(self, pack_id))[1])
    cache = open_cache([machine.base / "a", machine.base / "b"])
    with contextlib.closing(GroupWriter(cache)) as writer:
        assert set(writer.packs) == {pack.id for pack in machine.packs}
        assert all(writer.has(pack.id, 0) for pack in machine.packs)
        assert parsed == []


def test_a_list_that_changes_loses_nothing_but_what_lay_in_a_directory_taken_out(machine):
    machine.start("a", "b")
    machine.fill()
    before, fetched = machine.places(), machine.store.bytes_read
    machine.start("a", "b", "c", "d")  # what lies somewhere stays there, wherever it would belong now
    machine.read_all()
    assert (machine.places(), machine.store.bytes_read) == (before, fetched)
    away = machine.at("b")
    machine.start("a", "c")
    machine.read_all()
    assert machine.store.bytes_read - fetched == sum(len(pack.stored) for pack in away)
    until(lambda: all(len(machine.places()[pack.id]) == 2 for pack in away))
    fetched = machine.store.bytes_read
    machine.start("a", "b", "c")  # two copies of some by now: one counts
    machine.read_all()
    assert machine.store.bytes_read == fetched


def test_one_directory_alone_is_what_it_was_and_becomes_the_first_of_several(machine):
    alone = NodeCache(machine.base / "a")
    pack = machine.packs[0]
    alone.add_index(pack.id, pack.index.encode())
    with (
        contextlib.closing(CacheWriter(alone)) as writer,
        contextlib.closing(PackReader(machine.store, writer, readahead=0)) as reader,
    ):
        assert read(reader, pack.id, 0, MIB) == pack.content
        until(lambda: alone.is_complete(pack.id))
    fetched = machine.store.bytes_read
    machine.start("b", "c", "a")
    machine.read_all([pack])
    assert machine.store.bytes_read == fetched
    assert machine.cache.is_complete(pack.id)
    assert machine.cache.data_path(pack.id) == machine.base / "a" / "packs" / pack.id / "data"


def test_bounds_and_eviction_are_each_directorys_own(machine):
    machine.start("a", "b", size=3 * MIB)
    assert machine.cache.size == 6 * MIB
    for pack in machine.packs:
        put_all(machine.writer, pack)
    assert machine.writer.counters()["evicted_bytes"] > 0
    held = {Path(disk["path"]).name: disk["held_bytes"] for disk in machine.writer.disks()}
    assert all(0 < value <= 3 * MIB for value in held.values())
    for pack in machine.packs:
        room = machine.writer.room(pack.id)
        (name,) = machine.places()[pack.id] or [machine.cache.home(pack.id).root.name]
        assert (room.size, room.free) == (3 * MIB, 3 * MIB - held[name])
    both = machine.writer.room()
    assert (both.size, both.free) == (6 * MIB, 6 * MIB - sum(held.values()))


def test_a_share_holds_once_over_all_directories(machine):
    machine.start("a", "b")
    model = machine.packs[:8]
    machine.writer.shares.set("m", 3 * MIB, [pack.id for pack in model])
    for pack in [*machine.packs[8:], *model, *model]:
        put_all(machine.writer, pack)

    def held(packs):
        return sum(found.bits.held() for pack in packs if (found := machine.writer.packs.get(pack.id)) is not None)

    assert held(machine.packs[8:]) == 4 * MIB  # others are not touched for it
    assert 0 < held(model) <= 3 * MIB
    assert {machine.writer.room(pack.id).share for pack in model} == {"m"}


def test_what_comes_to_one_directory_of_a_full_share_takes_the_place_of_what_another_holds(machine):
    machine.start("a", "b")
    by_place = {name: [p for p in machine.packs if machine.cache.home(p.id).root.name == name] for name in ("a", "b")}
    first, second = by_place["a"][0], by_place["b"][0]
    machine.writer.shares.set("m", MIB, [first.id, second.id])
    put_all(machine.writer, first)
    assert machine.writer.pack(first.id).bits.held() == MIB

    def comes():
        put_all(machine.writer, second)  # nothing waits for a pack that is just being synced to make room
        return machine.writer.pack(second.id).bits.held() > 0

    until(comes)
    assert sum(machine.writer.pack(pack.id).bits.held() for pack in (first, second)) <= MIB


def test_a_models_share_takes_nothing_of_what_another_model_pins(machine):
    machine.start("a", "b")
    shared, own = machine.packs[:2]
    machine.writer.shares.set("ft", MIB, [shared.id, own.id])
    put_all(machine.writer, shared)
    until(lambda: machine.cache.is_complete(shared.id))
    pins = [f"{POLICY_PIN}{pin}" for pin in ("base@tree", "ft@of@tree", "ft@tree")]
    for pin in pins:  # for which whoever completed it has let go of it
        machine.cache.pin(shared.id, pin)
    for pin in pins[:2]:
        put_all(machine.writer, own)
        assert machine.writer.pack(shared.id).bits.is_full()  # although it is the oldest
        assert machine.writer.pack(own.id).bits.held() == 0
        machine.cache.unpin(shared.id, pin)

    put_all(machine.writer, own)
    assert machine.writer.pack(own.id).bits.is_full()
    assert machine.writer.pack(shared.id).bits.held() == 0  # the pin of its own does not count


def put_all(writer, pack):
    for number in range(MIB // FRAME):
        content = pack.content[number * FRAME : (number + 1) * FRAME]
        writer.put(pack.id, number, VerifiedFrame(content, pack.index.frames[number].digest))


def test_pins_are_with_the_pack_and_of_a_policy_over_all_directories(machine):
    machine.start("a", "b", size=5 * MIB)
    policy = Policy("m", pin=True)
    pins = PolicyPins(machine.cache, lambda _name: policy)
    packs = [pack.id for pack in machine.packs]
    assert pins.pin("m", {"tree": packs[:6]}) == ""
    assert "cannot keep" in pins.pin("n", {"other": packs[6:]})  # 12 MiB, of 10 MiB in all
    assert all(machine.cache.pins(pack) == {f"{POLICY_PIN}m@tree"} for pack in packs[:6])
    for pack in machine.packs[:6]:
        put_all(machine.writer, pack)
    machine.writer.evict(100 * MIB)
    assert all(machine.writer.pack(pack).bits.is_full() for pack in packs[:6])
    assert PolicyPins(machine.cache, lambda _name: policy).holds("tree")  # found again on the disks
    PolicyPins(machine.cache, lambda _name: None).keep_wanted()
    assert all(machine.cache.pins(pack) == set() for pack in packs)
    until(lambda: machine.writer.evict(100 * MIB) == 0)  # what is just being completed is passed over
    assert not any(machine.writer.pack(pack).bits.held() for pack in packs[:6])


@pytest.fixture
def real_disk(tmp_path, machine):
    """An ext4 at the directory b."""
    with slow_disk.ext4_disk(tmp_path / "loop") as place:
        (tmp_path / "b").symlink_to(place)
        yield place
        machine.stop()


def test_a_disk_that_turns_read_only_is_left_out_and_its_packs_come_from_the_store(machine, real_disk, caplog):
    machine.start("a", "b")
    machine.fill()
    lost = machine.at("b")
    assert lost
    fetched = machine.store.bytes_read
    (Path("/sys/fs/ext4") / slow_disk.device_of(real_disk).name / "trigger_fs_error").write_text("a test")
    machine.writer.evict(100 * MIB, Share("m", MIB, frozenset({lost[0].id})))  # is refused, and so tells
    until(lambda: machine.state("b") == "left out")
    until(lambda: "left out: Read-only file system; its packs are read from the store" in caplog.text)
    machine.read_all()
    assert machine.store.bytes_read - fetched == sum(len(pack.stored) for pack in lost)
    until(lambda: machine.at("a") + [p for p in lost if "a" in machine.places()[p.id]])
    until(lambda: all("a" in machine.places()[pack.id] for pack in lost))
    machine.read_all()
    assert machine.store.bytes_read - fetched == sum(len(pack.stored) for pack in lost)  # the other one has them now
    assert machine.writer.counters()["held_bytes"] >= 12 * MIB


def test_a_directory_that_vanishes_is_left_out_also_when_nobody_asks_for_it(machine, monkeypatch):
    monkeypatch.setattr(group_writer, "_LOOK", 0.05)
    machine.start("a", "b")
    machine.fill()
    until(
        lambda: all(machine.cache.is_complete(pack.id) for pack in machine.packs)
    )  # nothing is written there any more
    shutil.rmtree(machine.base / "b")
    until(lambda: machine.state("b") == "left out")
    machine.read_all()
    assert not (machine.base / "b").exists()
    assert machine.state("a") == "ok"


def test_a_disk_that_fails_to_read_and_write_is_left_out(machine, monkeypatch):
    machine.start("a", "b")
    machine.fill()
    write, lost = group_writer.write_all, machine.at("b")
    bad = (machine.base / "b").stat().st_ino

    def failing(fd, data, offset):
        if Path(f"/proc/self/fd/{fd}").readlink().parents[1].stat().st_ino == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        write(fd, data, offset)

    monkeypatch.setattr(group_writer, "write_all", failing)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "bad")))
        machine.read_all(lost[:1])
    until(lambda: machine.state("b") == "left out")
    assert machine.state("a") == "ok"
    machine.read_all()


def test_a_directory_that_is_called_left_out_has_no_packs_any_more(machine, monkeypatch):
    machine.start("a", "b")
    machine.fill()
    (root,) = [root for root in machine.cache.roots if root.name == "b"]
    assert any(pack.folder.is_relative_to(root) for pack in machine.writer.packs.values())
    leave_out = CacheGroup.leave_out

    def late(*args):
        time.sleep(0.1)
        leave_out(*args)

    monkeypatch.setattr(CacheGroup, "leave_out", late)
    root.rename(root.with_name("away"))
    machine.writer._troubled[root].set()
    until(lambda: machine.state("b") == "left out")
    assert not any(pack.folder.is_relative_to(root) for pack in machine.writer.packs.values())


def test_one_bad_read_leaves_no_directory_out(machine, monkeypatch):
    machine.start("a", "b")
    machine.fill()
    tried = []
    real = GroupWriter._try
    monkeypatch.setattr(
        GroupWriter, "_try", lambda self, root, *, write: (real(self, root, write=write), tried.append(root))
    )
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "bad")))
        machine.read_all(machine.packs[:1])
    until(lambda: tried)
    assert {disk["state"] for disk in machine.writer.disks()} == {"ok"}


def lose_indexes(machine, pack):
    """Take the pack's index from the two directories that have it; which they were."""
    machine.writer._copying.join()  # what copies indexes after a start would write into what is removed here
    holders = [root for root in machine.cache.roots if (root / "packs" / pack.id / "index").exists()]
    assert len(holders) == 2
    for root in holders:
        shutil.rmtree(root / "packs" / pack.id)
    return holders


def test_a_pack_whose_directories_are_all_lost_goes_to_another_one(machine):
    machine.start("a", "b", "c")
    pack = machine.packs[0]
    assert machine.writer.table(pack.id) is not None
    for root in lose_indexes(machine, pack):
        with machine.writer._lock:  # both before either copy is made anew
            machine.writer.cache.leave_out(root, "a test")
    (left,) = machine.cache.usable()
    put_all(machine.writer, pack)
    assert machine.writer.pack(pack.id).folder.is_relative_to(left.root)
    assert machine.writer.pack(pack.id).bits.is_full()
    assert left.index(pack.id) == pack.index


def test_an_index_that_is_on_no_disk_any_more_comes_from_the_store(machine):
    machine.start("a", "b", "c")
    pack, others = machine.packs[0], machine.packs[1:]
    machine.life.close()
    lose_indexes(machine, pack)
    machine.packs = others
    machine.start("a", "b", "c")
    assert machine.writer.table(pack.id) is None
    assert read(machine.reader, pack.id, 5, FRAME) == pack.content[5 : FRAME + 5]
    until(lambda: machine.writer.has(pack.id, 1))
    assert machine.cache.index(pack.id) == pack.index
    with pytest.raises(NotFoundError, match="neither on this node nor in"):
        read(machine.reader, "0" * 64, 0, 1)


def test_an_index_lies_in_two_directories_again_after_one_was_lost_or_came_empty(machine, monkeypatch):
    monkeypatch.setattr(group_writer, "_LOOK", 0.05)
    machine.start("a", "b", "c")

    def copies(pack):
        return len(list(machine.base.glob(f"*/packs/{pack.id}/index")))

    shutil.rmtree(machine.base / "b")
    until(lambda: machine.state("b") == "left out")
    until(lambda: all(copies(pack) == 2 for pack in machine.packs))
    machine.stop()
    shutil.rmtree(machine.base / "a")
    packs, machine.packs = machine.packs, []
    machine.start("a", "b", "c")
    until(lambda: all(copies(pack) == 2 for pack in packs))


def test_a_trial_that_a_sweep_removes_leaves_no_directory_out(machine, monkeypatch):
    machine.start("a", "b")
    write = group_writer.write_all

    def swept(fd, data, offset):
        write(fd, data, offset)
        Path(f"/proc/self/fd/{fd}").readlink().unlink()

    monkeypatch.setattr(group_writer, "write_all", swept)
    machine.writer._try(machine.base / "b", write=True)  # raises what leaves it out


def test_a_full_disk_keeps_what_it_has_and_new_packs_go_elsewhere(machine, disk):
    machine.start("a", "b")
    here = [pack for pack in machine.packs if machine.cache.home(pack.id).root == disk]
    machine.read_all(here[:1])
    until(lambda: machine.places()[here[0].id] == ["b"])
    with contextlib.suppress(OSError), (disk / "ballast").open("wb", 0) as file:
        while file.write(bytes(MIB)):
            pass
    machine.read_all()
    until(lambda: all("a" in machine.places()[pack.id] for pack in here[1:]))
    fetched = machine.store.bytes_read
    machine.read_all()
    assert machine.store.bytes_read == fetched
    assert machine.state("b") != "left out"


def test_a_full_disk_or_a_process_without_descriptors_leaves_no_directory_out(machine, disk, monkeypatch):
    machine.start("a", "b")
    machine.fill()
    machine.stop()
    cache = open_cache([machine.base / "a", machine.base / "b"])
    here, there = machine.at("b")[0], machine.at("a")[0]
    until(lambda: cache.is_complete(here.id))
    with contextlib.suppress(OSError), (disk / "ballast").open("wb", 0) as file:
        while file.write(bytes(PAGE)):
            pass
    cache.add_index(there.id, there.index.encode())  # whose copy would come to b
    assert not cache._out
    with pytest.raises(NoSpaceError):
        cache._at_home(here.id, refuse_full)
    assert cache.is_complete(here.id)
    tree = hexdigest(b"")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(OSError(errno.EMFILE, "too many open files")))
        assert cache.tree_path(tree) is None
    assert not cache._out


def refuse_full(_home):
    raise NoSpaceError("a test")


def test_pins_of_a_directory_that_cannot_be_read_are_absent(machine, monkeypatch):
    machine.start("a", "b")
    pack, real = machine.packs[0].id, os.listdir

    def failing(code):
        def listdir(path):
            if Path(path).is_relative_to(machine.base / "b") and Path(path).name == "pins":
                raise OSError(code, os.strerror(code))
            return real(path)

        return listdir

    machine.cache.members[0].pin(pack, "x")
    monkeypatch.setattr(os, "listdir", failing(errno.EMFILE))
    with pytest.raises(OSError, match="Too many open files"):  # nobody may take that for no pins
        machine.cache.pins(pack)
    monkeypatch.setattr(os, "listdir", failing(errno.EIO))
    assert machine.cache.pins(pack) == {"x"}
    assert machine.cache.usable() == [machine.cache.members[0]]


def test_one_that_cannot_be_used_at_the_start_is_left_out_unless_it_is_the_last(machine, tmp_path, caplog):
    (tmp_path / "file").write_text("no directory")
    machine.start("file", "a", "b")
    assert [disk["state"] for disk in machine.writer.disks()] == ["ok", "ok", "left out"]
    assert f"cache directory {tmp_path}/file is left out" in caplog.text
    machine.fill()
    with pytest.raises(DiskError):
        open_cache([tmp_path / "file"])
    with pytest.raises(DiskError):
        open_cache([tmp_path / "file", tmp_path / "file" / "below"])


@pytest.mark.parametrize("names", [["file"], ["file", "file/below"]])
def test_reads_need_no_directory_and_nothing_is_made_where_one_should_be(machine, tmp_path, names):
    (tmp_path / "file").write_text("no directory")
    roots = [tmp_path / name for name in names]
    with (
        contextlib.closing(open_writer(open_cache(roots, required=False))) as writer,
        contextlib.closing(PackReader(machine.store, writer, readahead=0)) as reader,
    ):
        machine.reader = reader
        machine.read_all()
        assert [(disk["path"], disk["state"]) for disk in writer.disks()] == [(str(r), "left out") for r in roots]
        assert not writer.room().is_plenty


def test_a_directory_that_another_process_writes_to_is_no_failure_to_pass_over(machine, tmp_path):
    cache = CacheGroup([NodeCache(tmp_path / "a"), NodeCache(tmp_path / "b")])
    with contextlib.closing(CacheWriter(NodeCache(tmp_path / "b"))), pytest.raises(BusyError):
        GroupWriter(cache)
    with contextlib.closing(GroupWriter(cache)):
        pass  # what was taken of the others was given back


def test_a_directory_named_twice_is_refused_and_one_disk_for_two_is_said_and_shared(machine, tmp_path, caplog):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(BadInputError, match="named twice"):
        open_cache([tmp_path / "a", tmp_path / "link"])
    cache = open_cache([tmp_path / "a", tmp_path / "b"], lambda total: (total, total))
    total = cache.members[0].min_free
    assert [(member.size, member.min_free) for member in cache.members] == [(total // 2, total)] * 2
    with caplog.at_level(logging.WARNING), contextlib.closing(GroupWriter(cache)):
        pass
    assert "lie on one disk" in caplog.text


def test_other_processes_go_on_without_a_directory_that_fails(machine, disk):
    machine.start("a", "b")
    machine.fill()
    machine.stop()
    lost, kept = machine.at("b")[0], machine.at("a")[0]
    cache = open_cache([machine.base / "a", machine.base / "b"])
    subprocess.run(["umount", "-l", disk], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", disk], check=True)
    assert cache.data_path(kept.id).parts[-4] == "a"
    assert cache.data_path(lost.id).parts[-4] == "a"  # empty: it is fetched again; its index had a copy
    assert not cache.is_complete(lost.id)
    cache.pin(lost.id, "x")
    assert cache.pins(lost.id) == {"x"}
    cache.unpin(lost.id, "x")
    tree = build_image(Node(stat.S_IFDIR | 0o755), {})
    assert cache.tree_path(hexdigest(tree)) is None
    assert cache.add_tree(hexdigest(tree), tree) == cache.tree_path(hexdigest(tree))
    with pytest.raises(NotFoundError):
        cache.data_path("0" * 64)
