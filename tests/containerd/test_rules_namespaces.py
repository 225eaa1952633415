"""User namespaces, with containerd's capability `remap-ids` and without; against the snapshotter's own socket."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.snapshots import REF, Node, Status, mounted, status

from floe.mount.mountinfo import mount_at, read_mounts
from floe.mount.runner import MountRunner
from floe.snapshotter.idmaps import Clones
from floe.snapshotter.mounts import GID_MAPPING, UID_MAPPING
from floe.store.errors import BusyError, DeadlineError, UnavailableError

CHAIN = "sha256:" + "a" * 64
MAPPING = {UID_MAPPING: "0:100000:65536", GID_MAPPING: "0:200000:65536"}


@pytest.fixture
def node(tmp_path):
    node = Node(tmp_path / "n")
    yield node
    node.stop()
    for entry in reversed(read_mounts()):
        if entry.target.startswith(f"{tmp_path}/"):
            subprocess.run(["umount", "-l", entry.target], check=True)


def lazy(node):
    """A lazy layer in a file system of its own, as a tree is; the snapshot's name."""
    disk(node, "one")
    node.layers.trees["tree"] = node.base / "disk-one"
    node.layers.chains[CHAIN] = "tree"
    assert status(node.client.prepare, "extract", "", {REF: CHAIN}) is Status.ALREADY_EXISTS
    return node.client.list()[0].name


def disk(node, text):
    folder = node.base / f"disk-{text}"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], check=True)
    (folder / "file").write_text(text)
    return folder


def remap(node, image, mapping=MAPPING, prefix=("", "")):
    """What containerd does before the Prepare when the snapshotter has no `remap-ids`; the snapshot to go above."""
    copy = f"{image.split('/')[-1]}-100000-200000"
    with mounted(node.client.prepare(f"{prefix[0]}{copy}-remap", image), node.base) as root:
        for path in (root, *root.rglob("*")):
            os.chown(path, path.stat().st_uid + 100000, path.stat().st_gid + 200000, follow_symlinks=False)
    node.client.commit(f"{prefix[1]}{copy}", f"{prefix[0]}{copy}-remap")
    return f"{prefix[1]}{copy}"


def options(mounts):
    return [option for mount in mounts for option in mount.options]


@pytest.mark.parametrize("prefix", [("", ""), ("k8s.io/12/", "k8s.io/13/")])
@pytest.mark.parametrize("kind", ["ordinary", "lazy"])
def test_what_containerd_chowned_is_not_mapped_again(node, kind, prefix):
    image = lazy(node) if kind == "lazy" else node.layer("image", files={"file": "one"})
    above = remap(node, image, prefix=prefix)
    for call in (node.client.prepare, node.client.view):
        key = call.__name__
        mounts = call(key, above, MAPPING)
        assert not [option for option in options(mounts) if option.startswith(("uidmap", "gidmap"))]
        assert node.client.mounts(key) == mounts
        with mounted(mounts, node.base) as root:
            found = (root / "file").stat()
            assert (found.st_uid, found.st_gid) == (100000, 200000)
    upper = node.upper(node.client.mounts("prepare")).stat()
    assert (upper.st_uid, upper.st_gid) == (100000, 200000)
    assert not [mount for mount in read_mounts() if Path(mount.target).parent.name == "l"]
    # And after a restart.
    node.restart()
    assert not [option for option in options(node.client.mounts("prepare")) if option.startswith("uidmap")]


def test_with_remap_ids_the_same_image_is_mapped(node):
    image = node.layer("image", files={"file": "one"})
    remap(node, image)
    mounts = node.client.prepare("k", image, MAPPING)
    assert options(mounts)[:2] == ["uidmap=0:100000:65536", "gidmap=0:200000:65536"]


@pytest.mark.parametrize(("key", "name"), [("x-remap", "y"), ("x", "z"), ("a/1/x-remap", "a/2/y/x")])
def test_another_commit_is_no_remapped_copy(node, key, name):
    node.client.prepare(key, "")
    node.client.commit(name, key)
    assert options(node.client.prepare("k", name, MAPPING))[0].startswith("uidmap=")


def test_clones_of_a_tree_that_was_replaced_are_replaced(node):
    image = lazy(node)
    ordinary = node.client.prepare("extract 2", image)
    with mounted(ordinary, node.base) as root:
        (root / "own").write_text("own")
    node.client.commit("top", "extract 2")
    before = node.client.prepare("k", "top", MAPPING)
    clones = [mount_at(target, read_mounts()) for target in lowers(before)]
    with mounted(before, node.base) as root:
        assert (root / "file").read_text() == "one"
        # The tree dies and is mounted anew, while a container holds the old one.
        node.layers.trees["tree"] = disk(node, "two")
        node.layers.sick.add("tree")
        node.snapshotter.lazy._present.clear()
        after = node.client.mounts("k")
        assert after == before
        with mounted(after, node.base) as again:
            assert (again / "file").read_text() == "two"
            assert (again / "file").stat().st_uid == 100000
            assert (again / "own").read_text() == "own"
        assert (root / "file").read_text() == "one"
    # Of the two only the one below which something changed.
    now = [mount_at(target, read_mounts()) for target in lowers(after)]
    assert [one == two for one, two in zip(clones, now, strict=True)] == [True, False]
    node.layers.sick.clear()
    node.client.mounts("k")
    assert [mount_at(target, read_mounts()) for target in lowers(after)] == now
    node.client.remove("k")
    node.client.cleanup()
    assert [mount_at(target, read_mounts()) for target in lowers(after)] == [None, None]


def lowers(mounts):
    (option,) = (option for option in options(mounts) if option.startswith("lowerdir="))
    return option.removeprefix("lowerdir=").split(":")


def test_clones_are_made_by_a_process_that_may_hang(tmp_path):
    clones = Clones(tmp_path)
    (tmp_path / "lower").mkdir()
    hung = (sys.executable, "-S", "-c", "import signal; signal.pause()")
    clones._runner = MountRunner(0.3, tmp_path / "stuck", hung)
    with pytest.raises(DeadlineError):
        clones.have([tmp_path / "lower"], tmp_path / "l", "0:1000:10", "0:1000:10")


def test_clones_that_cannot_be_made_or_removed(tmp_path):
    clones = Clones(tmp_path)
    (tmp_path / "lower").mkdir()
    with pytest.raises(UnavailableError, match="user namespace"):
        clones.have([tmp_path / "lower"], tmp_path / "l", "0:1000:10,0:2000:10", "0:1000:10")
    (clone,) = clones.have([tmp_path / "lower"], tmp_path / "l", "0:1000:10,20:3000:5", "0:2000:10")
    assert (clone.stat().st_uid, clone.stat().st_gid) == (1000, 2000)
    sleeper = subprocess.Popen(["sleep", "60"], cwd=clone)
    with pytest.raises(BusyError, match=str(clone)):
        clones.drop(tmp_path / "l")
    sleeper.send_signal(signal.SIGKILL)
    sleeper.wait()
    clones.drop(tmp_path / "l")
    assert mount_at(str(clone), read_mounts()) is None
    clones.drop(tmp_path / "l")
