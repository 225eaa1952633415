"""Request slots: what a dead worker leaves, and that two live ones never share."""

import os
import struct
import subprocess
import sys

import pytest

from floe.fuse import slots
from floe.fuse.known import KnownPacks, NodeCollisionError
from floe.fuse.slots import COUNT, SLOT, Slots
from floe.store.errors import BusyError

DEVICE = (0, 77)
REQUEST = struct.pack("<IIQ", 80, 15, 6)


@pytest.fixture
def memfd():
    fd = slots.create(DEVICE)
    yield fd
    os.close(fd)


def leave(fd, script):
    code = f"from floe.fuse.slots import Slots\ns = Slots({fd})\n{script}"
    subprocess.run([sys.executable, "-c", code], pass_fds=[fd], check=True, timeout=30)


def test_new_slots_are_empty_sparse_and_know_their_mount(memfd):
    assert slots.device_of(memfd) == DEVICE
    assert slots.owner_of(memfd) is None
    mine = Slots(memfd)
    assert (mine.left, mine.counters, mine.initialized) == ([], (1, 0, 0), False)
    assert mine.take() == 0
    assert os.fstat(memfd).st_blocks * 512 <= 2 * SLOT
    mine.close()


def test_what_a_dead_worker_left_is_found_and_what_it_answered_is_not(memfd):
    leave(
        memfd,
        f"for n in range(3): s.view(s.take())[:16] = {REQUEST!r}\ns.release(1); s.clear(2); s.set_initialized()",
    )
    mine = Slots(memfd)
    assert mine.left == [0]
    assert bytes(mine.view(0)[:16]) == REQUEST
    assert mine.counters == (2, 1, 1)
    assert mine.initialized
    assert mine.take() == 1
    mine.release(0)
    assert mine.take() == 0
    mine.close()


def test_the_last_slot_can_be_left_too(memfd):
    os.pwrite(memfd, REQUEST, SLOT * COUNT)
    mine = Slots(memfd)
    assert mine.left == [COUNT - 1]
    for _ in range(COUNT - 1):
        mine.take()
    with pytest.raises(IndexError):
        mine.take()
    mine.close()


def test_a_second_live_worker_is_refused(memfd):
    code = f"import sys\nfrom floe.fuse.slots import Slots\ns=Slots({memfd})\nprint('up',flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], pass_fds=[memfd], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"up\n"
        assert slots.owner_of(memfd) == other.pid
        with pytest.raises(BusyError, match=str(other.pid)):
            Slots(memfd, wait=0.1)
        other.stdin.close()
    Slots(memfd, wait=5).close()


def test_a_file_that_is_no_slots_is_recognised(tmp_path):
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    assert slots.device_of(fd) is None
    os.ftruncate(fd, SLOT * (COUNT + 1))
    assert slots.device_of(fd) is None
    os.close(fd)


def test_known_packs_survive_a_torn_line(tmp_path):
    first, second = "a" * 64, "b" * 64
    known = KnownPacks(tmp_path)
    known.add(first, 4096)
    known.close()
    with (tmp_path / "packs.known").open("a") as file:
        file.write("c" * 40)
    known = KnownPacks(tmp_path)
    node = known.add(second, 8192)
    known.close()
    known = KnownPacks(tmp_path)
    assert len(known) == 2
    assert known.get(node) == (second, 8192)
    for bad in ("a" * 16 + "0" * 48, "0" * 64, "0" * 15 + "1" + "f" * 48):
        with pytest.raises(NodeCollisionError):
            known.add(bad, 4096)
    known.close()
