"""`floe model export` killed before every single change of the disk: its directory is whole or as it was, and the next one ends the work."""

import contextlib
import fcntl
import os
import threading
from pathlib import Path

import pytest
from support.stores import Died

import floe
from floe.client import export

CHANGES = (
    *("mkdir", "open", "ftruncate", "pwrite", "setxattr", "fchmod", "chmod", "utime", "fsync", "link", "symlink"),
    *("rename", "unlink", "rmdir"),
)


class DyingDisk:
    """The process dies just before the n-th change (1: the first) below `folder`; from then on it changes nothing there."""

    def __init__(self, monkeypatch, folder, dies_at):
        self._folder, self._left, self.dead = str(folder), dies_at - 1, False
        self._lock = threading.Lock()
        for name in CHANGES:
            monkeypatch.setattr(os, name, self._dying(name, getattr(os, name)))

    def _dying(self, name, call):
        def change(*args, **options):
            if self._is_change(name, *args, **options):
                with self._lock:
                    self.dead = self.dead or not self._left
                    if self.dead:
                        raise Died
                    self._left -= 1
            return call(*args, **options)

        return change

    def _is_change(self, name, where, flags=0, *_, dir_fd=None, **__):
        if name == "open" and not flags & os.O_CREAT:
            return False
        place = os.fsdecode(where) if not isinstance(where, int) else str(opened(where))
        if dir_fd is not None:
            place = f"{opened(dir_fd)}/{place}"
        if name in ("link", "symlink"):  # the new name is the second
            place = os.fsdecode(flags)
        return place.startswith(self._folder)


def opened(fd):
    return Path(f"/proc/self/fd/{fd}").readlink()


@pytest.fixture
def model(tmp_path):
    home = tmp_path / "m"
    (home / "sub").mkdir(parents=True)
    (home / "weights").write_bytes(os.urandom(5 << 20))
    os.setxattr(home / "weights", "user.note", b"kept")
    (home / "sub/config").write_bytes(b"{}")
    (home / "twin").hardlink_to(home / "sub/config")
    (home / "sub/up").symlink_to("../weights")
    (home / "sub").chmod(0o555)
    node = tmp_path / "node"
    settings = {"config": "", "cache_dir": node / "cache", "run_dir": node / "run", "index": "none", "workers": 1}
    with floe.open_store(f"file://{tmp_path}/store", **settings) as store:
        store.push(home, "m:1")
        yield store.model("m:1")


def listing(folder):
    found = {}
    for path in sorted(folder.rglob("*")):
        told = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        found[str(path.relative_to(folder))] = (told.st_mode, told.st_mtime_ns, told.st_nlink, content)
    return found


def leftovers(folder, target):
    return [path for path in folder.iterdir() if path != target]


def aged(path):
    """As if the process that made it had died long ago."""
    os.utime(path, (1, 1))


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_every_death(model, tmp_path, monkeypatch, there):
    work = tmp_path / "work"
    work.mkdir()
    wanted = listing(model.export(tmp_path / "wanted").directory)
    assert {name: facts[3] for name, facts in wanted.items()}["weights"] == model.read("weights")
    seen, left = [], 0
    for number in range(1, 200):
        target = work / f"out{number}"
        if there:
            target.mkdir()
        with monkeypatch.context() as patch:
            disk = DyingDisk(patch, work, number)
            with contextlib.suppress(Died):
                model.export(target)
        whole = target.exists() and any(target.iterdir())
        if whole:
            assert listing(target) == wanted
        else:
            assert target.exists() == there
        if not disk.dead:
            break
        seen.append(whole)
        left += len(leftovers(work, target))
        for path in leftovers(work, target):
            aged(path)
        if not whole:
            model.export(target)
        assert listing(target) == wanted
        assert leftovers(work, target) == []  # what the dead one left is gone, too
        export.remove_tree(target)
    else:
        raise AssertionError("it never ended")
    assert set(seen) == {False, True}  # True: it died in making the rename durable
    assert left > 10


def test_what_others_have_beside_it_stays(model, tmp_path):
    target = tmp_path / "work/out"
    target.parent.mkdir()
    living, young, other, files = (
        target.parent / name
        for name in (
            ".out.floe-export-abcdefgh",
            ".out.floe-export-youngone",
            ".out.floe-export-mine",
            ".out2.floe-export-abcdefgh",
        )
    )
    for path in (living, young, other, files):
        path.mkdir()
        (path / "kept").write_text("x")
    for path in (living, other, files):
        aged(path)
    lock = os.open(living, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        model.export(target)
        assert sorted(leftovers(target.parent, target)) == sorted((living, young, other, files))
    finally:
        os.close(lock)
    export.remove_tree(target)
    aged(living)
    model.export(target)
    assert sorted(leftovers(target.parent, target)) == sorted((young, other, files))


def test_where_directories_cannot_be_locked(model, tmp_path, monkeypatch):
    """As on NFS: it works, and nothing that might be somebody's is removed."""
    target = tmp_path / "work/out"
    target.parent.mkdir()
    left = Path(f"{target.parent}/.out.floe-export-abcdefgh")
    left.mkdir()
    aged(left)

    def refused(*_):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(export.fcntl, "flock", refused)
    assert model.export(target).files == 3 - 1  # a file of two names counts once
    assert leftovers(target.parent, target) == [left]
