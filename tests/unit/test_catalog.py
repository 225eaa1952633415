"""The catalog over a store in memory: names, conflicts, damage, and an index that fails."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.signing import signer, signing
from support.stores import LastByteFlipStore, RecordingStore, StoreWrapper, UnreachableStore

from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.errors import (
    BadInputError,
    ConflictError,
    DamagedError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
)
from floe.store.ids import ModelRef, chain_ids, digest, hexdigest
from floe.store.index import ChunkPlace, NullIndex
from floe.store.index.memory import MemoryIndex
from floe.store.objects.memory import MemoryStore
from floe.store.packindex import CODEC_RAW, ChunkEntry, FrameEntry, PackIndex, encode_chunk_table
from floe.store.records import (
    KIND_LAYER,
    KIND_MODEL,
    MOVES_KEPT,
    AttachmentRecord,
    ChainRecord,
    ImageRecord,
    Manifest,
    Ref,
    Sizes,
    StoreRecord,
    TreeEntry,
    canonical_json,
)

DIFF_A, DIFF_B = "sha256:" + "a" * 64, "sha256:" + "b" * 64
MODEL = ModelRef.parse("org/bert:v1")


def manifest(kind=KIND_MODEL, source="here"):
    return Manifest(kind, TreeEntry("0" * 64, 1), (), Sizes(1, 1, 1), source, "2026-01-01T00:00:00Z")


def image(number, *names, platform="linux/amd64", indexed="2026-01-01T00:00:00Z"):
    return ImageRecord(f"sha256:{number:064x}", names, platform, (DIFF_A,), (DIFF_A,), 10, indexed)


class FailingIndex:
    """An index that cannot be used at all."""

    url = "failing"

    def __init__(self):
        self.calls = 0

    def _fail(self, *_):
        self.calls += 1
        raise UnavailableError("index failing cannot be used")

    bind = find_chunks = pack_ids = add_pack = remove_packs = get_ref = put_ref = delete_ref = _fail

    def close(self):
        pass


@pytest.fixture
def store():
    return RecordingStore(MemoryStore())


@pytest.fixture(params=[MemoryIndex, NullIndex, FailingIndex])
def catalog(store, request):
    made = Catalog(store, request.param())
    made.ensure_store()
    return made


def put_pack(store, number, chunks):
    table = encode_chunk_table(chunks)
    content = b"%d" % number * 4096
    frame = FrameEntry(4096, CODEC_RAW, digest(content[:4096]))
    index = PackIndex(4096, 4096, (frame,), digest(table))
    store.put(layout.pack_key(index.pack_id), content[:4096])
    store.put(layout.chunk_table_key(index.pack_id), table)
    store.put(layout.pack_index_key(index.pack_id), index.encode())
    return index.pack_id


# The store's record


def test_a_store_is_made_once(store):
    first, second = Catalog(store, NullIndex()), Catalog(store, NullIndex())
    with pytest.raises(NotFoundError, match="no Floe store at memory") as caught:
        first.check_store()
    assert "push a model" in caught.value.hint
    assert first.ensure_store() == second.ensure_store() == second.check_store()
    assert len(store.ops("put_if", "floe.json")) == 1


def test_of_many_makers_all_agree(store):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: Catalog(store, NullIndex()).ensure_store(), range(8)))
    assert len({record.uuid for record in made}) == 1


def test_a_store_of_another_version_is_refused(store):
    store.put("floe.json", canonical_json({"format": "floe.store", "version": 2, "uuid": "x", "created": "y"}))
    for use in (Catalog(store, NullIndex()).check_store, Catalog(store, NullIndex()).ensure_store):
        with pytest.raises(UnsupportedError, match="version 2") as caught:
            use()
        assert "upgrade" in caught.value.hint


def test_something_else_is_no_store(store):
    store.put("floe.json", b"{}")
    with pytest.raises(DamagedError, match=r"floe\.json"):
        Catalog(store, NullIndex()).check_store()


def test_reading_needs_a_store(store):
    catalog = Catalog(store, NullIndex())
    for use in (
        catalog.models,
        catalog.images,
        catalog.sync_chunks,
        lambda: catalog.resolve_model(MODEL),
        lambda: catalog.layer(DIFF_A),
        lambda: catalog.resolve_chain(DIFF_A),
        lambda: catalog.find_image("x"),
        lambda: catalog.remove_model(MODEL),
        lambda: catalog.attachment(DIFF_A),
    ):
        with pytest.raises(NotFoundError, match="no Floe store"):
            use()
    assert store.bytes_written == 0


def test_an_index_is_bound_to_the_store(store):
    index = MemoryIndex()
    index.bind("another store")
    index.put_ref(layout.layer_ref_key(DIFF_A), Ref("0" * 64, "now").encode())
    catalog = Catalog(store, index)
    catalog.ensure_store()
    assert catalog.layer(DIFF_A) is None


# Manifests and models


def test_a_manifest_comes_back(catalog):
    stored = catalog.put_manifest(manifest())
    assert stored == manifest().digest
    assert catalog.get_manifest(stored) == manifest()
    with pytest.raises(NotFoundError):
        catalog.get_manifest("1" * 64)
    with pytest.raises(BadInputError):
        catalog.get_manifest("../etc/passwd")


def test_a_damaged_manifest_is_refused(catalog, store):
    stored = catalog.put_manifest(manifest())
    with pytest.raises(DamagedError, match=stored) as caught:
        Catalog(LastByteFlipStore(store, layout.MANIFESTS), NullIndex()).get_manifest(stored)
    assert "push its model" in caught.value.hint
    store.put(layout.manifest_key("2" * 64), manifest().encode())
    with pytest.raises(DamagedError):
        catalog.get_manifest("2" * 64)


def test_a_tag_moves_and_says_what_it_named(catalog):
    one, two = catalog.put_manifest(manifest()), catalog.put_manifest(manifest(source="there"))
    assert catalog.set_model(MODEL, one) is None
    assert catalog.set_model(MODEL, two) == one
    assert catalog.resolve_model(MODEL) == (two, manifest(source="there"))
    assert catalog.resolve_model(ModelRef.parse(f"org/bert@{one}")) == (one, manifest())


def test_a_tag_knows_what_it_named_and_who_moved_it(catalog, store, monkeypatch):
    one, two = catalog.put_manifest(manifest()), catalog.put_manifest(manifest(source="there"))
    times = (f"2026-01-01T00:00:0{number}Z" for number in range(1, 9))
    monkeypatch.setattr("floe.store.catalog._now", lambda: next(times))
    for by, target in (("ann", one), ("ben", two), ("ben", two), ("", one)):
        Catalog(store, NullIndex(), by=by).set_model(MODEL, target)
    catalog.set_layer(DIFF_A, one)
    catalog.set_layer(DIFF_A, two)
    ref = catalog.model_ref(MODEL)
    assert [(move.manifest, move.updated[-2], move.by) for move in ref.moves] == [
        (one, "3", ""),
        (two, "2", "ben"),  # what changed nothing is no move
        (one, "1", "ann"),
    ]
    assert (ref.manifest, ref.updated, ref.by) == (one, "2026-01-01T00:00:03Z", "")
    assert catalog.layer_ref(DIFF_A).before == ()  # a layer's ref is read at every start
    # Signing it is no move.
    assert signing(store, signer(1)).set_model(MODEL, one) == one
    assert len(catalog.model_ref(MODEL).signatures) == 1
    assert catalog.model_ref(MODEL).before == ref.before
    catalog.remove_model(MODEL)
    catalog.set_model(MODEL, one)
    assert catalog.model_ref(MODEL).before == ()


def test_of_many_moves_the_last_are_kept(catalog):
    digests = [f"{number:064x}" for number in range(MOVES_KEPT + 5)]
    for target in digests:
        catalog.set_model(MODEL, target)
    moves = catalog.model_ref(MODEL).moves
    assert [move.manifest for move in moves] == digests[: -MOVES_KEPT - 2 : -1]
    assert len(catalog.store.get(layout.model_ref_key(MODEL))) < 20_000


def test_the_tags_of_one_model(catalog, store):
    one = catalog.put_manifest(manifest())
    for name in ("org/bert:v1", "org/bert:v2", "bert:v1", "org/bertha:v1", "bert/org:v1"):
        catalog.set_model(ModelRef.parse(name), one)
    store.put("refs/models/org/bert/v3", b"{]")
    told = []
    assert [str(ref) for ref, _ in catalog.tags_of("org/bert", lambda key, _: told.append(key))] == [
        "org/bert:v1",
        "org/bert:v2",
    ]
    assert told == ["refs/models/org/bert/v3"]
    assert [str(ref) for ref, _ in catalog.tags_of("bert")] == ["bert:v1"]
    assert catalog.tags_of("nobody") == []


def test_a_tag_that_somebody_moved_meanwhile_stays(catalog):
    one, two, three = (catalog.put_manifest(manifest(source=source)) for source in ("here", "there", "away"))
    assert catalog.find_model(MODEL) is None
    assert catalog.move_model(MODEL, one, None) is None
    assert catalog.find_model(MODEL) == one
    assert catalog.move_model(MODEL, two, one) == one
    for seen in (one, None):
        with pytest.raises(ConflictError, match=rf"org/bert:v1 was moved to {two}") as caught:
            catalog.move_model(MODEL, three, seen)
        assert f"org/bert@{three}" in caught.value.hint
    assert catalog.move_model(MODEL, two, one) == two  # theirs is the same
    catalog.remove_model(MODEL)
    assert catalog.move_model(MODEL, three, two) is None
    assert catalog.find_model(MODEL) == three


def test_setting_a_ref_again_writes_nothing(catalog, store):
    one = catalog.put_manifest(manifest())
    catalog.set_model(MODEL, one)
    catalog.set_layer(DIFF_A, one)
    catalog.set_chain(DIFF_A, ChainRecord(DIFF_A))
    catalog.set_image(image(1, "a"))
    store.clear()
    assert catalog.set_model(MODEL, one) == one
    catalog.set_layer(DIFF_A, one)
    catalog.set_chain(DIFF_A, ChainRecord(DIFF_A))
    catalog.set_image(image(1, "a", indexed="2026-02-02T00:00:00Z"))
    assert store.ops("put") == []


def test_a_digest_cannot_be_set_and_a_ref_needs_a_digest(catalog):
    with pytest.raises(BadInputError, match="digest"):
        catalog.set_model(ModelRef.parse(f"bert@{'0' * 64}"), "0" * 64)
    with pytest.raises(BadInputError):
        catalog.set_model(MODEL, "sha256:x")


def test_models_are_listed_in_order_with_and_without_an_org(catalog):
    one = catalog.put_manifest(manifest())
    names = ["a:b", "a/b:c", "b:1", "a:a", "org/bert:v1"]
    for name in names:
        catalog.set_model(ModelRef.parse(name), one)
    listed = list(catalog.models())
    assert [str(ref) for ref, _ in listed] == sorted(names)
    assert {found.manifest for _, found in listed} == {one}


def test_a_damaged_ref_does_not_hide_the_others(catalog, store, caplog):
    one = catalog.put_manifest(manifest())
    catalog.set_model(MODEL, one)
    store.put("refs/models/_/bad/v1", b"{]")
    store.put("refs/models/stray", Ref(one, "now").encode())
    assert [str(ref) for ref, _ in catalog.models()] == ["org/bert:v1"]
    assert "refs/models/_/bad/v1" in caplog.text
    assert "refs/models/stray" in caplog.text
    with pytest.raises(DamagedError, match="bad/v1"):
        catalog.resolve_model(ModelRef.parse("bad:v1"))
    assert catalog.set_model(ModelRef.parse("bad:v1"), one) is None
    assert catalog.resolve_model(ModelRef.parse("bad:v1"))[0] == one


def test_models_are_removed_by_tag_or_by_digest(catalog):
    one, two = catalog.put_manifest(manifest()), catalog.put_manifest(manifest(source="there"))
    for name, target in (("m:1", one), ("m:2", one), ("m:3", two), ("other:1", one)):
        catalog.set_model(ModelRef.parse(name), target)
    assert catalog.remove_model(ModelRef.parse("m:3")) == two
    assert catalog.remove_model(ModelRef.parse(f"m@{one}")) == one
    assert [str(ref) for ref, _ in catalog.models()] == ["other:1"]
    for text in ("m:1", f"m@{one}", f"m@{two}"):
        with pytest.raises(NotFoundError, match="no model m") as caught:
            catalog.remove_model(ModelRef.parse(text))
        assert "floe model ls" in caught.value.hint
    assert catalog.get_manifest(one) == manifest()


def test_a_tag_that_moves_while_its_digest_is_removed_stays(store):
    catalog = Catalog(store, NullIndex())
    one, two = catalog.put_manifest(manifest()), catalog.put_manifest(manifest(source="there"))
    for tag in ("1", "2"):
        catalog.set_model(ModelRef.parse(f"m:{tag}"), one)

    class Moving(StoreWrapper):
        def delete(self, key):
            super().delete(key)
            if key.endswith("m/1"):
                catalog.set_model(ModelRef.parse("m:2"), two)

    Catalog(Moving(store), NullIndex()).remove_model(ModelRef.parse(f"m@{one}"))
    assert [(str(ref), found.manifest) for ref, found in catalog.models()] == [("m:2", two)]


@pytest.mark.parametrize("spoilt", [b"{]", b'"manifest":5', b'"manifest":null', b'"manifest":"zz"'])
def test_a_damaged_ref_is_told_and_a_push_replaces_it(catalog, store, spoilt):
    one = catalog.put_manifest(manifest())
    catalog.set_model(ModelRef.parse("good"), one)
    data = Ref(one, "now").encode().replace(b'"manifest":"%s"' % one.encode(), spoilt)
    key = layout.model_ref_key(MODEL)
    store.put(key, data)
    told = []
    assert [str(ref) for ref, _ in catalog.models(lambda *damage: told.append(damage))] == ["good:latest"]
    assert [(found, type(error)) for found, error in told] == [(key, DamagedError)]
    with pytest.raises(DamagedError, match=key):
        catalog.resolve_model(MODEL)
    assert catalog.set_model(MODEL, one) is None
    assert catalog.resolve_model(MODEL)[0] == one


def test_a_layer_ref_that_names_nonsense_is_damage(catalog, store):
    store.put(layout.layer_ref_key(DIFF_A), Ref("zz", "now").encode())
    with pytest.raises(DamagedError, match="refs/layers"):
        catalog.layer(DIFF_A)


def test_unknown_models_and_layers_are_no_models(catalog):
    for text in ("none:1", f"none@{'3' * 64}"):
        with pytest.raises(NotFoundError, match="none"):
            catalog.resolve_model(ModelRef.parse(text))
    layer = catalog.put_manifest(manifest(KIND_LAYER))
    with pytest.raises(NotFoundError, match="not a model"):
        catalog.resolve_model(ModelRef.parse(f"none@{layer}"))


def test_of_concurrent_pushes_none_is_lost_unseen(store):
    catalogs = [Catalog(store, NullIndex()) for _ in range(6)]
    digests = [catalogs[0].put_manifest(manifest(source=str(n))) for n in range(6)]
    start = threading.Barrier(6)

    def push(number):
        start.wait()
        return catalogs[number].set_model(MODEL, digests[number])

    with ThreadPoolExecutor(6) as pool:
        previous = list(pool.map(push, range(6)))
    final = catalogs[0].resolve_model(MODEL)[0]
    # Each push displaced another one, or nothing: together with the final one, each digest appears exactly once.
    assert sorted([*filter(None, previous), final]) == sorted(digests)
    assert previous.count(None) == 1


def test_a_ref_that_never_holds_still_is_an_error(store):
    class Restless(StoreWrapper):
        def put_if(self, key, data, version):
            raise ConflictError("lost")

    catalog = Catalog(store, NullIndex())
    catalog.ensure_store()
    with pytest.raises(ConflictError, match="org/bert/v1"):
        Catalog(Restless(store), NullIndex()).set_model(MODEL, "0" * 64)


# Layers and chains


def test_a_chain_leads_to_its_layer(catalog):
    one = catalog.put_manifest(manifest(KIND_LAYER))
    bottom, top = chain_ids([DIFF_A, DIFF_B])
    assert catalog.resolve_chain(top) is None
    catalog.set_chain(bottom, ChainRecord(DIFF_A))
    catalog.set_chain(top, ChainRecord(DIFF_B, bottom))
    assert catalog.chain(top) == ChainRecord(DIFF_B, bottom)
    assert catalog.resolve_chain(top) is None
    assert catalog.layer(DIFF_B) is None
    catalog.set_layer(DIFF_B, one)
    for _ in range(2):
        assert catalog.resolve_chain(top) == (DIFF_B, one, manifest(KIND_LAYER))
    two = catalog.put_manifest(manifest(KIND_LAYER, "anew"))
    catalog.set_layer(DIFF_B, two)
    assert catalog.resolve_chain(top)[1] == two
    assert catalog.resolve_chain(bottom) is None
    with pytest.raises(BadInputError):
        catalog.resolve_chain("nonsense")


def test_the_index_saves_requests(store):
    catalog = Catalog(store, MemoryIndex())
    catalog.set_layer(DIFF_A, catalog.put_manifest(manifest(KIND_LAYER)))
    catalog.set_chain(DIFF_A, ChainRecord(DIFF_A))
    catalog.resolve_chain(DIFF_A)
    store.clear()
    assert catalog.resolve_chain(DIFF_A) is not None
    assert store.ops(prefix="refs") == []


def test_a_stale_copy_in_the_index_is_noticed(store):
    catalog = Catalog(store, MemoryIndex())
    old = catalog.put_manifest(manifest(KIND_LAYER))
    catalog.set_layer(DIFF_A, old)
    assert catalog.layer(DIFF_A)[0] == old
    other = Catalog(store, NullIndex())
    new = other.put_manifest(manifest(KIND_LAYER, "anew"))
    other.set_layer(DIFF_A, new)
    store.delete(layout.manifest_key(old))
    assert catalog.layer(DIFF_A)[0] == new
    store.delete(layout.layer_ref_key(DIFF_A))
    store.delete(layout.manifest_key(new))
    assert catalog.layer(DIFF_A) is None


def test_nonsense_in_the_index_is_noticed(store):
    index = MemoryIndex()
    catalog = Catalog(store, index)
    catalog.set_layer(DIFF_A, catalog.put_manifest(manifest(KIND_LAYER)))
    catalog.set_chain(DIFF_A, ChainRecord(DIFF_A))
    index.put_ref(layout.layer_ref_key(DIFF_A), b"nonsense")
    index.put_ref(layout.chain_ref_key(DIFF_A), b"nonsense")
    assert catalog.resolve_chain(DIFF_A) is not None


def test_a_layer_without_its_manifest_is_damage_not_absence(catalog):
    catalog.set_layer(DIFF_A, "4" * 64)
    with pytest.raises(DamagedError, match=DIFF_A):
        catalog.layer(DIFF_A)
    catalog.set_layer(DIFF_A, catalog.put_manifest(manifest(KIND_MODEL)))
    with pytest.raises(DamagedError, match="model"):
        catalog.layer(DIFF_A)


def test_an_unreachable_store_is_not_an_absent_layer(store):
    Catalog(store, NullIndex()).ensure_store()
    away = UnreachableStore(store, down=False)
    catalog = Catalog(away, NullIndex())
    catalog.check_store()
    away.down = True
    for use in (
        lambda: catalog.resolve_chain(DIFF_A),
        lambda: catalog.layer(DIFF_A),
        lambda: catalog.resolve_model(MODEL),
        lambda: list(catalog.models()),
        lambda: catalog.set_model(MODEL, "0" * 64),
        catalog.sync_chunks,
    ):
        with pytest.raises(UnavailableError, match="cannot be reached"):
            use()


def test_a_failing_index_is_asked_rarely_and_fails_nothing(store, caplog):
    index = FailingIndex()
    catalog = Catalog(store, index)
    catalog.set_layer(DIFF_A, catalog.put_manifest(manifest(KIND_LAYER)))
    catalog.set_chain(DIFF_A, ChainRecord(DIFF_A))
    for _ in range(20):
        assert catalog.resolve_chain(DIFF_A) is not None
    assert index.calls == 1
    assert caplog.text.count("cannot be used") == 1


# Images and attachments


def test_names_of_an_image_are_merged(catalog):
    catalog.set_image(image(1, "b:1"))
    catalog.set_image(image(1, "a:1", indexed="2026-02-02T00:00:00Z"))
    assert catalog.image(image(1).manifest_digest) == image(1, "a:1", "b:1", indexed="2026-02-02T00:00:00Z")
    assert [record.names for record in catalog.images()] == [("a:1", "b:1")]


def test_images_are_found_by_name_digest_and_beginning(catalog):
    one, two = image(0xA1 << 240, "app:1"), image(0xA2 << 240, "app:2")
    for record in (one, two):
        catalog.set_image(record)
    start = one.manifest_digest.removeprefix("sha256:")[:8]
    for text in ("app:1", one.manifest_digest, f"app@{one.manifest_digest}", start, f"sha256:{start}"):
        assert catalog.find_image(text) == one
    for text in ("app", "app:3", "00", "sha256:", "sha256:" + "9" * 64, "", "0"):
        with pytest.raises(NotFoundError, match="no indexed image") as caught:
            catalog.find_image(text)
        assert "floe image ls" in caught.value.hint


def test_an_ambiguous_image_lists_the_candidates(catalog):
    amd, arm = image(1, "app:1"), image(2, "app:1", platform="linux/arm64")
    for record in (amd, arm):
        catalog.set_image(record)
    for text in ("app:1", "0000"):
        with pytest.raises(BadInputError, match="stands for 2 images") as caught:
            catalog.find_image(text)
        for record in (amd, arm):
            assert record.manifest_digest in str(caught.value)
        assert "digest" in caught.value.hint


def test_a_moved_name_stands_for_the_latest(catalog):
    catalog.set_image(image(1, "app:latest", indexed="2026-03-01T00:00:00Z"))
    catalog.set_image(image(2, "app:latest", indexed="2026-02-01T00:00:00Z"))
    assert catalog.find_image("app:latest") == image(1, "app:latest", indexed="2026-03-01T00:00:00Z")


def test_a_name_that_moves_back_stands_for_the_first_again(catalog):
    """Also within one second, the resolution of `indexed`."""
    for times in (("2026-01-01", "2026-01-02", "2026-01-03"), ("2026-01-04",) * 3):
        for number, time in zip((1, 2, 1), times, strict=True):
            catalog.set_image(image(number, "app:1", indexed=f"{time}T00:00:00Z"))
            assert catalog.find_image("app:1").manifest_digest == image(number).manifest_digest
        assert catalog.image(image(2).manifest_digest).names == ()


def test_who_loses_its_last_name_of_a_repository_keeps_that_by_digest(catalog):
    """Retention asks registries by names."""
    main, other, folder = "registry.example:5000/team/app:main", "registry.example/app:main", "oci:/some/folder:main"
    digest = image(1).manifest_digest
    by_digest = f"registry.example:5000/team/app@{digest}"
    catalog.set_image(image(1, main, other, folder))
    catalog.set_image(image(2, main, folder))
    assert catalog.image(digest).names == (other, by_digest)
    for text in (by_digest, digest):
        assert catalog.find_image(text).manifest_digest == digest
    assert catalog.find_image(main).manifest_digest == image(2).manifest_digest
    catalog.set_image(image(1, "registry.example:5000/team/app:stable", main))
    catalog.set_image(image(3, main))
    assert catalog.image(digest).names == (other, "registry.example:5000/team/app:stable", by_digest)


def test_who_keeps_another_name_of_the_repository_needs_none_by_digest(catalog):
    catalog.set_image(image(1, "registry.example/app:1", "registry.example/app:main"))
    catalog.set_image(image(2, "registry.example/app:main"))
    assert catalog.image(image(1).manifest_digest).names == ("registry.example/app:1",)


def test_a_record_is_forgotten_only_as_it_was_listed(catalog, store):
    listed = image(1, "registry.example/staging/app:1")
    catalog.set_image(listed)
    catalog.set_attachment(AttachmentRecord(listed.manifest_digest, "source", (), "2026-01-01T00:00:00Z"))
    catalog.set_image(image(1, "registry.example/prod/app:1"))
    assert not catalog.forget_image(listed)
    now = catalog.image(listed.manifest_digest)
    assert now.names == ("registry.example/prod/app:1", *listed.names)
    assert catalog.forget_image(now)
    assert not catalog.forget_image(now)
    assert list(catalog.images()) == []
    assert catalog.attachment(listed.manifest_digest) is None


def test_a_name_is_taken_off_records_of_the_same_platform_only(catalog):
    catalog.set_image(image(1, "app:1", "other"))
    catalog.set_image(image(2, "app:1", platform="linux/arm64"))
    catalog.set_image(image(3, "app:1"))
    assert [catalog.image(image(number).manifest_digest).names for number in (1, 2, 3)] == [
        ("other",), ("app:1",), ("app:1",)
    ]  # fmt: skip


def test_records_from_before_names_moved_are_put_right(catalog, store):
    for number, day in ((1, 1), (2, 2)):
        record = image(number, "app:1", indexed=f"2026-01-0{day}T00:00:00Z")
        store.put(layout.image_ref_key(record.manifest_digest), record.encode())
    catalog.set_image(image(1, "app:1", indexed="2026-01-03T00:00:00Z"))
    assert catalog.find_image("app:1").manifest_digest == image(1).manifest_digest
    assert catalog.image(image(2).manifest_digest).names == ()


def test_a_record_that_changes_meanwhile_keeps_its_names(catalog, store):
    """Of two that index at once under one name, neither may take it off the other's new record."""
    catalog.set_image(image(1, "app:1"))
    later = image(1, "app:1", indexed="2026-01-02T00:00:00Z")

    class Racing(StoreWrapper):
        def put_if(self, key, data, version):
            if key == layout.image_ref_key(image(2).manifest_digest):
                store.put(layout.image_ref_key(later.manifest_digest), later.encode())
            return super().put_if(key, data, version)

    Catalog(Racing(store), NullIndex()).set_image(image(2, "app:1", indexed="2026-01-02T00:00:00Z"))
    assert catalog.image(later.manifest_digest) == later


def test_images_are_removed(catalog):
    catalog.set_image(image(1, "app"))
    catalog.remove_image(image(1).manifest_digest)
    assert list(catalog.images()) == []
    with pytest.raises(NotFoundError):
        catalog.remove_image(image(1).manifest_digest)


def test_attachments_come_back(catalog):
    record = AttachmentRecord(DIFF_A, "from", ({"name": "m:1", "path": "/m"},), "now")
    assert catalog.attachment(DIFF_A) is None
    catalog.set_attachment(record)
    catalog.set_attachment(dataclasses.replace(record, source="elsewhere"))
    assert catalog.attachment(DIFF_A) == dataclasses.replace(record, source="elsewhere")


# Chunks


def test_chunks_of_the_bucket_are_found(catalog, store):
    one = put_pack(store, 1, [ChunkEntry(digest(b"x"), 1, 0)])
    key, other = (digest(b"x"), 1), (digest(b"y"), 1)
    assert catalog.find_chunks([key]) in ({}, {key: ChunkPlace(one, 0)})
    catalog.sync_chunks()
    assert catalog.find_chunks([key, other]) == {key: ChunkPlace(one, 0)}
    catalog.add_pack("7" * 64, [ChunkEntry(digest(b"y"), 1, 3)])
    assert catalog.find_chunks([other]) == {other: ChunkPlace("7" * 64, 3)}
    catalog.sync_chunks()  # that pack was never in the bucket
    assert catalog.find_chunks([other]) == {}
    store.delete(layout.pack_key(one))
    catalog.sync_chunks()
    assert catalog.find_chunks([key]) == {}


def test_what_is_known_is_not_read_again(store):
    catalog = Catalog(store, MemoryIndex())
    catalog.ensure_store()
    put_pack(store, 1, [ChunkEntry(digest(b"x"), 1, 0)])
    catalog.sync_chunks()
    store.clear()
    catalog.sync_chunks()
    assert store.ops("get") == []


@pytest.mark.parametrize("spoil", [layout.pack_key, layout.pack_index_key, layout.chunk_table_key])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_damaged_pack_is_not_deduplicated_against(catalog, store, spoil, how):
    good = put_pack(store, 1, [ChunkEntry(digest(b"x"), 1, 0)])
    bad = put_pack(store, 2, [ChunkEntry(digest(b"y"), 1, 0)])
    if how == "missing":
        store.delete(spoil(bad))
    else:
        store.put(spoil(bad), store.get(spoil(bad))[:-1])
    catalog.sync_chunks()
    keys = [(digest(b"x"), 1), (digest(b"y"), 1)]
    assert catalog.find_chunks(keys) == {keys[0]: ChunkPlace(good, 0)}


def test_an_index_that_fails_later_is_replaced_from_the_bucket(store, caplog):
    class Later(MemoryIndex):
        failing = False

        def find_chunks(self, keys):
            if self.failing:
                raise UnavailableError("index later cannot be used")
            return super().find_chunks(keys)

    index = Later()
    catalog = Catalog(store, index)
    catalog.ensure_store()
    one = put_pack(store, 1, [ChunkEntry(digest(b"x"), 1, 0)])
    catalog.sync_chunks()
    index.failing = True
    assert catalog.find_chunks([(digest(b"x"), 1)]) == {(digest(b"x"), 1): ChunkPlace(one, 0)}
    assert "deduplicating with the store's chunk tables" in caplog.text


def test_the_records_of_a_store_are_where_the_format_says(catalog, store):
    stored = catalog.put_manifest(manifest())
    catalog.set_model(MODEL, stored)
    catalog.set_model(ModelRef.parse("bert"), stored)
    catalog.set_layer(DIFF_A, stored)
    catalog.set_chain(DIFF_B, ChainRecord(DIFF_A))
    catalog.set_image(image(1, "a"))
    assert sorted(i.key for i in store.list("")) == [
        "floe.json",
        f"manifests/{stored[:2]}/{stored}",
        f"refs/chains/sha256/{'b' * 64}",
        f"refs/images/sha256/{1:064x}",
        f"refs/layers/sha256/{'a' * 64}",
        "refs/models/_/bert/latest",
        "refs/models/org/bert/v1",
    ]
    assert hexdigest(store.get(layout.manifest_key(stored))) == stored
    assert StoreRecord.decode(store.get("floe.json"), "floe.json") == catalog.check_store()
