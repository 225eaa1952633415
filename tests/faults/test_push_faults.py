"""Pushes that fail half-way: nothing is published by half, what was there stays, and the next push succeeds."""

from __future__ import annotations

import ctypes
import io
import os
import random
import threading
from pathlib import Path

import pytest
from support.capabilities import ordinary_file_access
from support.stores import CountdownFailureStore, RecordingStore, StoreWrapper, TruncatingStore

from floe.ingest.model import push_model
from floe.ingest.publish import Ingest
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.errors import (
    AccessDeniedError,
    CancelledError,
    FloeError,
    NoSpaceError,
    NotFoundError,
    SourceChangedError,
    UnavailableError,
)
from floe.store.ids import ModelRef
from floe.store.index import open_index
from floe.store.nodes import CHUNK
from floe.store.objects import open_store
from floe.store.packindex import MODEL_FRAME

REF = ModelRef("m")


@pytest.fixture
def model(tmp_path) -> Path:
    random.seed(2)
    home = tmp_path / "model"
    home.mkdir()
    (home / "a").write_bytes(random.randbytes(CHUNK + 1000))
    (home / "b").write_bytes(random.randbytes(2 * CHUNK))
    (home / "c").write_bytes(b"small")
    return home


def push(store, directory, tmp_path, **options):
    return push_model(Catalog(store, open_index(None)), directory, REF, spool_dir=tmp_path / "spool", **options)


def check_consistent(store) -> None:
    """Everything that is named is there."""
    catalog = Catalog(store, open_index(None))
    for info in store.list(layout.MANIFESTS):
        manifest = catalog.get_manifest(info.key.rpartition("/")[2])
        store.head(layout.tree_key(manifest.tree.digest))
        for pack in manifest.packs:
            assert store.head(layout.pack_key(pack.id)).size == pack.stored_size
            store.head(layout.pack_index_key(pack.id))
            store.head(layout.chunk_table_key(pack.id))
    for info in store.list(layout.PACK_INDEXES):
        store.head(layout.pack_key(info.key.rpartition("/")[2]))
    for _, ref in catalog.models() if list(store.list(layout.MODEL_REFS)) else ():
        catalog.get_manifest(ref.manifest)


def test_order_of_writing(model, tmp_path):
    store = RecordingStore(open_store("memory://"))
    result = push(store, model, tmp_path)
    puts = [request.key.partition(f"{layout.PUSHES}/")[1] or request.key for request in store.ops("put")]
    pack = result.manifest.packs[0].id
    assert puts == [
        layout.STORE_KEY,
        f"{layout.PUSHES}/",
        layout.pack_key(pack),
        layout.chunk_table_key(pack),
        layout.pack_index_key(pack),
        f"{layout.PUSHES}/",
        layout.tree_key(result.manifest.tree.digest),
        layout.manifest_key(result.digest),
        layout.model_ref_key(REF),
        layout.tree_profile_key(result.manifest.tree.digest),
    ]


@pytest.mark.parametrize("number", range(1, 10))
@pytest.mark.parametrize("when", ["fail_put", "fail_put_after"])
def test_every_crash_window(model, tmp_path, number, when):
    inner = open_store("memory://", retry=False)
    store = CountdownFailureStore(inner, **{when: {number: UnavailableError("cut off")}})
    with pytest.raises(UnavailableError, match="cut off"):
        push(store, model, tmp_path)
    check_consistent(inner)
    assert list(inner.list(layout.PUSHES)) == []
    refs = list(inner.list(layout.MODEL_REFS))
    assert bool(refs) == (number == 9 and when == "fail_put_after")
    assert list((tmp_path / "spool").glob("*")) == []
    result = push(inner, model, tmp_path)
    check_consistent(inner)
    # A pack whose index was written is found again, not stored twice.
    assert result.new_packs == (0 if number > 5 or (number == 5 and when == "fail_put_after") else 1)
    assert len(list(inner.list(layout.PACKS))) == 1


def test_a_failed_push_leaves_the_name_where_it_was(model, tmp_path):
    inner = open_store("memory://", retry=False)
    before = push(inner, model, tmp_path)
    (model / "c").write_bytes(b"other")
    store = CountdownFailureStore(inner, fail_put={8: UnavailableError("cut off")})
    with pytest.raises(UnavailableError):
        push(store, model, tmp_path)
    assert Catalog(inner, open_index(None)).resolve_model(REF)[0] == before.digest


class Meddler:
    """Does something to the source at a chosen moment of the push."""

    def __init__(self, action, *, after=-1):
        self.action = action
        self.after = after
        self.read = 0

    def total(self, _nbytes):
        if self.after < 0:
            self._act()

    def advance(self, nbytes):
        self.read += nbytes
        if 0 <= self.after < self.read:
            self._act()

    def _act(self):
        action, self.action = self.action, lambda: None
        action()


def _append(path):
    with path.open("ab") as file:
        file.write(b"more")


def _overwrite(path):
    with path.open("r+b") as file:
        file.seek(10)
        file.write(b"changed")


CHANGES = {
    "appended before it was read": (lambda m: _append(m / "b"), -1),
    "vanished before it was read": (lambda m: (m / "b").unlink(), -1),
    "replaced by a symlink": (lambda m: ((m / "b").unlink(), (m / "b").symlink_to("a")), -1),
    "replaced by a fifo": (lambda m: ((m / "b").unlink(), os.mkfifo(m / "b")), -1),
    "shrank while read": (lambda m: os.truncate(m / "a", 100), 0),
    "appended while read": (lambda m: _append(m / "a"), 0),
    "overwritten while read": (lambda m: _overwrite(m / "a"), 0),
    "overwritten after it was read": (lambda m: _overwrite(m / "a"), CHUNK + 1000),
    "removed after it was read": (lambda m: (m / "a").unlink(), CHUNK + 1000),
    "joined by another": (lambda m: (m / "d").write_bytes(b"new"), 0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_source_that_changes(model, tmp_path, name):
    action, after = CHANGES[name]
    store = open_store("memory://")
    with pytest.raises(SourceChangedError, match=r"nothing was published") as caught:
        push(store, model, tmp_path, progress=Meddler(lambda: action(model), after=after))
    assert str(model) in str(caught.value)
    for prefix in (layout.TREES, layout.MANIFESTS, layout.MODEL_REFS):
        assert list(store.list(prefix)) == []


def test_an_unreadable_file_is_named(model, tmp_path):
    (model / "b").chmod(0)
    store = open_store("memory://")
    with ordinary_file_access(), pytest.raises(AccessDeniedError, match="model/b cannot be read"):
        push(store, model, tmp_path)
    assert list(store.list(layout.MODEL_REFS)) == []


def test_an_unreadable_directory_is_named(model, tmp_path):
    (model / "sub").mkdir(mode=0)
    with ordinary_file_access(), pytest.raises(AccessDeniedError, match="model/sub cannot be read"):
        push(open_store("memory://"), model, tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_spool(model, tmp_path):
    libc = ctypes.CDLL(None, use_errno=True)
    spool = tmp_path / "spool"
    spool.mkdir()
    assert libc.mount(b"tmpfs", os.fsencode(spool), b"tmpfs", 0, b"size=2m") == 0, ctypes.get_errno()
    try:
        store = open_store("memory://")
        with pytest.raises(NoSpaceError, match="no space left in") as caught:
            push(store, model, tmp_path)
        assert caught.value.hint
        assert list(spool.iterdir()) == []
        assert list(store.list(layout.PACKS)) == []
    finally:
        assert libc.umount2(os.fsencode(spool), 0) == 0, ctypes.get_errno()


def test_a_spool_that_cannot_be_made(model, tmp_path):
    (tmp_path / "spool").write_text("a file")
    with pytest.raises(FloeError, match="spool"):
        push(open_store("memory://"), model, tmp_path)


def test_an_unreachable_store_while_deduplicating(model, tmp_path):
    inner = open_store("memory://", retry=False)
    push(inner, model, tmp_path)
    store = CountdownFailureStore(inner, fail_list={1: UnavailableError("gone away")})
    with pytest.raises(UnavailableError, match="gone away"):
        push(store, model, tmp_path)


def test_a_damaged_previous_manifest_is_replaced(model, tmp_path):
    inner = open_store("memory://", retry=False)
    first = push(inner, model, tmp_path)
    key = layout.manifest_key(first.digest)
    inner.put(key, b"{}")
    again = push(inner, model, tmp_path)
    assert again.manifest.tree == first.manifest.tree
    assert Catalog(inner, open_index(None)).resolve_model(REF) == (again.digest, again.manifest)


def test_a_damaged_pack_index_is_not_built_upon(model, tmp_path):
    inner = open_store("memory://", retry=False)
    first = push(inner, model, tmp_path)
    store = TruncatingStore(inner, matches=layout.PACK_INDEXES)
    again = push(store, model, tmp_path)
    assert again.manifest.packs == first.manifest.packs
    assert again.new_packs == 1


def test_nothing_is_there_before_the_push(tmp_path):
    store = open_store(f"file://{tmp_path}/store")
    with pytest.raises(NotFoundError):
        push(store, tmp_path / "none", tmp_path)
    assert not (tmp_path / "store").exists()


class BlockedUpload(StoreWrapper):
    """An upload that goes on part by part until it is stopped through its progress."""

    def __init__(self, inner):
        super().__init__(inner)
        self.started = threading.Event()
        self.ended = False

    def put_file(self, key, path, progress=None):
        self.started.set()
        for _ in range(6000):
            try:
                progress(0)
            except CancelledError:
                self.ended = True
                raise
            self.never.wait(0.01)

    never = threading.Event()


def test_an_interrupted_push_does_not_wait_for_its_upload(tmp_path):
    store = BlockedUpload(open_store("memory://", retry=False))
    catalog = Catalog(store, open_index(None))
    with Ingest(catalog, spool_dir=tmp_path, frame_size=MODEL_FRAME, max_pack=CHUNK) as ingest:
        data = random.randbytes(3 * CHUNK)
        ingest.add_stream(io.BytesIO(data), len(data))
        ingest._settle()
        assert store.started.wait(10)
    assert store.ended
    assert list(tmp_path.iterdir()) == []
