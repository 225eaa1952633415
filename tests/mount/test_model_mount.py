"""Models at a directory of the user's, and the pack filesystem that is started and stopped for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from support.mounts import content_of, entry_at, until

from floe.mount.modelmount import ModelMount, model_mounts, mount_model, umount_model
from floe.mount.mounter import MountState
from floe.mount.mountinfo import read_mounts
from floe.store.errors import BadInputError, BusyError, DamagedError, NotFoundError, UnavailableError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


class Models:
    """`mount` and `umount` as the command line calls them, with a pack filesystem that is counted."""

    def __init__(self, node):
        self.node = node
        self.mounter = node.mounter()
        self.started = self.stopped = 0

    def start(self):
        self.started += 1
        self.server = self.node.serve()

    def stop(self):
        self.stopped += 1
        self.server.kill()
        subprocess.run(["umount", self.server.mountpoint], check=True)
        (self.node.run / "packfs.sock").unlink()

    def mount(self, tree, place) -> ModelMount:
        return mount_model(tree, place, self.mounter, model="m:1", start_packfs=self.start, stop_packfs=self.stop)

    def umount(self, place) -> bool:
        return umount_model(place, self.mounter, stop_packfs=self.stop)


@pytest.fixture
def models(node):
    return Models(node)


def test_a_whole_model_needs_no_packfs(models, node, tmp_path):
    tree = node.tree()
    place = tmp_path / "model"
    place.mkdir()
    mounted = models.mount(tree, place)
    assert (place / "file0").read_bytes() == content_of("tree", 0, 1 << 20)
    assert {"ro", "nosuid", "nodev"} <= entry_at(place).options
    assert model_mounts(models.mounter) == [mounted]
    assert (mounted.mountpoint, mounted.tree, mounted.model) == (str(place), tree.digest, "m:1")
    assert not models.umount(place)
    assert (models.started, models.stopped) == (0, 0)
    assert place.exists()
    assert model_mounts(models.mounter) == []
    assert models.mounter.check(tree.digest) is MountState.MISSING
    assert not [entry for entry in read_mounts() if entry.target.startswith(str(node.root))]


def test_packfs_is_started_when_needed_and_stopped_with_the_last_model(models, node, tmp_path):
    first, second = node.tree("first", complete=False), node.tree("second", complete=False)
    places = [tmp_path / "a", tmp_path / "b"]
    models.mount(first, places[0])  # the directory is made
    models.mount(second, places[1])
    assert models.started == 1
    assert (places[1] / "file0").read_bytes() == content_of("second", 0, 1 << 20)
    assert not models.umount(places[0])  # the other model takes over
    assert not places[0].exists()
    assert models.stopped == 0
    assert models.umount(places[1])
    assert models.stopped == 1


def test_a_packfs_that_ran_before_is_not_stopped(models, node, tmp_path):
    node.serve()
    models.mount(node.tree(complete=False), tmp_path / "a")
    assert not models.umount(tmp_path / "a")
    assert (models.started, models.stopped) == (0, 0)


def test_a_packfs_that_is_being_replaced_is_waited_for_and_a_dead_one_is_not(models, node, tmp_path):
    server = node.serve()
    server.silence()
    back = threading.Timer(2.5, server.process.send_signal, (signal.SIGCONT,))  # a ping is given up after 2 s
    back.start()
    models.mount(node.tree("first", complete=False), tmp_path / "a")
    back.join()
    assert models.started == 0
    assert (tmp_path / "a" / "file0").read_bytes() == content_of("first", 0, 1 << 20)
    assert not models.umount(tmp_path / "a")
    server.kill()
    models.mount(node.tree("second", complete=False), tmp_path / "b")
    assert models.started == 1
    assert models.umount(tmp_path / "b")


def test_packfs_is_left_running_for_a_container(models, node, tmp_path):
    tree, layer = node.tree(complete=False), node.tree("layer", complete=False)
    models.mount(tree, tmp_path / "a")
    models.mounter.mount(layer, "snapshot-1")
    assert not models.umount(tmp_path / "a")
    assert models.stopped == 0


def test_one_model_at_two_places_is_one_superblock(models, node, tmp_path):
    tree = node.tree()
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        models.mount(tree, place)
    assert len({place.stat().st_dev for place in places}) == 1
    for place in places:
        models.umount(place)
    assert models.mounter.check(tree.digest) is MountState.MISSING


def test_where_a_model_cannot_be_mounted(models, node, tmp_path):
    tree = node.tree()
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").touch()
    with pytest.raises(BadInputError, match="not empty"):
        models.mount(tree, full)
    with pytest.raises(BadInputError, match="Not a directory"):
        models.mount(tree, full / "mine")
    with pytest.raises(BadInputError, match="cannot be made"):
        models.mount(tree, tmp_path / "no" / "such")
    models.mount(tree, tmp_path / "a")
    with pytest.raises(BusyError, match="mountpoint already") as error:
        models.mount(tree, tmp_path / "a")
    assert "floe umount" in error.value.hint
    assert len(model_mounts(models.mounter)) == 1


def test_a_failed_mount_leaves_nothing_and_stops_what_it_started(models, node, tmp_path):
    tree = node.tree(complete=False)
    image = bytearray(tree.image.read_bytes())
    image[1024:1028] = b"none"
    tree.image.write_bytes(image)
    with pytest.raises(DamagedError):
        models.mount(tree, tmp_path / "a")
    assert (models.started, models.stopped) == (1, 1)
    assert not (tmp_path / "a").exists()
    assert model_mounts(models.mounter) == []
    assert models.mounter.uses(tree.digest) == set()


def test_a_packfs_that_does_not_start_is_the_error(models, node, tmp_path, monkeypatch):
    def fail():
        raise UnavailableError("the pack filesystem did not start")

    monkeypatch.setattr(models, "start", fail)
    with pytest.raises(UnavailableError, match="did not start"):
        models.mount(node.tree(complete=False), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert models.stopped == 0


def test_the_last_unmount_clears_up_what_a_killed_command_left(models, node, tmp_path):
    tree, kept, lost = node.tree(), node.tree("kept"), node.tree("lost")
    models.mount(tree, tmp_path / "a")
    models.mount(kept, tmp_path / "b")
    node.mounter().pins.take(lost)  # and killed before the mount
    models.umount(tmp_path / "a")
    assert node.cache.pins(lost.packs[0].id)  # another model is mounted: nothing waits for a sweep
    models.umount(tmp_path / "b")
    assert [node.cache.pins(each.packs[0].id) for each in (tree, kept, lost)] == [set()] * 3


def test_unmounting_what_floe_did_not_mount(models, tmp_path):
    with pytest.raises(NotFoundError, match="no model is mounted") as error:
        models.umount(tmp_path / "a")
    assert error.value.hint
    place = tmp_path / "b"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)
    with pytest.raises(NotFoundError):
        models.umount(place)
    assert entry_at(place) is not None


@pytest.mark.parametrize(
    "program",
    [
        "f = open('{}/file0')",
        "import os; os.chdir('{}')",
        "import mmap, os; f = os.open('{}/file0', 0); m = mmap.mmap(f, 0, prot=1); os.close(f)",
    ],
    ids=["open file", "working directory", "mapped file"],
)
def test_a_busy_model_names_who_uses_it(models, node, tmp_path, program):
    place = tmp_path / "a"
    models.mount(node.tree(), place)
    code = program.format(place) + "; print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        user.stdout.readline()
        with pytest.raises(BusyError) as error:
            models.umount(place)
        assert f"(pid {user.pid})" in error.value.hint
        assert (place / "file0").exists()
        assert len(model_mounts(models.mounter)) == 1
        user.communicate(b"\n")
    models.umount(place)
    assert not place.exists()


def test_unmounting_with_reads_in_flight_is_refused_at_once(models, node, tmp_path):
    tree = node.tree(complete=False)
    place = tmp_path / "a"
    models.mount(tree, place)
    server = models.server
    server.hold()
    with subprocess.Popen(["cat", place / "file0"], stdout=subprocess.DEVNULL) as cat:
        until(lambda: server.client.inflight([tree.packs[0].id]))
        cat.kill()
        cat.wait(20)
        start = time.monotonic()
        with pytest.raises(BusyError, match="in flight"):
            models.umount(place)
        assert time.monotonic() - start < 8  # the deadline is ten
    assert entry_at(place) is not None
    server.go()
    until(lambda: not server.client.inflight([tree.packs[0].id]))
    assert models.umount(place)


def test_an_unmount_that_was_cut_off_can_be_done_again(models, node, tmp_path):
    tree = node.tree()
    place = tmp_path / "a"
    models.mount(tree, place)
    subprocess.run(["umount", place], check=True)
    models.umount(place)
    assert models.mounter.check(tree.digest) is MountState.MISSING
    assert model_mounts(models.mounter) == []
