"""Promises of docs/SEMANTICS.md that no other test holds, on a model mounted by the command."""

import errno
import mmap
import os
import shutil
import signal
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.floe_node import Node, wait_until

MIB = 1 << 20
SECOND = 10**9


@pytest.fixture
def node(tmp_path):
    made = Node(tmp_path)
    yield made
    made.clean_up()


@contextmanager
def mounted(node, directory):
    """The model in `directory`, mounted: its mountpoint, and what `floe model show` says of it."""
    node.floe("model", "push", directory, "iris")
    target = node.home / "mnt"
    node.floe("model", "mount", "iris", target)
    yield target, node.json("model", "show", "iris")
    node.floe("umount", target)
    wait_until(lambda: not node.processes())


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "m"
    (folder / "sub").mkdir(parents=True)
    (folder / "weights").write_bytes(os.urandom(6 * MIB))
    (folder / "one").write_bytes(b"hello")
    os.link(folder / "one", folder / "sub" / "two")
    (folder / "one").chmod(0o4750)
    os.chown(folder / "one", 77, 78)
    os.setxattr(folder / "one", "user.kept", b"1")
    os.utime(folder / "one", ns=(9 * SECOND, 7 * SECOND))
    (folder / "link").symlink_to("one")
    with (folder / "sparse").open("wb") as file:
        file.truncate(32 * MIB)
        file.write(b"start")
        file.seek(30 * MIB)
        file.write(b"end")
    return folder


def refused(number, action):
    with pytest.raises(OSError, match=r".") as caught:
        action()
    assert caught.value.errno == number, caught.value


def test_a_model_cannot_be_changed(node, model):
    with mounted(node, model) as (target, _):
        for action in (
            lambda: (target / "one").open("r+b"),
            (target / "new").touch,
            (target / "new").mkdir,
            (target / "one").unlink,
            lambda: (target / "one").rename(target / "else"),
            lambda: (target / "one").chmod(0o600),
            lambda: os.chown(target / "one", 1, 1),
            lambda: os.utime(target / "one"),
            lambda: os.truncate(target / "one", 0),
            lambda: os.setxattr(target / "one", "user.new", b""),
            lambda: os.link(target / "one", target / "else"),
        ):
            refused(errno.EROFS, action)
        flags = os.statvfs(target).f_flag
        assert flags & os.ST_RDONLY
        assert flags & os.ST_NOSUID
        assert flags & os.ST_NODEV


def test_what_a_mounted_model_shows(node, model):
    with mounted(node, model) as (target, _):
        one, two = (target / "one").stat(), (target / "sub" / "two").stat()
        assert (one.st_ino, one.st_nlink, two.st_ino) == (two.st_ino, 2, one.st_ino)
        assert (stat.S_IMODE(one.st_mode), one.st_uid, one.st_gid) == (0o754, 0, 0)
        assert one.st_mtime_ns == 7 * SECOND + 1
        assert one.st_atime_ns == one.st_ctime_ns == one.st_mtime_ns
        assert (target / "one").read_bytes() == b"hello"
        assert (target / "one").stat() == one
        assert os.listxattr(target / "one") == ["user.kept"]
        assert (target / "link").readlink() == Path("one")
        with (target / "one").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[:] == b"hello"
        assert (target / "sparse").read_bytes() == (model / "sparse").read_bytes()
        with (target / "sparse").open("rb") as file:
            # A hole is a whole chunk of 4 MiB.
            assert os.lseek(file.fileno(), 5, os.SEEK_HOLE) == 4 * MIB
            assert os.lseek(file.fileno(), 4 * MIB, os.SEEK_DATA) == 28 * MIB


def test_names_and_attributes_need_no_store(node, model):
    with mounted(node, model) as (target, _):
        node.store.rename(node.home / "away")
        names = {str(path.relative_to(target)) for path in target.rglob("*")}
        assert names == {"weights", "one", "link", "sparse", "sub", "sub/two"}
        assert (target / "weights").stat().st_size == 6 * MIB
        with (target / "weights").open("rb"):
            pass
        (node.home / "away").rename(node.store)


def test_content_that_cannot_be_had_is_eio_until_it_can(node, model):
    node.environ["FLOE_READ_DEADLINE"] = "1"
    with mounted(node, model) as (target, shown):
        packs = {pack["id"]: next((node.store / "packs").rglob(pack["id"])) for pack in shown["packs"]}
        away = node.home / "away"
        shutil.copytree(node.store / "packs", away)
        for path in packs.values():
            path.unlink()
        refused(errno.EIO, (target / "weights").read_bytes)
        for name in packs:  # below the tree the error keeps its kind
            refused(errno.ENOENT, (node.run_dir / "packs" / name).read_bytes)
        assert (target / "weights").stat().st_size == 6 * MIB
        for name, path in packs.items():
            shutil.copy(next(away.rglob(name)), path)
        assert (target / "weights").read_bytes() == (model / "weights").read_bytes()
        # What is cached needs no store, and no worker either once it is in the page cache.
        for path in packs.values():
            path.unlink()
        os.kill(int((node.run_dir / "worker.pid").read_text()), signal.SIGKILL)
        assert (target / "weights").read_bytes() == (model / "weights").read_bytes()


def test_direct_io_is_refused_over_the_pack_filesystem(node, model):
    with mounted(node, model) as (target, _):
        assert [mount["mode"] for mount in node.json("status")["mounts"]] == ["packfs"]
        refused(errno.EINVAL, lambda: os.close(os.open(target / "weights", os.O_RDONLY | os.O_DIRECT)))
