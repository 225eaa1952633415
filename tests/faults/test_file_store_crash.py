"""A writer that is killed at any step of a write leaves the old object or the new one, nothing else to see.

A child process counts its calls into the operating system and ends, as by kill -9, just before the n-th. What a power
cut may do is not seen so: for that, the order of syncs and renames is checked.
"""

import os
import sys
import traceback
from pathlib import Path

import pytest

from floe.store.errors import UnavailableError
from floe.store.objects.file import FileStore

OLD, NEW = b"old" * 3000, b"new!" * 3000
CHANGES = ("open", "write", "fsync", "utime", "rename", "close", "copy_file_range", "fstat", "unlink", "mkdir")
WRITES = {
    "put": lambda store, key, source: store.put(key, NEW),
    "put_file": lambda store, key, source: store.put_file(key, source),
    "put_if": lambda store, key, source: store.put_if(key, NEW, _version(store, key)),
    "delete": lambda store, key, source: store.delete(key),
}


def _version(store, key):
    return store.head(key).version if (store.root / key).exists() else None


def noting(before, real, name):
    """The function `real` of the os module, calling `before(name, its arguments)` first."""

    def noted(*args, **kwargs):
        before(name, args)
        return real(*args, **kwargs)

    return noted


def killed_at(step, work):
    """Run `work` in a child that dies before its change number `step`; returns whether it came that far."""
    child = os.fork()
    if not child:
        left = step

        def count(*_):
            nonlocal left
            left -= 1
            if not left:
                os._exit(9)

        try:
            for name in CHANGES:  # pathlib goes through the module too
                setattr(os, name, noting(count, getattr(os, name), name))
            work()
        except BaseException:  # a child must not return into pytest
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


# Python 3.12 warns of a fork beside threads; this child takes no locks that another thread could hold.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("exists", [True, False], ids=["replace", "create"])
@pytest.mark.parametrize(
    "name", [name if name in ("put_if", "delete") else pytest.param(name, marks=pytest.mark.slow) for name in WRITES]
)
def test_a_killed_writer_leaves_old_or_new(tmp_path, name, exists):
    source = tmp_path / "source"
    source.write_bytes(NEW)
    step = 0
    seen = []
    while True:
        step += 1
        root = tmp_path / f"store-{step}"
        store = FileStore(root)
        store.put("other", b"untouched")
        if exists:
            store.put("deep/er/key", OLD)
        killed = killed_at(step, lambda: WRITES[name](FileStore(root), "deep/er/key", source))  # noqa: B023 - runs at once
        after = FileStore(root)
        objects = {info.key: bytes(after.get(info.key)) for info in after.list("")}
        found = objects.pop("deep/er/key", None)
        assert objects == {"other": b"untouched"}
        before, wanted = (OLD if exists else None), (None if name == "delete" else NEW)
        assert found in (before, wanted)
        seen.append(found)
        if not killed:
            break
        # Whoever comes next is not hindered by what the dead one held or left.
        after.put_if("deep/er/key", b"next", _version(after, "deep/er/key"))
        assert after.get("deep/er/key") == b"next"
    assert seen[-1] == wanted
    if name != "delete":
        assert step > 8
        assert wanted in seen[:-1], "no kill hit the time after the rename"
        assert before in seen, "no kill hit the time before the rename"


def test_synced_before_it_is_renamed_and_the_folders_after(tmp_path, monkeypatch):
    steps = []

    def note(name, args):
        if name == "fsync":
            steps.append(("fsync", os.path.relpath(Path(f"/proc/self/fd/{args[0]}").readlink(), tmp_path)))
        elif name == "rename":
            steps.append(("rename", os.path.relpath(args[1], tmp_path)))

    store = FileStore(tmp_path / "a" / "store")
    for name in ("fsync", "rename"):
        monkeypatch.setattr(os, name, noting(note, getattr(os, name), name))
    store.put("packs/ab/x", b"data")
    renamed = steps.index(("rename", "a/store/packs/ab/x"))
    before, after = steps[:renamed], steps[renamed + 1 :]
    assert ("fsync", "a/store/packs/ab") in after
    assert any(step.startswith("a/store/.tmp/") for op, step in before if op == "fsync")
    # Every folder that was made is in its parent for good before the object counts as stored.
    for parent in (".", "a", "a/store", "a/store/packs"):
        assert ("fsync", parent) in before
    steps.clear()
    store.put("packs/ab/y", b"data")
    assert [op for op, _ in steps] == ["fsync", "rename", "fsync"]


@pytest.mark.parametrize("write", ["put", "put_file", "put_if"])
def test_a_folder_that_was_there_and_is_gone_is_not_made_anew(tmp_path, write):
    """As when its disk is not mounted any more: what a node notes then must not lie in its way afterwards."""
    FileStore(tmp_path / "store").put("first", b"1")
    store = FileStore(tmp_path / "store")
    (tmp_path / "store").rename(tmp_path / "away")
    (tmp_path / "source").write_bytes(b"2")
    given = {"put": (b"2",), "put_file": (tmp_path / "source",), "put_if": (b"2", None)}[write]
    with pytest.raises(UnavailableError, match="is gone") as caught:
        getattr(store, write)("a/second", *given)
    assert "mount it again" in caught.value.hint
    assert not (tmp_path / "store").exists()
    (tmp_path / "away").rename(tmp_path / "store")
    getattr(store, write)("a/second", *given)
    assert (bytes(store.get("first")), bytes(store.get("a/second"))) == (b"1", b"2")
