"""Garbage collection against pushes, one stopped before every single operation of the other; and collectors that are killed."""

from __future__ import annotations

import contextlib
import random
import re
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.images import add, build_oci
from support.steps import At, SteppedStore, Turns
from support.trees import content_of, read_packs, read_tree

from floe.ingest.entries import find
from floe.ingest.model import push_model
from floe.ingest.oci.attach import attach
from floe.ingest.oci.image import index_image
from floe.store import layout, protection
from floe.store.catalog import Catalog
from floe.store.errors import BusyError, ConflictError, FloeError, UnavailableError
from floe.store.ids import ModelRef
from floe.store.index import open_index
from floe.store.objects import open_store
from floe.upkeep.gc import Collector

OLD, NEW = ModelRef("old"), ModelRef("new")
# More operations than a push or a collection of so little takes: `At` counts them, and the tests see to it.
MANY = 200


@pytest.fixture
def store():
    return open_store("memory://", retry=False)


@pytest.fixture
def home(tmp_path):
    """A small model's directory."""
    random.seed(3)
    home = tmp_path / "model"
    home.mkdir()
    (home / "shared").write_bytes(random.randbytes(50_000))
    (home / "more").write_bytes(random.randbytes(9_000))
    return home


def catalog_of(store):
    return Catalog(store, open_index(None))


def push(store, directory, tmp_path, ref=NEW):
    return push_model(catalog_of(store), directory, ref, spool_dir=tmp_path / "spool", workers=1)


def leave_garbage(store, home, tmp_path, *, changes=False):
    """The model pushed and its name removed; afterwards its directory may differ, in part."""
    push(store, home, tmp_path, OLD)
    catalog_of(store).remove_model(OLD)
    if changes:
        (home / "more").write_bytes(b"other than before")


class KilledAt:
    """Nothing is done any more from deletion number `number` (1: the first) on."""

    def __init__(self, number):
        self.left = number

    def __call__(self, operation, _key):
        self.left -= operation == "delete"
        if self.left <= 0:
            self.left = 0
            raise UnavailableError("killed")


def collect(store, **options):
    return Collector(catalog_of(store), None, grace=0, **options).remove()


def check_whole(store, directory, ref=NEW):
    """The model is there, byte for byte."""
    catalog = catalog_of(store)
    _, manifest = catalog.resolve_model(ref)
    root, packs = read_tree(catalog, manifest.tree.digest), read_packs(catalog, manifest)
    for path in directory.iterdir():
        assert content_of(find(root, path.name.encode()), packs) == path.read_bytes()
    for pack in manifest.packs:
        store.head(layout.chunk_table_key(pack.id))


def left(store):
    return sorted(info.key for info in store.list("gc") if info.key != layout.MARKS_KEY)


@pytest.mark.parametrize("changes", [False, True])
def test_a_collection_before_every_operation_of_a_push(home, changes, tmp_path, store):
    leave_garbage(store, home, tmp_path, changes=changes)
    for number in range(MANY):
        inner = copy_of(store)
        at = At(number, lambda inner=inner: collect(inner))
        push(SteppedStore(inner, at), home, tmp_path)
        check_whole(inner, home)
        assert left(inner) == []
        collect(inner)
        check_whole(inner, home)
        if at.count <= number:
            break
    assert 15 < number < MANY


@pytest.mark.parametrize("changes", [False, True])
def test_a_push_before_every_operation_of_a_collection(home, changes, tmp_path, store, monkeypatch):
    monkeypatch.setattr(protection, "PATIENCE", 0.0)
    leave_garbage(store, home, tmp_path, changes=changes)
    outcomes = []
    for number in range(MANY):
        inner = copy_of(store)

        def try_push(inner=inner):
            try:
                push_model(Catalog(inner, open_index(None)), home, NEW, spool_dir=tmp_path / "spool", workers=1)
                outcomes.append("pushed")
            except BusyError as error:
                assert "is removing" in str(error)  # noqa: PT017 - one of two outcomes
                outcomes.append("busy")

        at = At(number, try_push)
        collect(SteppedStore(inner, at))
        if at.count <= number:
            break
        if outcomes[-1] == "busy":
            push(inner, home, tmp_path)
        check_whole(inner, home)
        collect(inner)
        check_whole(inner, home)
    assert 15 < number < MANY
    assert set(outcomes) == {"pushed", "busy"}


class ReadyPush:
    """A collector's steps. When it has marked what it will remove, a push begins and goes on to its commit.

    It commits, and ends, before the `number`-th step of the collector after that; `count` says how many there were.
    """

    def __init__(self, number, action):
        self._number, self.count = number, None
        self._ready, self._go = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=action, args=(self._hold,))

    def _hold(self, operation, key):
        if operation == "put" and key.startswith(layout.MODEL_REFS):
            self._ready.set()
            assert self._go.wait(20)

    def __call__(self, operation, key):
        if self.count is None and (operation, key) == ("put", layout.MARKS_KEY):
            self._thread.start()
            assert self._ready.wait(20)
            self.count = 0
        elif self.count is not None:
            if self.count == self._number:
                self.finish()
            self.count += 1

    def finish(self):
        self._go.set()
        self._thread.join()


def test_a_push_that_is_ready_commits_before_every_later_step_of_a_collection(home, tmp_path, store):
    leave_garbage(store, home, tmp_path)
    for number in range(MANY):
        inner = copy_of(store)
        steps = ReadyPush(number, lambda hold, inner=inner: push(SteppedStore(inner, hold), home, tmp_path))
        report = collect(SteppedStore(inner, steps))
        steps.finish()
        check_whole(inner, home)
        assert report.kept.count >= 2  # tree and pack: as the push relies on them, or has named them
        if steps.count <= number:
            break
    assert 8 < number < MANY


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(schedule=st.lists(st.booleans(), max_size=120))
def test_any_order_of_their_operations(home, tmp_path, schedule):
    store = open_store("memory://", retry=False)
    leave_garbage(store, home, tmp_path)
    turns, failures = Turns(schedule), []

    def work(user, action):
        try:
            turns.run(user, lambda: action(SteppedStore(store, turns.of(user))))
        except FloeError as error:
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=(False, lambda stepped: push(stepped, home, tmp_path))),
        threading.Thread(target=work, args=(True, collect)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    check_whole(store, home)
    collect(store)
    check_whole(store, home)


def test_a_collector_killed_after_each_deletion_leaves_a_store_that_is_whole(home, tmp_path, store):
    leave_garbage(store, home, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "a").write_bytes(b"kept" * 5000)
    push(store, other, tmp_path, ModelRef("kept"))
    for number in range(1, MANY):
        inner = copy_of(store)
        killed = KilledAt(number)
        with contextlib.suppress(UnavailableError):
            collect(SteppedStore(inner, killed))
        check_whole(inner, other, ModelRef("kept"))
        if not killed.left and number > 1:
            with pytest.raises(BusyError, match="another floe gc"):
                collect(inner)
        collect(inner, lease=0)  # takes over
        assert not list(inner.list(layout.REMOVAL_KEY))
        check_whole(inner, other, ModelRef("kept"))
        assert len(list(inner.list(layout.PACKS))) == len(list(inner.list(layout.TREES))) == 1
        push(inner, home, tmp_path)
        check_whole(inner, home)
        if killed.left:
            break
    assert 5 < number < MANY


def test_a_push_that_needs_what_a_dead_collector_was_removing_says_so(home, tmp_path, store, monkeypatch):
    monkeypatch.setattr(protection, "PATIENCE", 0.2)
    leave_garbage(store, home, tmp_path)
    with pytest.raises(UnavailableError):
        collect(SteppedStore(store, KilledAt(4)))
    with pytest.raises(BusyError, match="is removing packs/") as caught:
        push_model(catalog_of(store), home, NEW, spool_dir=tmp_path / "spool")
    assert "floe gc --delete" in caught.value.hint
    unrelated = tmp_path / "unrelated"
    unrelated.mkdir()
    (unrelated / "x").write_bytes(b"something else")
    push(store, unrelated, tmp_path, ModelRef("unrelated"))
    collect(store, lease=0)
    push(store, home, tmp_path)
    check_whole(store, home)


def test_a_collector_that_stood_still_is_replaced_and_stops(home, tmp_path, store):
    leave_garbage(store, home, tmp_path)
    deletions = []

    def overtake():
        collect(store, lease=0)
        push(store, home, tmp_path)

    at = {"done": False}

    def before(operation, key):
        if operation == "delete" and key.startswith(layout.TREES) and not at["done"]:
            at["done"] = True
            overtake()
        elif operation == "delete" and at["done"]:
            deletions.append(key)

    # A lease of nothing: each deletion looks whether it still is the one, as one that stood still would.
    with pytest.raises(ConflictError, match="taken over"):
        collect(SteppedStore(store, before), lease=-1.0)
    assert deletions == []


def test_a_push_that_stood_still_for_a_day_gives_up(home, tmp_path, store, monkeypatch):
    monkeypatch.setattr(protection, "STALE_AFTER", -1.0)
    with pytest.raises(ConflictError, match="stood still"):
        push(store, home, tmp_path)
    assert not list(store.list(layout.MODEL_REFS))


def test_a_dead_push_protects_for_three_days(home, tmp_path, store, monkeypatch):
    leave_garbage(store, home, tmp_path)
    dead = protection.Protection(store)
    dead.protect([next(store.list(layout.PACKS)).key])
    report = collect(store)
    assert report.pushes == 1
    assert len(list(store.list(layout.PACKS))) == 1
    monkeypatch.setattr("floe.upkeep.gc.ABANDONED_AFTER", -1.0)
    report = collect(store)
    assert (report.pushes, report.dead_pushes) == (0, 1)
    assert not list(store.list(layout.PACKS))
    assert left(store) == []
    push(store, home, tmp_path)
    check_whole(store, home)


def test_who_may_not_delete_empties_the_record(store):
    class NoDeletes(SteppedStore):
        def delete(self, key):
            raise UnavailableError(f"not allowed: {key}")

    held = protection.Protection(NoDeletes(store, lambda *_: None))
    held.protect(["packs/ab/cd"])
    held.close()
    (info,) = store.list(layout.PUSHES)
    assert protection.PushRecord.decode(store.get(info.key), info.key).keys == ()


def test_an_image_indexed_before_every_operation_of_a_collection(tmp_path, store, monkeypatch):
    """Its layers are there, and no image names them: reused, or stored again, never half of it."""
    monkeypatch.setattr(protection, "PATIENCE", 0.0)
    image = build_oci(tmp_path / "oci", [lambda tar: add(tar, "a", b"one" * 3000), lambda tar: add(tar, "b", b"two")])

    def index(inner):
        return index_image(catalog_of(inner), image.source, spool_dir=tmp_path / "spool", workers=1)

    catalog_of(store).remove_image(index(store).record.manifest_digest)
    outcomes = set()
    for number in range(MANY):
        inner = copy_of(store)

        def try_index(inner=inner):
            try:
                index(inner)
                outcomes.add("indexed")
            except BusyError:
                outcomes.add("busy")

        at = At(number, try_index)
        collect(SteppedStore(inner, at))
        if at.count <= number:
            break
        result = index(inner)
        collect(inner)
        for layer in result.layers:
            diff_id, _, manifest = catalog_of(inner).resolve_chain(layer.chain_id)
            assert diff_id == layer.diff_id
            read_packs(catalog_of(inner), manifest)
            read_tree(catalog_of(inner), manifest.tree.digest)
    assert outcomes == {"indexed", "busy"}


def test_a_collection_before_every_operation_of_an_attach(tmp_path, store):
    home = tmp_path / "model"
    home.mkdir()
    (home / "weights").write_bytes(b"w" * 70_000)
    push(store, home, tmp_path)
    image = build_oci(tmp_path / "oci", [lambda tar: add(tar, "a", b"one")])
    for number in range(MANY):
        inner = copy_of(store)

        def act(inner=inner):
            catalog_of(inner).remove_model(NEW)
            collect(inner)

        at = At(number, act)
        try:
            result = attach(
                catalog_of(SteppedStore(inner, at)), image.source, f"oci:{tmp_path}/target:{number}", [(NEW, "/m")]
            )
        except FloeError as error:
            assert re.search("no model|removed meanwhile|is not in the store", str(error))  # noqa: PT017 - one of two outcomes
            continue
        if at.count <= number:
            break
        collect(inner)
        record = catalog_of(inner).attachment(result.manifest_digest)
        read_tree(catalog_of(inner), record.models[0]["tree"])
        read_packs(catalog_of(inner), catalog_of(inner).get_manifest(record.models[0]["manifest"]))
    assert 5 < number < MANY


def copy_of(store):
    """The same objects, for another try."""
    copy = open_store("memory://", retry=False)
    for info in store.list(""):
        copy.put(info.key, store.get(info.key))
    return copy
