"""Tags that the rules let go, against pushes that move them: one stopped before every operation of the other."""

from __future__ import annotations

import random

import pytest
from support.steps import At, SteppedStore
from support.trees import read_packs, read_tree

from floe.cli.main import main
from floe.ingest.model import push_model
from floe.store import layout, protection
from floe.store.catalog import Catalog
from floe.store.errors import BusyError, DamagedError
from floe.store.ids import ModelRef
from floe.store.index import open_index
from floe.store.objects import open_store
from floe.store.records import Ref
from floe.store.retention import Retention, Rule
from floe.upkeep.gc import Collector

OLD, NEW = ModelRef("iris", "a"), ModelRef("iris", "b")
MANY = 200


@pytest.fixture
def home(tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    (made / "weights").write_bytes(random.Random(1).randbytes(20_000))
    return made


@pytest.fixture
def store(home, tmp_path):
    """Two tags of one model, of which the rule keeps the younger one; then the directory changes."""
    made = open_store("memory://", retry=False)
    for day, ref in ((1, OLD), (2, NEW)):
        digest = push(made, home, tmp_path, ref)
        made.put(layout.model_ref_key(ref), Ref(digest, f"2020-01-0{day}T00:00:00Z").encode())
    made.put(layout.RETENTION_KEY, Retention((Rule("iris", 1),)).encode())
    (home / "weights").write_bytes(random.Random(2).randbytes(20_000))
    return made


def copy_of(store):
    made = open_store("memory://", retry=False)
    for info in store.list(""):
        made.put(info.key, store.get(info.key))
    return made


def push(store, directory, tmp_path, ref):
    catalog = Catalog(store, open_index(None))
    return push_model(catalog, directory, ref, spool_dir=tmp_path / "spool", workers=1).digest


def collect(store):
    return Collector(Catalog(store, open_index(None)), None, grace=0).remove()


def tags(store):
    return {str(ref): found.manifest for ref, found in Catalog(store, open_index(None)).models()}


def check_whole(store, digest):
    catalog = Catalog(store, open_index(None))
    manifest = catalog.get_manifest(digest)
    read_tree(catalog, manifest.tree.digest)
    read_packs(catalog, manifest)


def test_an_old_tag_goes_and_nothing_by_looking(store):
    collector = Collector(Catalog(store, open_index(None)), None, grace=0)
    assert (collector.look().expired, set(tags(store))) == (("iris:a",), {"iris:a", "iris:b"})
    report = collect(store)
    assert (report.expired, set(tags(store))) == (("iris:a",), {"iris:b"})
    assert collect(store).expired == ()
    check_whole(store, tags(store)["iris:b"])


def test_rules_that_cannot_be_read_let_nothing_go(store):
    store.put(layout.RETENTION_KEY, b"{}")
    before = tags(store)
    with pytest.raises(DamagedError):
        collect(store)
    assert tags(store) == before


def test_a_push_of_an_old_tag_before_every_operation_of_a_collection(home, store, tmp_path, monkeypatch):
    monkeypatch.setattr(protection, "PATIENCE", 0.0)
    outcomes = []
    for number in range(MANY):
        inner = copy_of(store)

        def try_push(inner=inner):
            try:
                outcomes.append(push(inner, home, tmp_path, OLD))
            except BusyError:
                outcomes.append("busy")

        at = At(number, try_push)
        collect(SteppedStore(inner, at))
        if at.count <= number:
            break
        if outcomes[-1] == "busy":
            outcomes.append(push(inner, home, tmp_path, OLD))
        assert tags(inner)["iris:a"] == outcomes[-1]
        check_whole(inner, outcomes[-1])
        collect(inner)
        assert tags(inner) == {"iris:a": outcomes[-1]}
        check_whole(inner, outcomes[-1])
    assert 15 < number < MANY
    assert "busy" in outcomes
    assert len(outcomes) > 2 * outcomes.count("busy")


def test_a_collection_before_every_operation_of_a_push_of_an_old_tag(home, store, tmp_path):
    for number in range(MANY):
        inner = copy_of(store)
        at = At(number, lambda inner=inner: collect(inner))
        digest = push(SteppedStore(inner, at), home, tmp_path, OLD)
        if at.count <= number:
            break
        assert tags(inner)["iris:a"] == digest
        collect(inner)
        assert tags(inner) == {"iris:a": digest}
        check_whole(inner, digest)
    assert 15 < number < MANY


def test_the_command_sets_shows_and_removes_rules(tmp_path, capsys):
    flags = [f"--store=file://{tmp_path}/store", "--index=none", "--config="]
    assert main(["store", "init", *flags]) == 0
    for wrong in (["iris"], ["--keep-last", "1"], ["iris:v1", "--keep-last", "1"], ["iris", "--keep-last", "-1"]):
        assert main(["model", "retention", *wrong, *flags]) == 2
    assert main(["model", "retention", "iris", "--keep-last", "3", "--keep", "v*", *flags]) == 0
    assert main(["model", "retention", "team/*", "--keep-last", "1", *flags]) == 0
    assert main(["model", "retention", "iris", "--keep-last", "2", *flags]) == 0
    capsys.readouterr()
    assert main(["model", "retention", *flags]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [["iris", "2"], ["team/*", "1"]]
    assert main(["model", "retention", "iris", "--remove", *flags]) == 0
    assert main(["model", "retention", "iris", "--remove", *flags]) == 1
