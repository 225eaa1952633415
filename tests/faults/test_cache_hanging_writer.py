"""A cache whose last writer was killed but hangs in the kernel, with one last change on its way."""

import contextlib
import os
import subprocess
import sys
import threading

import pytest
from support.packs import make_pack, random_content
from support.stuck_folder import StuckFolder
from test_cache_faults import PROCESS, add, eventually, frame_of, in_cache, opened, put_all, trusted

from floe.store import process
from floe.store.cache import CacheWriter, NodeCache, durable, ownership
from floe.store.errors import BusyError, UnavailableError

MIB = 1 << 20
FRAME = 128 << 10

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="what hangs is a mount")


@pytest.fixture(autouse=True)
def _shorter_wait(monkeypatch):
    monkeypatch.setattr(ownership, "_DYING", 0.5)


@pytest.fixture
def hang(cache, stack, tmp_path):
    """Has a writer put frames of `pack`, then be killed with a thread in the kernel: (its process, what it hangs in)."""

    def run(pack, count):
        stuck = StuckFolder(tmp_path / "stuck")
        stack.callback(stuck.let_go)
        (tmp_path / "content").write_bytes(pack.content)
        command = [sys.executable, str(PROCESS), str(cache.root), str(tmp_path / "content"), pack.id]
        command += [str(count), f"{stuck.path}/x"]
        child = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        stack.callback(stuck.let_go)
        for line in child.stdout:
            if int(line) == count - 1:
                break
        assert stuck.asked.wait(20)
        if count == len(pack.index.frames):
            eventually(lambda: cache.is_complete(pack.id))
        child.kill()
        eventually(lambda: process.is_doomed(child.pid))
        return child, stuck

    return run


def test_its_last_change_reaches_no_frame_of_its_successor(cache, stack, hang):
    pack = make_pack(random_content(MIB, 1), FRAME)
    add(cache, pack)
    folder = cache.folder(pack.id)
    cache.pin(pack.id, "someone")
    child, stuck = hang(pack, 7)
    data, bitmap = (os.open(folder / name, os.O_RDWR) for name in ("data", "bitmap"))
    stack.callback(os.close, data)
    stack.callback(os.close, bitmap)
    all_bits = (folder / "bitmap").read_bytes()

    writer = CacheWriter(cache, wait=5)
    assert process.is_doomed(child.pid)
    assert trusted(writer, pack) == []
    assert cache.pins(pack.id) == {"someone"}
    for number in (0, 1):
        assert writer.put(pack.id, number, frame_of(pack, number))
    durable.punch(data, 0, MIB)  # what hangs may come about now
    os.pwrite(bitmap, all_bits, 0)
    assert in_cache(writer, pack, 0) == pack.content[:FRAME]
    writer.close()
    writer = opened(stack, cache)
    assert trusted(writer, pack) == [0, 1]
    assert in_cache(writer, pack, 1) == pack.content[FRAME : 2 * FRAME]

    left = [path for path in cache.packs.iterdir() if path.name != pack.id]
    assert [path.name for path in left] == [f"{pack.id}.left-{child.pid}"]
    stuck.let_go()
    child.wait(20)
    eventually(lambda: not left[0].exists())


def test_a_complete_pack_is_kept(cache, stack, hang):
    pack = make_pack(random_content(MIB, 2), FRAME)
    add(cache, pack)
    hang(pack, 8)
    writer = opened(stack, cache, wait=5)
    assert trusted(writer, pack) == list(range(8))
    assert cache.is_complete(pack.id)


def test_a_successor_that_fails_half_way_leaves_the_rest_to_the_next(cache, stack, hang, monkeypatch):
    pack = make_pack(random_content(MIB, 3), FRAME)
    add(cache, pack)
    hang(pack, 7)
    with monkeypatch.context() as patch:
        patch.setattr(NodeCache, "pins", lambda *_: (_ for _ in ()).throw(OSError(5, "odd")))
        with pytest.raises(UnavailableError):
            CacheWriter(cache, wait=5)
    writer = opened(stack, cache, wait=5)
    assert trusted(writer, pack) == []
    put_all(writer, pack)


def test_one_that_is_only_slow_to_end_is_waited_for(cache, stack, monkeypatch):
    writer = CacheWriter(cache)
    monkeypatch.setattr(process, "is_doomed", lambda pid: pid == os.getpid())
    threading.Timer(0.2, writer.close).start()
    assert opened(stack, cache, wait=0).packs == {}
    assert [path.name for path in cache.packs.iterdir()] == []


def test_one_that_lives_is_refused_by_its_number(cache, stack):
    opened(stack, cache)
    with pytest.raises(BusyError, match=str(os.getpid())):
        ownership.own(cache.root / "writer.lock", 0.1)


def test_who_waits_for_a_pack_follows_it_to_its_new_folder(cache, stack):
    pack = make_pack(random_content(MIB, 4), FRAME)
    add(cache, pack)
    with contextlib.ExitStack() as held:
        held.enter_context(cache.locked(pack.id))
        pinning = threading.Thread(target=cache.pin, args=(pack.id, "late"))
        pinning.start()
        cache.folder(pack.id).rename(cache.packs / f"{pack.id}.left-1")
        add(cache, pack)
        pinning.join(10)
        assert not pinning.is_alive()
    assert cache.pins(pack.id) == {"late"}


def test_of_two_that_would_follow_one_does(cache, stack, hang):
    packs = [make_pack(random_content(MIB, seed), FRAME) for seed in (5, 6)]
    add(cache, *packs)
    (cache.folder(packs[1].id) / "bitmap").write_bytes(b"")
    (cache.folder(packs[1].id) / "index").unlink()  # which is no reason not to start
    hang(packs[0], 7)
    owners, refused = [], []

    def follow():
        try:
            owners.append(ownership.own(cache.root / "writer.lock", 3))
        except BusyError:
            refused.append(1)

    threads = [threading.Thread(target=follow) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (len(owners), len(refused)) == (1, 3)
    ownership.leave_packs(cache, owners[0])
    assert len([path for path in cache.packs.iterdir() if ".left-" in path.name]) == 2
    ownership.release(owners[0].fd)
