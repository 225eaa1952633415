"""Somebody who can write anything into the bucket and the index: nodes with trusted keys mount nothing but what was signed.

The attacker has a store of their own, whole and sound and signed by a key of theirs, of the same names and other content.
Kind by kind, and all at once, its objects take the place of the honest ones.
"""

import contextlib
import io
import re
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from support import images, redis_server
from support.signing import signer, signing, trusting
from support.trees import content_of, read_packs, read_tree

from floe.ingest.model import push_model
from floe.ingest.oci.attach import attach
from floe.ingest.oci.image import PARENT_LABEL, index_image
from floe.ingest.oci.modelimage import publish_model
from floe.ingest.publish import Ingest
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.errors import DamagedError, NotFoundError, UntrustedError
from floe.store.frames import encode_frame
from floe.store.ids import ModelRef, chain_ids, digest, hexdigest
from floe.store.index import open_index
from floe.store.index.base import ChunkPlace
from floe.store.nodes import CHUNK, Node, find
from floe.store.objects import open_store
from floe.store.packindex import BLOCK, LAYER_FRAME, MODEL_FRAME, ChunkEntry, PackIndex, encode_chunk_table
from floe.store.records import KIND_LAYER, ChainRecord, Ref
from floe.store.signing import Statement
from floe.store.stub import ANNOTATION
from floe.store.vouching import Vouching

HONEST, EVIL = signer(1), signer(2)
MODEL, OLD, OTHER = (ModelRef.parse(f"org/model:{tag}") for tag in ("prod", "old", "other"))
REFUSED = (UntrustedError, DamagedError, NotFoundError)
FORMAT = (Path(__file__).parents[2] / "docs/FORMAT.md").read_text()
# Of every kind of object in a store, where its keys begin.
KINDS = (
    *("packs/", "indexes/", "chunks/", "trees/", "manifests/", "refs/models/", "refs/layers/", "refs/chains/"),
    *(
        "refs/images/",
        "refs/attachments/",
        "profiles/trees/",
        "profiles/sources/",
        "profiles/layouts/",
        "signatures/trees/",
        "floe.json",
    ),
)


class Filled:
    """A store with models, an indexed image and an attached one, all published with one key."""

    def __init__(self, tmp_path, key, who):
        self.store, self.key = open_store("memory://"), key
        self.trees = {}
        catalog = signing(self.store, key)
        for ref in (OLD, MODEL, OTHER):
            directory = tmp_path / who / str(ref).replace("/", "-")
            directory.mkdir(parents=True)
            (directory / "weights").write_bytes(f"{who} {ref}".encode() * 1000)
            self.trees[ref] = push_model(catalog, directory, ref, spool_dir=tmp_path / "spool").manifest.tree.digest
        # The diff ids are the image's: an attacker has other content under them.
        self.image = images.build_oci(
            tmp_path / who / "image", [images.files({"a": f"{who} lower"}), images.files({"b": f"{who} upper"})]
        )
        index_image(catalog, self.image.source, spool_dir=tmp_path / "spool")
        attached = attach(catalog, self.image.source, f"oci:{tmp_path}/{who}/out:1", [(MODEL, "/models/m")])
        self.placed = attached.stubs[0].annotations[ANNOTATION]
        for key in (layout.source_profile_key("models/org/model"), layout.source_layout_key("images/x")):
            self.store.put(key, who.encode())  # advice, which nodes need not be able to read
        self.layers = {diff: catalog.layer(diff)[1].tree.digest for diff in self.image.diff_ids}

    def objects(self):
        return {info.key: bytes(self.store.get(info.key)) for info in self.store.list("")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("stores")
    (tmp_path / "spool").mkdir()
    return Filled(tmp_path, HONEST, "honest"), Filled(tmp_path, EVIL, "evil")


def renamed(honest, evil):
    """The attacker's objects under the names that nodes ask for: their layers are said to be the honest image's."""
    objects = evil.objects()
    catalog = Catalog(evil.store, open_index(None))
    for ours, theirs in zip(honest.image.diff_ids, evil.image.diff_ids, strict=True):
        manifest = catalog.layer_ref(theirs).manifest
        signature = evil.key.sign(Statement.layer(ours, manifest), "2030-01-01T00:00:00Z")
        objects[layout.layer_ref_key(ours)] = Ref(manifest, "2030-01-01T00:00:00Z", (signature,)).encode()
    # And the honest chains are said to be of their layers.
    ours, theirs = honest.image.diff_ids, evil.image.diff_ids
    for number, chain in enumerate(chain_ids(ours)):
        parent = chain_ids(ours)[number - 1] if number else None
        objects[layout.chain_ref_key(chain)] = ChainRecord(theirs[number], parent).encode()
    return objects


def forged(honest, evil, kinds):
    """The honest store, with every object of these kinds replaced or added by the attacker; content is added always."""
    store = open_store("memory://")
    for key, data in honest.objects().items():
        store.put(key, data)
    for key, data in renamed(honest, evil).items():
        content = key.startswith(("packs/", "indexes/", "chunks/", "trees/", "manifests/"))
        if content or key.startswith(tuple(kinds)):
            store.put(key, data)
    return store


def asked(catalog, honest):
    """What a node would mount for every name that it may be asked for; None: nothing."""
    found = {}
    for ref in (MODEL, OLD, OTHER):
        with contextlib.suppress(*REFUSED):
            found[ref] = catalog.resolve_model(ref)[1].tree.digest
    for diff, chain in zip(honest.image.diff_ids, chain_ids(honest.image.diff_ids), strict=True):
        with contextlib.suppress(*REFUSED):
            resolved = catalog.resolve_chain(chain)
            if resolved is not None:
                found[diff] = resolved[2].tree.digest
    return found


def expected(filled):
    return {**{ref: filled.trees[ref] for ref in (MODEL, OLD, OTHER)}, **filled.layers}


def test_every_kind_of_object_is_tried(made):
    """FORMAT.md's table of keys, and what the stores hold, have no kind that KINDS lacks."""
    keys = re.findall(r"^\| `([^`]+)`", FORMAT.partition("## Chunk\n")[0], flags=re.MULTILINE)
    known = {
        key for key in keys if not key.startswith(("bench/", "checks/", "gc/", "damaged/"))
    }  # nothing is mounted by these
    assert {kind for kind in KINDS if any(key.startswith(kind) for key in known)} == set(KINDS)
    assert all(key.startswith(KINDS) for key in known)
    for filled in made:
        assert {kind for kind in KINDS for key in filled.objects() if key.startswith(kind)} == set(KINDS)
        assert all(key.startswith(KINDS) for key in filled.objects())


@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), KINDS], ids=lambda k: k[0] if len(k) == 1 else "all")
def test_nothing_but_what_was_signed_is_had(made, kinds):
    honest, evil = made
    found = asked(trusting(forged(honest, evil, kinds), HONEST), honest)
    assert found.items() <= expected(honest).items()


def test_without_trust_the_same_forgeries_are_believed(made):
    """Else the tests above would show nothing."""
    honest, evil = made
    found = asked(Catalog(forged(honest, evil, KINDS), open_index(None)), honest)
    assert {ref: found[ref] for ref in (MODEL, OLD, OTHER)} == evil.trees
    found = asked(Catalog(forged(honest, evil, ["refs/layers/"]), open_index(None)), honest)
    assert {found[diff] for diff in honest.image.diff_ids} == set(evil.layers.values())
    # And what is refused is refused for that alone: the attacker's own nodes have it.
    assert asked(trusting(forged(honest, evil, ["refs/layers/", "refs/models/"]), EVIL), honest) == {
        **evil.trees,
        **dict(zip(honest.image.diff_ids, evil.layers.values(), strict=True)),
    }


def test_what_is_signed_passes_untouched(made):
    honest, _ = made
    assert asked(trusting(honest.store, HONEST), honest) == expected(honest)
    assert asked(trusting(honest.store, EVIL, HONEST), honest) == expected(honest)
    assert asked(trusting(honest.store, EVIL), honest) == {}


def test_every_ref_in_the_place_of_every_other(made):
    """Signatures are sound, and of something else: a ref names nothing under another key."""
    honest, _ = made
    objects = honest.objects()
    refs = [key for key in objects if key.startswith(("refs/models/", "refs/layers/"))]
    assert len(refs) >= 5
    for at in refs:
        for other in refs:
            store = open_store("memory://")
            for key, data in {**objects, at: objects[other]}.items():
                store.put(key, data)
            found = asked(trusting(store, HONEST), honest)
            assert found.items() <= expected(honest).items()
            assert (len(found) == len(expected(honest))) is (at == other)


def test_a_signature_moved_to_another_manifest_counts_no_more(made):
    honest, evil = made
    store = forged(honest, evil, ())
    key = layout.model_ref_key(MODEL)
    ref = Ref.decode(store.get(key), key)
    theirs = Catalog(evil.store, open_index(None)).model_ref(MODEL)
    both = (*ref.signatures, *theirs.signatures)
    for manifest in (theirs.manifest, Catalog(store, open_index(None)).model_ref(OTHER).manifest):
        store.put(key, replace(ref, manifest=manifest, signatures=both).encode())
        with pytest.raises(UntrustedError, match="made for something else, or altered"):
            trusting(store, HONEST).resolve_model(MODEL)


def test_an_older_signed_version_under_its_own_tag_is_believed(made, tmp_path):
    """What is not promised, said by a test: a tag that moved can be moved back to what was signed for it."""
    honest, _ = made
    store = forged(honest, honest, ())
    key = layout.model_ref_key(MODEL)
    before = bytes(store.get(key))
    (tmp_path / "news").mkdir()
    (tmp_path / "news" / "weights").write_bytes(b"news")
    moved = push_model(signing(store, HONEST), tmp_path / "news", MODEL, spool_dir=tmp_path / "spool")
    assert moved.manifest.tree.digest != honest.trees[MODEL]
    store.put(key, before)
    assert trusting(store, HONEST).resolve_model(MODEL)[1].tree.digest == honest.trees[MODEL]


def test_digests_given_by_hand_and_by_images_need_a_signed_tree(made):
    honest, evil = made
    store = forged(honest, evil, KINDS)
    node = trusting(store, HONEST)
    ours, theirs = (Catalog(f.store, open_index(None)).model_ref(MODEL).manifest for f in made)
    for manifest in (ours, theirs):  # all trees' signatures are the attacker's now, where both had one
        by_digest = ModelRef(MODEL.name, None, manifest)
        if manifest == ours:
            assert node.resolve_model(by_digest)[1].tree.digest == honest.trees[MODEL]
        else:
            with pytest.raises(UntrustedError):
                node.resolve_model(by_digest)
    node.check_tree(honest.placed)
    with pytest.raises(UntrustedError, match="not trusted here"):
        node.check_tree(evil.placed)
    for tree in (*honest.layers.values(), "0" * 64):  # signed as a layer, or not at all
        with pytest.raises(UntrustedError, match="is not signed"):
            node.check_tree(tree)
    # A sound signature of another tree, in its place.
    store.put(layout.tree_signatures_key(evil.placed), store.get(layout.tree_signatures_key(honest.placed)))
    with pytest.raises(UntrustedError):
        node.check_tree(evil.placed)


def test_a_chain_is_what_its_id_says(made):
    """The id is a hash of what it stands for, so a forged record is noticed with trust and without."""
    honest, evil = made
    chain = chain_ids(honest.image.diff_ids)[1]
    key = layout.chain_ref_key(chain)
    bottom = honest.image.diff_ids[0]
    for record in (
        ChainRecord(honest.image.diff_ids[0], None),
        ChainRecord(honest.image.diff_ids[1], None),
        ChainRecord(evil.image.diff_ids[1], bottom),
        ChainRecord(honest.image.diff_ids[1], evil.image.diff_ids[0]),
        ChainRecord(honest.image.diff_ids[1], chain),
    ):
        store = forged(honest, honest, ())
        store.put(key, record.encode())
        for catalog in (Catalog(store, open_index(None)), trusting(store, HONEST)):
            with pytest.raises(DamagedError, match="another chain"):
                catalog.resolve_chain(chain)


def test_a_layer_made_for_other_lower_layers_is_not_had(made):
    """A true chain record for which nobody made the layer: its directories would have another image's attributes."""
    honest, _ = made
    store = forged(honest, honest, ())
    catalog = signing(store, HONEST)
    diff = honest.image.diff_ids[1]
    manifest = catalog.layer(diff)[1]
    parent, other = chain_ids(honest.image.diff_ids)[0], "sha256:" + "5" * 64
    catalog.set_layer(diff, catalog.put_manifest(replace(manifest, labels={PARENT_LABEL: parent})))
    catalog.set_chain(chain_ids([other, diff])[1], ChainRecord(diff, other))
    node = trusting(store, HONEST)
    assert node.resolve_chain(chain_ids([parent, diff])[1]) is not None
    assert node.resolve_chain(chain_ids([other, diff])[1]) is None


# The index


@pytest.fixture(params=["sqlite", "redis"])
def index_url(request, tmp_path):
    return f"sqlite:{tmp_path}/index.db" if request.param == "sqlite" else redis_server.standalone().url()


def test_forged_copies_in_the_index_are_passed_over(made, index_url):
    honest, evil = made
    store = forged(honest, evil, ())
    with contextlib.closing(open_index(index_url)) as index:
        uuid = Catalog(store, open_index(None)).check_store().uuid
        index.bind(uuid)
        copies = {k: v for k, v in renamed(honest, evil).items() if k.startswith(("refs/layers/", "refs/chains/"))}
        for key, data in copies.items():
            index.put_ref(key, data)
        assert asked(trusting(store, HONEST, index=index), honest) == expected(honest)
        # They are put right, and the copies are checked as what the bucket says is.
        assert all(index.get_ref(key) == bytes(store.get(key)) for key in copies if key in honest.objects())
        assert asked(trusting(store, HONEST, index=index), honest) == expected(honest)
        assert asked(trusting(store, EVIL, index=index), honest) == {}


# Who signs


def lying_tables(store, content, spoilt):
    """A pack of the attacker's that is said to hold `content`; what it holds is `spoilt`. Sound but for that."""
    places, data = [], b""
    for said, is_ in zip(content, spoilt, strict=True):
        places.append(ChunkEntry(digest(said), len(said), len(data) // BLOCK))
        data += is_ + bytes(-len(is_) % BLOCK)
    frames = [encode_frame(data[at : at + MODEL_FRAME]) for at in range(0, len(data), MODEL_FRAME)]
    table = encode_chunk_table(places)
    index = PackIndex(MODEL_FRAME, len(data), tuple(e for _, e in frames), bytes.fromhex(hexdigest(table)))
    store.put(layout.pack_key(index.pack_id), b"".join(bytes(stored) for stored, _ in frames))
    store.put(layout.chunk_table_key(index.pack_id), table)
    store.put(layout.pack_index_key(index.pack_id), index.encode())
    return index.pack_id


@pytest.fixture
def source(tmp_path):
    """A model of a full chunk and a small file."""
    directory = tmp_path / "source"
    directory.mkdir()
    content = (bytes(range(256)) * (CHUNK // 256), b"the small file")
    (directory / "large").write_bytes(content[0])
    (directory / "small").write_bytes(content[1])
    return directory, content


SPOILT = {
    "a full chunk": lambda large, small: (b"x" + large[1:], small),
    "its end": lambda large, small: (large[:-1] + b"x", small),
    "a small file": lambda large, small: (large, b"x" + small[1:]),
    "behind a small file's end": lambda large, small: (large, small + b"x"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_who_signs_relies_on_no_content_that_is_not_there(source, tmp_path, how):
    """Deduplication believes chunk tables and the index; a signature would vouch for what they lie about."""
    directory, content = source
    for catalog_of, fooled in ((lambda s: Catalog(s, open_index(None)), True), (lambda s: signing(s, HONEST), False)):
        store = open_store("memory://")
        catalog = catalog_of(store)
        catalog.ensure_store()
        lie = lying_tables(store, content, SPOILT[how](*content))
        result = push_model(catalog, directory, MODEL, spool_dir=tmp_path / "spool")
        root, packs = read_tree(catalog, result.manifest.tree.digest), read_packs(catalog, result.manifest)
        assert lie in packs or not fooled
        if how != "behind a small file's end":
            read = (content_of(find(root, b"large"), packs), content_of(find(root, b"small"), packs))
            assert (read == content) is not fooled
        else:  # seen by programs that map the file
            (chunk,) = find(root, b"small").content.chunks
            end = chunk.block * BLOCK + chunk.length
            assert (packs[chunk.pack_id][end : end + 1] == b"x") is fooled


def test_who_signs_relies_on_no_place_that_the_index_makes_up(source, index_url, tmp_path):
    """The bucket is honest; the index says that another model's content is what is pushed."""
    directory, content = source
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "w").write_bytes(b"theirs" * CHUNK)
    for sign in (False, True):
        store = open_store("memory://")
        (pack, *_) = push_model(
            Catalog(store, open_index(None)), tmp_path / "theirs", OTHER, spool_dir=tmp_path / "spool"
        ).manifest.packs
        with contextlib.closing(signing(store, HONEST, index_url)) as catalog:
            if not sign:
                catalog.vouching = Vouching()
            catalog.check_store()
            catalog.index.add_pack(pack.id, [ChunkEntry(digest(data), len(data), 0) for data in content])
            result = push_model(catalog, directory, MODEL, spool_dir=tmp_path / "spool")
            root, packs = read_tree(catalog, result.manifest.tree.digest), read_packs(catalog, result.manifest)
        read = (content_of(find(root, b"large"), packs), content_of(find(root, b"small"), packs))
        assert (read == content) is sign


def test_who_signs_relies_on_no_layout_that_somebody_made_up(tmp_path):
    """A layout record names packs of whose chunk tables the places are taken before all others."""
    files = [b"file %d" % number * 500 for number in range(20)]
    for sign in (False, True):
        store = open_store("memory://")
        catalog = signing(store, HONEST) if sign else Catalog(store, open_index(None))
        with Ingest(catalog, spool_dir=tmp_path / "spool", frame_size=LAYER_FRAME) as ingest:
            root = Node(stat.S_IFDIR | 0o755)
            for number, data in enumerate(files):
                root.children[b"%d" % number] = Node(
                    stat.S_IFREG, content=ingest.add_stream(io.BytesIO(data), len(data))
                )
            ingest.finish(root, KIND_LAYER, "test")
        lie = lying_tables(store, files, [b"x" + data[1:] for data in files])
        places = {(digest(data), len(data)): ChunkPlace(lie, number) for number, data in enumerate(files)}
        with Ingest(
            catalog, spool_dir=tmp_path / "spool", frame_size=LAYER_FRAME, sync=False, laid_out=places
        ) as ingest:
            for number, data in enumerate(files):
                content = ingest.add_stream(io.BytesIO(data), len(data), rank=number)
                root.children[b"%d" % number] = Node(stat.S_IFREG, content=content)
            _, manifest = ingest.finish(root, KIND_LAYER, "test")
        found, packs = read_tree(catalog, manifest.tree.digest), read_packs(catalog, manifest)
        read = [content_of(found.children[b"%d" % number], packs) for number in range(len(files))]
        assert (read == files) is sign


def test_what_is_there_is_shared_by_who_signs(source, tmp_path):
    directory, _ = source
    store = open_store("memory://")
    first = push_model(Catalog(store, open_index(None)), directory, MODEL, spool_dir=tmp_path / "spool")
    again = push_model(signing(store, HONEST), directory, OTHER, spool_dir=tmp_path / "spool")
    assert (again.new_packs, again.manifest.tree) == (0, first.manifest.tree)


def test_who_signs_reads_layers_again_that_nobody_signed(made, tmp_path):
    """The attacker's layer under an honest diff id is replaced, not signed."""
    honest, evil = made
    store = forged(honest, evil, KINDS)
    catalog = signing(store, HONEST)
    result = index_image(catalog, honest.image.source, spool_dir=tmp_path)
    assert not any(layer.reused for layer in result.layers)
    found = asked(trusting(store, HONEST), honest)
    assert {diff: found[diff] for diff in honest.layers} == honest.layers
    # What is signed by a trusted key is taken as it is.
    again = index_image(catalog, honest.image.source, spool_dir=tmp_path)
    assert all(layer.reused for layer in again.layers)


def test_attaching_signs_no_model_that_nobody_signed(made, tmp_path):
    honest, evil = made
    catalog = signing(forged(honest, evil, KINDS), HONEST)
    with pytest.raises(UntrustedError, match="org/model:prod"):
        attach(catalog, honest.image.source, f"oci:{tmp_path}/out:1", [(MODEL, "/models/m")])
    assert not (tmp_path / "out").exists()


def test_publishing_signs_no_model_that_nobody_signed(made, tmp_path):
    honest, evil = made
    catalog = signing(forged(honest, evil, KINDS), HONEST)
    with pytest.raises(UntrustedError, match="org/model:prod"):
        publish_model(catalog, MODEL, f"oci:{tmp_path}/out:1")
    assert not (tmp_path / "out").exists()


def test_attaching_reads_the_image_where_its_layers_are_not_signed(made, tmp_path):
    """The placed tree copies the attributes of directories above the model, and is signed: they must be the image's."""
    honest, evil = made
    store = forged(honest, evil, ["refs/layers/"])
    result = attach(signing(store, HONEST), honest.image.source, f"oci:{tmp_path}/out:1", [(MODEL, "/models/m")])
    assert result.stubs[0].annotations[ANNOTATION] == honest.placed
