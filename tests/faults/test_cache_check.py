"""The node's cache checked by `floe fsck --cache`: bad frames are found beside a writer, and dropped without one."""

from __future__ import annotations

import json
import os
import threading
from contextlib import closing

import pytest
from support.mounts import until
from support.packs import make_pack, random_content

from floe.cli.main import main
from floe.store.cache import CacheWriter, NodeCache
from floe.store.cache.cached_pack import CachedPack
from floe.store.errors import BusyError
from floe.store.frames import VerifiedFrame
from floe.upkeep.cachecheck import check_cache, drop_bad


@pytest.fixture
def cache(tmp_path):
    return NodeCache(tmp_path / "cache")


@pytest.fixture
def pack():
    return make_pack(random_content(10 << 17))


def fill(cache, pack, frames):
    cache.add_index(pack.id, pack.index.encode())
    with closing(CacheWriter(cache)) as writer:
        for number in frames:
            start = number * pack.index.frame_size
            content = pack.content[start : start + pack.index.frame_size]
            assert writer.put(pack.id, number, VerifiedFrame(content, pack.index.frames[number].digest))


def spoil(cache, pack, frame):
    with cache.data_path(pack.id).open("r+b") as data:
        data.seek(frame * pack.index.frame_size + 5)
        data.write(b"???")


def found(checked):
    return [(bad.id, bad.frames, bad.dropped) for bad in checked.bad]


def test_a_sound_cache(cache, pack, tmp_path):
    assert check_cache(tmp_path / "none").packs == 0
    fill(cache, pack, range(3))
    checked = check_cache(cache.root)
    assert (checked.packs, checked.frames, checked.bad) == (1, 3, [])
    assert checked.read_bytes == 3 * pack.index.frame_size


@pytest.mark.parametrize("frames", [range(4), range(10)], ids=["some", "complete"])
def test_bad_frames_are_found_and_dropped_and_the_rest_stays(cache, pack, frames):
    fill(cache, pack, frames)
    assert cache.is_complete(pack.id) == (len(frames) == 10)
    spoil(cache, pack, 1)
    checked = check_cache(cache.root)
    assert found(checked) == [(pack.id, (1,), False)]
    drop_bad(cache, checked)
    assert found(checked) == [(pack.id, (1,), True)]
    assert not cache.is_complete(pack.id)
    assert check_cache(cache.root).bad == []
    with closing(CacheWriter(cache)) as writer:
        assert [n for n in range(10) if writer.has(pack.id, n)] == [n for n in frames if n != 1]


def test_beside_a_writer_it_looks_and_does_not_touch(cache, pack):
    fill(cache, pack, range(4))
    spoil(cache, pack, 2)
    with closing(CacheWriter(cache)):
        checked = check_cache(cache.root)
        assert found(checked) == [(pack.id, (2,), False)]
        with pytest.raises(BusyError, match="writes to the cache"):
            drop_bad(cache, checked)
    assert found(check_cache(cache.root)) == [(pack.id, (2,), False)]


def test_what_was_evicted_meanwhile_is_not_bad(cache, pack, monkeypatch):
    fill(cache, pack, range(4))
    spoil(cache, pack, 2)  # as a punched hole would look
    pread = os.pread
    with closing(CacheWriter(cache)) as writer:

        def evicting(*args):
            monkeypatch.setattr(os, "pread", pread)
            writer.discard(pack.id, [2])
            return pread(*args)

        monkeypatch.setattr(os, "pread", evicting)
        assert check_cache(cache.root).bad == []


def test_a_pack_that_is_mounted_natively_stays(cache, pack):
    fill(cache, pack, range(10))
    spoil(cache, pack, 1)
    cache.pin(pack.id, "mount")
    checked = check_cache(cache.root)
    drop_bad(cache, checked)
    assert found(checked) == [(pack.id, (1,), False)]
    assert cache.is_complete(pack.id)


def test_a_pack_that_is_being_completed_is_waited_for(cache, pack, monkeypatch):
    """Of one that was full and not complete when its writer ended: the next one completes it first of all."""
    fill(cache, pack, range(10))
    (cache.folder(pack.id) / "complete").unlink()
    spoil(cache, pack, 1)
    checked = check_cache(cache.root)
    holding, seen = threading.Event(), []
    finish, locked = CachedPack.finish, NodeCache.locked

    def finish_late(self):
        holding.set()
        until(lambda: seen)
        return finish(self)

    def see(self, pack_id, **options):
        if threading.current_thread() is threading.main_thread() and holding.wait(10):
            seen.append(pack_id)
        return locked(self, pack_id, **options)

    monkeypatch.setattr(CachedPack, "finish", finish_late)
    monkeypatch.setattr(NodeCache, "locked", see)
    drop_bad(cache, checked)
    assert found(checked) == [(pack.id, (1,), True)]
    assert not cache.is_complete(pack.id)


def test_the_command(cache, pack, monkeypatch, capsys):
    for name, value in (("FLOE_CONFIG", ""), ("FLOE_CACHE_DIR", str(cache.root)), ("FLOE_STORE", "file:///nowhere")):
        monkeypatch.setenv(name, value)
    fill(cache, pack, range(4))
    assert main(["fsck", "--cache"]) == 0
    spoil(cache, pack, 0)
    assert main(["fsck", "--cache"]) == 3
    assert "--repair drops" in capsys.readouterr().err
    assert main(["fsck", "--cache", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["bad"] == [{"id": pack.id, "frames": [0], "dropped": False}]
    assert main(["fsck", "--cache", "--repair"]) == 0
    assert "dropped" in capsys.readouterr().out
    assert main(["fsck", "--cache"]) == 0
    assert main(["fsck", "--cache", "--deep"]) == 2
