"""Writers that die between any two changes of the store: a reader then sees old or new, and the next one ends the work.

docs/FORMAT.md, "Write order", has the windows; here each is met, in a folder and in a bucket.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import uuid

import pytest
from support import images, seaweed
from support.signing import signer, signing, trusting
from support.stored import pack_content, tree_files
from support.stores import Died, DyingStore

from floe.client.copy import copy_model
from floe.ingest.model import push_model
from floe.ingest.oci.attach import attach
from floe.ingest.oci.extract import extract
from floe.ingest.oci.image import ALL_LAYERS, index_image
from floe.ingest.oci.modelimage import publish_model
from floe.store import damage, layout
from floe.store.catalog import Catalog
from floe.store.errors import NotFoundError, UntrustedError
from floe.store.hotlayout import HotLayouts
from floe.store.ids import ModelRef
from floe.store.index import open_index
from floe.store.objects import open_store
from floe.store.profile import Profile, Touch
from floe.store.profiles import ProfileStore
from floe.store.stub import ANNOTATION

MODEL = ModelRef.parse("org/m:1")
GENERATOR = random.Random(21)
OLD = {"kept": GENERATOR.randbytes(5 << 20), "config": b"old"}
NEW = {"kept": OLD["kept"], "config": b"new", "more": GENERATOR.randbytes(70_000)}
LAYERS = [{"a/one": b"first"}, {"a/two": GENERATOR.randbytes(50_000)}, {"a/three": b"third"}]


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.slow)])
def stores(request, tmp_path, monkeypatch):
    """Makes stores, empty or as a copy of another one."""
    for name, value in seaweed.running().environment().items() if request.param == "bucket" else ():
        monkeypatch.setenv(name, value)

    def make(of=None):
        name = uuid.uuid4().hex
        if request.param == "bucket":
            made = open_store(seaweed.running().url(seaweed.shared_bucket(), f"crash/{name}"), retry=False)
        else:
            made = open_store(f"file://{tmp_path}/{name}", retry=False)
        stack.callback(made.close)
        for info in () if of is None else of.list(""):
            made.put(info.key, of.get(info.key))
        return made

    with contextlib.ExitStack() as stack:
        yield make


def directory(tmp_path, name, content):
    home = tmp_path / name
    home.mkdir()
    for file, data in content.items():
        (home / file).write_bytes(data)
    return home


def catalog_of(store):
    return Catalog(store, open_index(None))


def every_death(stores, before, work, *, changes=3):
    """Runs `work(store)` on copies of `before` until it survives; yields each store that it died on, so many at least."""
    for number in range(1, 100):
        inner = stores(before)
        store = DyingStore(inner, number)
        try:
            work(store)
        except Died:
            yield inner
        if not store.dead:
            assert number > changes
            return
    raise AssertionError("it never ended")


def listed(store, prefix):
    try:
        return list(store.list(prefix))
    except NotFoundError:  # a folder that was not made yet
        return []


def content(store):
    """All keys but those of pushes under way, which the dead left."""
    return {info.key for info in store.list("") if not info.key.startswith(layout.PUSHES)}


def check_whole(store):
    """Whatever has an index can be built upon, and whatever is named is all there."""
    for info in listed(store, layout.PACK_INDEXES):
        assert pack_content(store, info.key.rpartition("/")[2])
    for info in listed(store, layout.MANIFESTS):
        tree_files(store, catalog_of(store).get_manifest(info.key.rpartition("/")[2]).tree.digest)


@pytest.mark.parametrize("known", [True, False], ids=["moved", "new"])
def test_push(stores, tmp_path, known):
    old, new = (directory(tmp_path, name, content) for name, content in (("old", OLD), ("new", NEW)))

    def push(store, source):
        return push_model(catalog_of(store), source, MODEL, spool_dir=tmp_path / "spool")

    before, undisturbed = stores() if known else None, stores()
    if before is not None:
        push(before, old)
        push(undisturbed, old)
    wanted = push(undisturbed, new).manifest.tree
    source = ProfileStore(catalog_of(undisturbed)).of_tree(wanted.digest).source
    seen = []
    for store in every_death(stores, before, lambda store: push(store, new)):
        check_whole(store)
        try:
            found = tree_files(store, catalog_of(store).resolve_model(MODEL)[1].tree.digest)
        except NotFoundError:
            found = None
        assert found in (OLD if known else None, NEW)
        seen.append(found == NEW)
        assert push(store, new).manifest.tree == wanted
        assert (
            ProfileStore(catalog_of(store)).of_tree(wanted.digest).source == source
        )  # also when that was all it left out
        assert {i.key for i in store.list(layout.PACKS)} == {i.key for i in undisturbed.list(layout.PACKS)}
        assert list((tmp_path / "spool").iterdir()) == []
    assert set(seen) == {True, False}


def test_signed_push(stores, tmp_path):
    """Nodes that believe one key alone find what it signed under the tag, the old or the new, and never a refusal."""
    key = signer(1)
    old, new = (directory(tmp_path, name, content) for name, content in (("old", OLD), ("new", NEW)))

    def push(store, source):
        return push_model(signing(store, key), source, MODEL, spool_dir=tmp_path / "spool").manifest.tree.digest

    before, undisturbed = stores(), stores()
    first = push(before, old)
    push(undisturbed, old)
    new_tree = push(undisturbed, new)
    states = []
    for store in every_death(stores, before, lambda store: push(store, new)):
        check_whole(store)
        node = trusting(store, key)
        tree = node.resolve_model(MODEL)[1].tree.digest
        assert tree in (first, new_tree)
        node.check_tree(tree)
        assert tree_files(store, tree) == (OLD if tree == first else NEW)
        states.append((tree == new_tree, is_signed(node, new_tree)))
        assert push(store, new) == new_tree
        assert trusting(store, key).resolve_model(MODEL)[1].tree.digest == new_tree
        assert is_signed(trusting(store, key), new_tree)
    # Not signed, a signed tree that no tag names, done.
    assert set(states) == {(False, False), (False, True), (True, True)}


def is_signed(catalog, tree):
    try:
        catalog.check_tree(tree)
    except UntrustedError:
        return False
    return True


@pytest.mark.parametrize("known", [True, False], ids=["moved", "new"])
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_model_copy(stores, tmp_path, known, signed):
    key, name = signer(1), ModelRef.parse("copied/m:2")
    (tmp_path / "spool").mkdir()

    def opened(store):
        return signing(store, key) if signed else catalog_of(store)

    def copy(store, ref=MODEL):
        return copy_model(opened(source), opened(store), ref, name, spool=tmp_path / "spool")

    source, before, undisturbed = stores(), stores() if known else None, stores()
    older = ModelRef.parse("org/m:0")
    for ref, content_of in ((older, OLD), (MODEL, NEW)):
        directory(tmp_path, str(ref.tag), content_of)
        push_model(opened(source), tmp_path / str(ref.tag), ref, spool_dir=tmp_path / "spool")
    source_was = content(source)
    for store in (before, undisturbed) if before is not None else ():
        copy(store, older)
    wanted = copy(undisturbed)
    seen = []
    for store in every_death(stores, before, copy):
        check_whole(store)
        reader = trusting(store, key) if signed else catalog_of(store)
        try:
            tree = reader.resolve_model(name)[1].tree.digest
            found = tree_files(store, tree)
        except NotFoundError:
            tree = found = None
        assert found in (OLD if known else None, NEW)
        if signed and tree is not None:
            assert is_signed(reader, tree)
        seen.append(found == NEW)
        again = copy(store)
        assert (again.digest, again.previous) == (wanted.digest, wanted.digest if found == NEW else wanted.previous)
        assert content(store) == content(undisturbed)
        assert ProfileStore(catalog_of(store)).of_tree(again.manifest.tree.digest).source == "models/copied/m"
        assert list((tmp_path / "spool").iterdir()) == []
    assert set(seen) == {True, False}
    assert content(source) == source_was


def test_model_tag(stores, tmp_path):
    """One more name in the same store: nothing but names is written."""
    name, before = ModelRef.parse("org/m:live"), stores()
    push_model(catalog_of(before), directory(tmp_path, "new", NEW), MODEL, spool_dir=tmp_path / "spool")

    def tag(store):
        return copy_model(catalog_of(store), catalog_of(store), MODEL, name, spool=tmp_path / "spool")

    undisturbed = stores(before)
    tag(undisturbed)
    assert content(undisturbed) == content(before) | {layout.model_ref_key(name)}
    seen = set()
    for store in every_death(stores, before, tag, changes=2):
        check_whole(store)
        seen.add(catalog_of(store).find_model(name))
        assert tag(store).digest == catalog_of(store).find_model(MODEL)
        assert content(store) == content(undisturbed)
    assert seen == {None, catalog_of(before).find_model(MODEL)}


def test_image_index(stores, tmp_path):
    built = images.build_oci(tmp_path / "image", [images.files(layer) for layer in LAYERS])
    (tmp_path / "image" / "old").mkdir()
    older = images.build_oci(tmp_path / "image", [images.files(layer) for layer in LAYERS[:1]])

    def index(store, image):
        return index_image(catalog_of(store), image.source, spool_dir=tmp_path / "spool")

    before, undisturbed = stores(), stores()
    for store in (before, undisturbed):
        index(store, older)
    shutil.rmtree(tmp_path / "image")
    built = images.build_oci(tmp_path / "image", [images.files(layer) for layer in LAYERS])
    done = index(undisturbed, built)
    trees = {layer.diff_id: catalog_of(undisturbed).layer(layer.diff_id)[1].tree for layer in done.layers}
    name = done.record.names[0]
    seen = []
    for store in every_death(stores, before, lambda store: index(store, built)):
        check_whole(store)
        catalog = catalog_of(store)
        record = catalog.find_image(name)
        assert record.manifest_digest in (older.manifest_digest, built.manifest_digest)
        seen.append(record.manifest_digest == built.manifest_digest)
        for number, chain in enumerate(record.chain_ids):
            assert tree_files(store, catalog.resolve_chain(chain)[2].tree.digest) == LAYERS[number]
        for number, layer in enumerate(done.layers):  # a chain that is known stands for itself
            found = catalog.resolve_chain(layer.chain_id)
            assert found is None or tree_files(store, found[2].tree.digest) == LAYERS[number]
        again = index(store, built)
        assert again.record.chain_ids == done.record.chain_ids
        assert {i.diff_id: catalog_of(store).layer(i.diff_id)[1].tree for i in again.layers} == trees
        assert [image.names for image in catalog_of(store).images() if name in image.names] == [(name,)]
    assert set(seen) == {True, False}


def test_hot_layout(stores, tmp_path):
    wanted = {f"d/f{number:02}": GENERATOR.randbytes(30_000 + number) for number in range(40)}
    built = images.build_oci(tmp_path / "image", [images.files(wanted)])

    def index(store):
        return index_image(catalog_of(store), built.source, spool_dir=tmp_path / "spool", profile=ALL_LAYERS)

    def tree_of(store):
        return catalog_of(store).layer(built.diff_ids[0])[1].tree.digest

    before = stores()
    index(before)
    old = tree_of(before)
    read = {(f"d/f{number:02}".encode(), 0): Touch(number, 1) for number in range(3, 40, 5)}
    ProfileStore(catalog_of(before)).add(old, Profile(starts=1, pieces=read))
    source = ProfileStore(catalog_of(before)).of_tree(old).source
    undisturbed = stores(before)
    index(undisturbed)
    new, places = tree_of(undisturbed), set(HotLayouts(catalog_of(undisturbed)).places(source))
    assert new != old
    assert len(places) == len(read)
    seen = set()
    for store in every_death(stores, before, index):
        check_whole(store)
        assert tree_of(store) in (old, new)
        assert tree_files(store, tree_of(store)) == wanted
        laid_out = set(HotLayouts(catalog_of(store)).places(source))
        assert laid_out in (set(), places)
        seen.add((tree_of(store) == new, bool(laid_out)))
        index(store)
        assert tree_of(store) == new
        assert set(HotLayouts(catalog_of(store)).places(source)) == places
        profiles = ProfileStore(catalog_of(store))
        assert profiles.of_tree(new).source == source
        assert profiles.of_source(source).starts == 1  # by which it is replayed, should its own have been lost
        assert {i.key for i in store.list(layout.PACKS)} == {i.key for i in undisturbed.list(layout.PACKS)}
    assert seen >= {(False, False), (True, True)}


def test_recording(stores, tmp_path):
    before = stores()
    pushed = push_model(catalog_of(before), directory(tmp_path, "old", OLD), MODEL, spool_dir=tmp_path / "spool")
    tree = pushed.manifest.tree.digest
    source = ProfileStore(catalog_of(before)).of_tree(tree).source
    first, second = (Profile(1, frames={(0, n): Touch(0, 1)}, pieces={(b"kept", n): Touch(0, 1)}) for n in range(2))

    def add(store):
        ProfileStore(catalog_of(store)).add(tree, first)

    seen = []
    for store in every_death(stores, before, add, changes=2):
        profiles = ProfileStore(catalog_of(store))
        counted = profiles.of_tree(tree).starts, (profiles.of_source(source) or Profile()).starts
        seen.append(counted)
        add(store)  # the next start, that touches the same
        assert (profiles.of_tree(tree).starts, profiles.of_source(source).starts) == (counted[0] + 1, counted[1] + 1)
        profiles.add(tree, second)
        assert (
            set(profiles.of_tree(tree).pieces) == set(profiles.of_source(source).pieces) == {(b"kept", 0), (b"kept", 1)}
        )
    assert seen == [(0, 0), (1, 0)]


def test_image_attach(stores, tmp_path):
    built = images.build_oci(tmp_path / "image", [images.files(layer) for layer in LAYERS[:1]])
    before = stores()
    push_model(catalog_of(before), directory(tmp_path, "old", OLD), MODEL, spool_dir=tmp_path / "spool")
    index_image(catalog_of(before), built.source, spool_dir=tmp_path / "spool")
    targets = []

    def run(store):
        targets.append(tmp_path / f"out-{len(targets)}")
        return attach(catalog_of(store), built.source, f"oci:{targets[-1]}:t", [(MODEL, "/models/m")])

    undisturbed = stores(before)
    done = run(undisturbed)
    tree = done.stubs[0].annotations[ANNOTATION]
    for store in every_death(stores, before, run):
        check_whole(store)
        record = catalog_of(store).attachment(done.digest)
        has_image = (targets[-1] / "index.json").exists()
        assert record is not None or not has_image
        if record is not None:
            (model,) = record.models
            assert tree_files(store, model["tree"]) == {f"models/m/{name}": data for name, data in OLD.items()}
        again = run(store)
        assert (again.digest, again.stubs[0].annotations[ANNOTATION]) == (done.digest, tree)
        assert content(store) == content(undisturbed)


def test_model_publish(stores, tmp_path):
    before = stores()
    push_model(catalog_of(before), directory(tmp_path, "old", OLD), MODEL, spool_dir=tmp_path / "spool")
    targets = []

    def run(store):
        targets.append(tmp_path / f"out-{len(targets)}")
        return publish_model(catalog_of(store), MODEL, f"oci:{targets[-1]}:t")

    undisturbed = stores(before)
    done = run(undisturbed)
    deaths = 0
    for store in every_death(stores, before, run):
        deaths += 1
        check_whole(store)
        records = [catalog_of(store).attachment(digest) for _, digest in done.manifests]
        assert all(records) or not (targets[-1] / "index.json").exists()
        assert run(store).digest == done.digest
        assert content(store) == content(undisturbed)
    assert deaths > 0


def test_image_detach(stores, tmp_path):
    """A directory of an image becomes a model: whoever finds the image finds the model, and each death can be tried again."""
    layer = images.files({f"opt/m/{name}": data for name, data in OLD.items()})
    built = images.build_oci(tmp_path / "image", [layer, images.files({"etc/x": b"x"})])
    targets = []

    def run(store):
        targets.append(tmp_path / f"out-{len(targets)}")
        options = {"spool_dir": tmp_path / "spool"}
        return extract(catalog_of(store), built.source, f"oci:{targets[-1]}:t", [(MODEL, "/opt/m")], **options)

    before = stores()
    catalog_of(before).ensure_store()
    undisturbed = stores(before)
    done = run(undisturbed)
    for store in every_death(stores, before, run):
        check_whole(store)
        if (targets[-1] / "index.json").exists():
            (entry,) = json.loads((targets[-1] / "index.json").read_text())["manifests"]
            (model,) = catalog_of(store).attachment(entry["digest"]).models
            assert tree_files(store, model["tree"]) == {f"opt/m/{name}": data for name, data in OLD.items()}
        again = run(store)
        # The manifest says when it was made; what is in it is the same.
        assert tree_of(store, again) == tree_of(undisturbed, done)


def tree_of(store, done):
    return catalog_of(store).get_manifest(done.digests[0]).tree.digest


def test_healing(stores, tmp_path):
    source = directory(tmp_path, "old", OLD)

    def push(store):
        return push_model(catalog_of(store), source, MODEL, spool_dir=tmp_path / "spool")

    before = stores()
    first = push(before)
    (pack,) = first.manifest.packs
    sound = bytes(before.get(layout.pack_key(pack.id)))
    before.put(layout.pack_key(pack.id), sound[:9] + b"?" + sound[10:])
    damage.report(before, pack.id, [0], ["models/org/m"], "node")
    for store in every_death(stores, before, push):
        reported = pack.id in damage.reported(store)
        assert reported or bytes(store.get(layout.pack_key(pack.id))) == sound  # it is forgotten last
        push(store)
        assert bytes(store.get(layout.pack_key(pack.id))) == sound
        assert damage.reported(store) == {}
