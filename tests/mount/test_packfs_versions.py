"""Versions of Floe that take over from each other in place, and state that another version left, under readers."""

import contextlib
import hashlib
import os

import pytest
from support.installed import Installed
from support.packfs import LIMIT, Packfs, holds_fuse, wait_for

from floe.fuse import descriptors, slots
from floe.store.errors import UnavailableError

MIB = 1 << 20
# What makes a copy of Floe one from before the watchdog: it says nothing of itself in the slots, and looks at nothing there.
BEFORE = {
    "fuse/slots.py": "\nSlots.begin = lambda self, patience: None\nSlots.set_mark = lambda self, index, mark: None\n",
    "fuse/watchdog.py": "\nWatchdog.look = lambda self: None\nWatchdog.ended = lambda self, code, *, silent: None\n",
}


@pytest.fixture
def packfs(tmp_path):
    fs = Packfs(tmp_path)
    yield fs
    fs.close()


def wait_version(packfs, version):
    def found():
        with contextlib.suppress(UnavailableError):
            return packfs.client.status()["version"] == version
        return False

    wait_for(found, f"a worker of version {version}")


def new_keeper(packfs, old, installed):
    old.kill()
    old.wait(LIMIT)
    keeper = packfs.spawn_keeper(env=installed.environ)
    packfs.wait_ready(keeper)
    return keeper


@pytest.mark.slow
@pytest.mark.parametrize("up", [True, False])
def test_versions_take_over_from_each_other_while_it_is_read(packfs, tmp_path, up):
    installed = Installed(tmp_path)
    first, second = ("1.0", "2.0") if up else ("2.0", "1.0")
    changes = {"1.0": BEFORE, "2.0": {}}
    slow, waiting = packfs.add_pack(24 * MIB, slow=True), packfs.add_pack(4096, seed=2, shut=True)
    installed.install(first, changes[first])
    keeper = packfs.spawn_keeper(env=installed.environ)
    packfs.wait_ready(keeper)
    readers = [packfs.reader(waiting)]
    packfs.wait_inflight(waiting, 1)
    data = (packfs.packs_dir / slow).read_bytes()

    def change_worker(version):
        readers.append(packfs.reader(slow, length=len(data), digest=True))
        packfs.wait_inflight(slow, 1)
        packfs.kill_worker()
        wait_version(packfs, version)

    wait_version(packfs, first)
    installed.install(second, changes[second])
    change_worker(second)  # the old keeper starts a new worker
    packfs.wait_inflight(waiting, 1)
    keeper = new_keeper(packfs, keeper, installed)  # which adopts that one
    installed.install(f"{first}.1", changes[first])
    change_worker(f"{first}.1")  # the new keeper starts an old worker
    installed.install(f"{second}.1", changes[second])
    keeper = new_keeper(packfs, keeper, installed)  # which adopts an old one
    change_worker(f"{second}.1")
    packfs.wait_inflight(waiting, 1)
    packfs.open_gate(waiting)
    outputs = [reader.communicate(timeout=LIMIT) for reader in readers]
    assert [reader.returncode for reader in readers] == [0] * 4, outputs
    assert outputs[0][0] == (packfs.packs_dir / waiting).read_bytes()
    assert {out for out, _ in outputs[1:]} == {hashlib.sha256(data).hexdigest().encode()}
    assert packfs.client.status()["workers"] == 4
    log = packfs.log.read_text()
    assert "killing" not in log
    assert "mounting anew" not in log


def test_the_slots_of_a_form_that_is_not_known_are_left_alone(packfs):
    pack = packfs.add_pack(4096)
    first = packfs.start()
    worker = packfs.pid_in("worker.pid")
    held = descriptors.take_from(worker, descriptors.mounted_device(packfs.run_dir))
    with (packfs.mountpoint / pack).open("rb", buffering=0) as file:
        os.pwrite(held.slots, b"FLOESLO9", 0)
        first.kill()
        first.wait(LIMIT)
        second = packfs.spawn_keeper()
        assert second.wait(LIMIT) == 1
        assert "in the form of another Floe, FLOESLO9; start that version again" in packfs.log.read_text()
        assert packfs.pid_in("keeper.pid") == first.pid
        assert file.read(4096) == (packfs.packs_dir / pack).read_bytes()  # the other version's worker serves on
        os.pwrite(held.slots, b"FLOESLOT", 0)
        os.close(held.fuse)
        os.close(held.slots)
        third = packfs.start()
        assert holds_fuse(third.pid)
        assert packfs.pid_in("worker.pid") == worker


def test_slots_as_the_version_before_left_them_are_taken_over(packfs):
    """Their first 16 KiB said nothing after byte 64."""
    pack = packfs.add_pack(4096, shut=True)
    packfs.start()
    reader = packfs.reader(pack)
    packfs.wait_inflight(pack, 1)
    held = descriptors.take_from(packfs.pid_in("worker.pid"), descriptors.mounted_device(packfs.run_dir))
    os.pwrite(held.slots, bytes(slots.SLOT - 64), 64)
    packfs.kill_worker()
    packfs.wait_inflight(pack, 1)
    assert slots.vitals(held.slots)[0] == packfs.pid_in("worker.pid")
    packfs.open_gate(pack)
    assert reader.communicate(timeout=LIMIT)[0] == (packfs.packs_dir / pack).read_bytes()
    os.close(held.fuse)
    os.close(held.slots)
