"""Pushing a directory, over each embedded store: content, deduplication, what is kept and what is refused."""

from __future__ import annotations

import io
import os
import random
import socket
import stat
import struct
from pathlib import Path

import pytest
from support.stores import LastByteFlipStore
from support.trees import content_of, read_packs, read_tree

from floe.ingest import packwriter
from floe.ingest.entries import Node, find, place_tree
from floe.ingest.model import push_model
from floe.ingest.publish import Ingest
from floe.ingest.treeout import publish_tree
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.errors import BadInputError, DamagedError, NotFoundError
from floe.store.ids import ModelRef
from floe.store.index import open_index
from floe.store.nodes import CHUNK
from floe.store.objects import open_store
from floe.store.packindex import BLOCK, LAYER_FRAME, MODEL_FRAME
from floe.store.protection import Protection
from floe.store.records import KIND_LAYER

REF = ModelRef("m")


@pytest.fixture(params=["memory, no index", "file, sqlite"])
def catalog(request, tmp_path):
    if request.param.startswith("memory"):
        made = Catalog(open_store("memory://"), open_index(None))
    else:
        made = Catalog(open_store(f"file://{tmp_path}/store"), open_index(f"sqlite:{tmp_path}/index.db"))
    yield made
    made.close()


@pytest.fixture
def model(tmp_path) -> Path:
    random.seed(1)
    home = tmp_path / "model"
    home.mkdir()
    (home / "config.json").write_text('{"a": 1}')
    (home / "weights.safetensors").write_bytes(random.randbytes(3 * CHUNK + 12345))
    (home / "empty").touch()
    (home / "sub").mkdir()
    (home / "sub" / "vocab.txt").write_bytes(random.randbytes(70_000))
    (home / "sub" / "link").symlink_to("../config.json")
    return home


def push(catalog, directory, tmp_path, ref=REF, **options):
    return push_model(catalog, directory, ref, spool_dir=tmp_path / "spool", **options)


def read_model(catalog, manifest) -> tuple[Node, dict[str, bytes]]:
    return read_tree(catalog, manifest.tree.digest), read_packs(catalog, manifest)


def test_what_was_pushed_is_read_back(catalog, model, tmp_path):
    result = push(catalog, model, tmp_path)
    root, packs = read_model(catalog, result.manifest)
    for path in ("config.json", "weights.safetensors", "empty", "sub/vocab.txt"):
        node = find(root, path.encode())
        assert content_of(node, packs) == (model / path).read_bytes(), path
        assert node.mtime * 10**9 + node.mtime_ns == (model / path).stat().st_mtime_ns
    assert find(root, b"sub/link").link == b"../config.json"
    assert catalog.resolve_model(REF) == (result.digest, result.manifest)
    assert (result.previous, result.new_packs) == (None, 1)
    assert result.manifest.sizes.files == 4
    assert result.total_bytes == result.manifest.sizes.content
    assert list((tmp_path / "spool").iterdir()) == []


def test_full_chunks_come_first_in_a_pack_aligned(catalog, model, tmp_path):
    root, _ = read_model(catalog, push(catalog, model, tmp_path).manifest)
    chunks = root.children[b"weights.safetensors"].content.chunks
    assert [c.block * BLOCK for c in chunks[:3]] == [0, CHUNK, 2 * CHUNK]
    assert find(root, b"config.json").content.chunks[0].block * BLOCK >= 3 * CHUNK


def test_pushing_again_stores_nothing(catalog, model, tmp_path):
    first = push(catalog, model, tmp_path)
    again = push(catalog, model, tmp_path)
    assert (again.new_packs, again.new_bytes, again.digest) == (0, 0, first.digest)
    assert again.previous == first.digest
    assert again.deduplicated_bytes == again.total_bytes
    elsewhere = push(catalog, model, tmp_path, ModelRef("m", "two"))
    assert (elsewhere.new_packs, elsewhere.manifest.tree) == (0, first.manifest.tree)


def test_one_changed_chunk_stores_one_chunk(catalog, model, tmp_path):
    first = push(catalog, model, tmp_path)
    with (model / "weights.safetensors").open("r+b") as file:
        file.seek(CHUNK + 5)
        file.write(b"changed")
    second = push(catalog, model, tmp_path)
    assert second.previous == first.digest != second.digest
    assert second.new_packs == 1
    new = next(p for p in second.manifest.packs if p not in first.manifest.packs)
    assert new.content_size == CHUNK
    root, packs = read_model(catalog, second.manifest)
    assert content_of(root.children[b"weights.safetensors"], packs) == (model / "weights.safetensors").read_bytes()


def test_another_index_learns_from_the_bucket(catalog, model, tmp_path):
    push(catalog, model, tmp_path)
    other = Catalog(catalog.store, open_index(f"sqlite:{tmp_path}/other.db"))
    try:
        assert push(other, model, tmp_path).new_packs == 0
    finally:
        other.index.close()


def test_same_content_twice_is_stored_once(catalog, tmp_path):
    home = tmp_path / "m"
    home.mkdir()
    data = random.randbytes(CHUNK)
    (home / "a").write_bytes(data + data + b"tail")
    (home / "b").write_bytes(data)
    (home / "c").write_bytes(b"tail")
    result = push(catalog, home, tmp_path)
    assert [p.content_size for p in result.manifest.packs] == [CHUNK + BLOCK]
    root, packs = read_model(catalog, result.manifest)
    assert content_of(root.children[b"a"], packs) == data + data + b"tail"
    assert content_of(root.children[b"c"], packs) == b"tail"


def test_a_pack_that_is_gone_or_cut_is_not_relied_on(catalog, model, tmp_path):
    first = push(catalog, model, tmp_path)
    key = layout.pack_key(first.manifest.packs[0].id)
    data = bytes(catalog.store.get(key))
    catalog.store.put(key, data[:-1])
    again = push(catalog, model, tmp_path)
    assert again.new_packs == 1
    assert bytes(catalog.store.get(key)) == data
    read_model(catalog, again.manifest)


def test_packs_are_the_same_for_the_same_input(model, tmp_path):
    ids = []
    for name in ("one", "two"):
        made = Catalog(open_store(f"file://{tmp_path}/{name}"), open_index(None))
        ids.append([p.id for p in push(made, model, tmp_path, workers=3).manifest.packs])
        made.close()
    assert ids[0] == ids[1]


def test_large_input_is_split_into_packs(catalog, tmp_path):
    datas = [random.randbytes(CHUNK) for _ in range(5)] + [random.randbytes(300_000) for _ in range(20)]
    root = Node(stat.S_IFDIR | 0o755)
    with Ingest(catalog, spool_dir=tmp_path, frame_size=LAYER_FRAME, max_pack=2 * CHUNK) as ingest:
        for number, data in enumerate(datas):
            content = ingest.add_stream(io.BytesIO(data), len(data))
            root.children[b"%02d" % number] = Node(stat.S_IFREG | 0o644, content=content)
        _, manifest = ingest.finish(root, KIND_LAYER, "test")
        assert ingest.stats.new_packs == len(manifest.packs) >= 4
    tree, packs = read_model(catalog, manifest)
    assert all(p.content_size <= 2 * CHUNK for p in manifest.packs)
    for number, data in enumerate(datas):
        assert content_of(tree.children[b"%02d" % number], packs) == data


def test_a_tree_over_too_many_packs_is_rewritten(catalog, tmp_path):
    datas = [random.randbytes(5000 + 5000 * number) for number in range(12)]
    for data in datas:
        one = Node(stat.S_IFDIR | 0o755)
        with Ingest(catalog, spool_dir=tmp_path, frame_size=MODEL_FRAME) as ingest:
            one.children[b"f"] = Node(stat.S_IFREG | 0o644, content=ingest.add_stream(io.BytesIO(data), len(data)))
            ingest.finish(one, KIND_LAYER, "test")
    root = Node(stat.S_IFDIR | 0o755)
    with Ingest(catalog, spool_dir=tmp_path, frame_size=LAYER_FRAME, max_packs=8) as ingest:
        for number, data in enumerate([*datas, b"new", datas[0]]):
            content = ingest.add_stream(io.BytesIO(data), len(data))
            root.children[b"%02d" % number] = Node(stat.S_IFREG | 0o644, content=content)
        _, manifest = ingest.finish(root, KIND_LAYER, "test")
        assert ingest.stats.new_packs == 1
    assert len(manifest.packs) == 8
    tree, packs = read_model(catalog, manifest)
    for number, data in enumerate([*datas, b"new", datas[0]]):
        assert content_of(tree.children[b"%02d" % number], packs) == data


@pytest.mark.parametrize("times", [1, None])
def test_a_damaged_pack_that_must_be_rewritten_is_named(tmp_path, times):
    """Damaged on its way (`times` 1) it is read again; damaged in the store, the error says which object, and what takes it away."""
    inner = open_store("memory://")
    store = LastByteFlipStore(inner, layout.PACKS, times=times)
    made = Catalog(store, open_index(None))
    datas = [random.randbytes(5000 + number) for number in range(3)]

    def put(*contents, **options):
        root = Node(stat.S_IFDIR | 0o755)
        with Ingest(made, spool_dir=tmp_path, frame_size=LAYER_FRAME, **options) as ingest:
            for number, data in enumerate(contents):
                content = ingest.add_stream(io.BytesIO(data), len(data))
                root.children[b"%d" % number] = Node(stat.S_IFREG | 0o644, content=content)
            return ingest.finish(root, KIND_LAYER, "test")[1]

    first = [put(data) for data in datas]
    if times:
        tree, packs = read_model(made, put(*datas, max_packs=2))
        assert content_of(tree.children[b"0"], packs) == datas[0]
        return
    with pytest.raises(DamagedError, match="does not hold") as caught:
        put(*datas, max_packs=2)
    key = layout.pack_key(first[0].packs[0].id)
    assert key in str(caught.value)
    assert "fsck --deep --repair" in caught.value.hint
    inner.delete(key)  # as that does with what nobody has a copy of
    store.times = 0
    tree, packs = read_model(made, put(*datas, max_packs=2))
    assert content_of(tree.children[b"0"], packs) == datas[0]


def test_holes_are_found_and_not_stored(catalog, tmp_path):
    home = tmp_path / "m"
    home.mkdir()
    with (home / "sparse").open("wb") as file:
        file.truncate(40 << 30)
        file.seek(20 << 30)
        file.write(b"island")
    (home / "zeros").write_bytes(bytes(9 << 20))
    result = push(catalog, home, tmp_path)
    assert [p.content_size for p in result.manifest.packs] == [CHUNK]
    root, packs = read_model(catalog, result.manifest)
    chunks = root.children[b"sparse"].content.chunks
    assert sum(c is not None for c in chunks) == 1
    island = chunks[(20 << 30) // CHUNK]
    assert packs[island.pack_id][island.block * BLOCK :][:6] == b"island"
    assert root.children[b"zeros"].content.chunks == (None, None, None)


def test_attributes_of_a_model(catalog, tmp_path):
    home = tmp_path / "m"
    home.mkdir(mode=0o700)
    secret = home / "secret"
    secret.write_bytes(b"x")
    secret.chmod(0o4700)
    os.chown(secret, 1000, 1000)
    os.setxattr(secret, "user.kept", b"1")
    if os.geteuid() == 0:
        os.setxattr(secret, "trusted.left", b"1")
    os.utime(secret, ns=(0, 1_600_000_000 * 10**9))
    old = home / "old"
    old.write_bytes(b"y")
    os.utime(old, ns=(0, -1_500_000_000))
    os.link(old, home / "same")
    root, _ = read_model(catalog, push(catalog, home, tmp_path).manifest)
    node = root.children[b"secret"]
    assert (node.mode, node.uid, node.gid) == (stat.S_IFREG | 0o744, 0, 0)
    assert (node.mtime, node.mtime_ns) == (1_600_000_000, 1)
    assert node.xattrs == {b"user.kept": b"1"}
    assert root.mode == stat.S_IFDIR | 0o755
    assert (root.children[b"old"].mtime, root.children[b"old"].mtime_ns) == (-2, 500_000_000)
    assert root.children[b"old"] is root.children[b"same"]


def test_a_hugging_face_snapshot_is_followed_into_its_blobs(catalog, tmp_path):
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs" / "b1").write_bytes(b"weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/b1")
    (snapshot / "copy.safetensors").symlink_to(cache / "blobs" / "b1")
    (snapshot / "inside").symlink_to("model.safetensors")
    result = push(catalog, snapshot, tmp_path)
    root, packs = read_model(catalog, result.manifest)
    for name in (b"model.safetensors", b"copy.safetensors"):
        assert stat.S_ISREG(root.children[name].mode)
        assert content_of(root.children[name], packs) == b"weights"
    # A link to a link that leads outside is followed all the way as well.
    assert content_of(root.children[b"inside"], packs) == b"weights"
    whole = push(catalog, cache, tmp_path, ModelRef("whole"))
    root, _ = read_model(catalog, whole.manifest)
    assert find(root, b"snapshots/0123abc/model.safetensors").link == b"../../blobs/b1"


def test_symlinks_to_directories_inside_are_kept_relative(catalog, tmp_path):
    home = tmp_path / "m"
    (home / "a/real").mkdir(parents=True)
    (home / "a/real/f").write_bytes(b"x")
    (home / "b").mkdir()
    (home / "b/absolute").symlink_to(home / "a/real")
    (home / "b/around").symlink_to("../../m/a")
    (home / "top").symlink_to(home)
    (home / "plain").symlink_to("a/../a/real")
    root, _ = read_model(catalog, push(catalog, home, tmp_path).manifest)
    links = {name: find(root, name).link for name in (b"b/absolute", b"b/around", b"top", b"plain")}
    assert links == {b"b/absolute": b"../a/real", b"b/around": b"../a", b"top": b".", b"plain": b"a/../a/real"}


def refused(catalog, directory, tmp_path, error, match):
    catalog.ensure_store()
    with pytest.raises(error, match=match) as caught:
        push(catalog, directory, tmp_path)
    assert [info.key for info in catalog.store.list("")] == [layout.STORE_KEY]
    return caught.value


def test_bad_directories_are_refused_and_nothing_is_stored(catalog, tmp_path):
    home = tmp_path / "m"
    refused(catalog, home, tmp_path, NotFoundError, "no directory")
    home.mkdir()
    refused(catalog, home, tmp_path, BadInputError, "holds no file")
    (home / "sub").mkdir()
    assert refused(catalog, home, tmp_path, BadInputError, "holds no file").hint
    (home / "file").write_bytes(b"x")
    refused(catalog, home / "file", tmp_path, BadInputError, "not a directory")
    entry = home / "entry"
    os.mkfifo(entry)
    refused(catalog, home, tmp_path, BadInputError, "entry is a fifo")
    entry.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(home)  # a socket's path has 107 bytes
        server.bind("entry")
        os.chdir(here)
    refused(catalog, home, tmp_path, BadInputError, "entry is a socket")
    entry.unlink()
    entry.symlink_to("nowhere")
    refused(catalog, home, tmp_path, BadInputError, "leads nowhere")
    entry.unlink()
    entry.symlink_to("entry")
    refused(catalog, home, tmp_path, BadInputError, "leads nowhere")
    entry.unlink()
    entry.symlink_to("..")
    refused(catalog, home, tmp_path, BadInputError, "outside")


def test_a_digest_is_no_name_to_push_to(catalog, model, tmp_path):
    with pytest.raises(BadInputError, match="digest"):
        push(catalog, model, tmp_path, ModelRef("m", None, "0" * 64))


def test_progress_counts_every_byte(catalog, model, tmp_path):
    class Count:
        all = 0
        read = 0

        def total(self, nbytes):
            self.all = nbytes

        def advance(self, nbytes):
            self.read += nbytes

    progress = Count()
    result = push(catalog, model, tmp_path, progress=progress)
    assert progress.all == progress.read == result.total_bytes


def test_a_stored_tree_is_placed_at_a_path(catalog, model, tmp_path):
    result = push(catalog, model, tmp_path)
    placed = place_tree(read_tree(catalog, result.manifest.tree.digest), "/opt/models/m")
    tree = read_tree(catalog, publish_tree(catalog, placed, Protection(catalog.store)))
    packs = read_packs(catalog, result.manifest)
    weights = find(tree, b"opt/models/m/weights.safetensors")
    assert content_of(weights, packs) == (model / "weights.safetensors").read_bytes()
    catalog.store.delete(layout.pack_index_key(result.manifest.packs[0].id))
    with pytest.raises(DamagedError, match="missing"):
        publish_tree(catalog, placed, Protection(catalog.store))


def test_an_early_end_of_a_stream_is_bad_input(catalog, tmp_path):
    with (
        Ingest(catalog, spool_dir=tmp_path, frame_size=LAYER_FRAME) as ingest,
        pytest.raises(BadInputError, match="layer ends 7 bytes early"),
    ):
        ingest.add_stream(io.BytesIO(b"abc"), 10, "layer")


def test_attributes_that_cannot_be_stored_are_reported(catalog, tmp_path):
    acl = struct.pack("<I", 1)
    root = Node(stat.S_IFDIR | 0o755, xattrs={b"system.nfs4_acl": acl})
    with Ingest(catalog, spool_dir=tmp_path, frame_size=LAYER_FRAME) as ingest:
        ingest.finish(root, KIND_LAYER, "test")
        assert ["nfs4_acl" in warning for warning in ingest.stats.warnings] == [True]


def test_what_a_killed_push_left_is_swept_and_a_living_one_is_not(catalog, tmp_path):
    spool = tmp_path / "spool"
    left = spool / "floe-spool-dead"
    left.mkdir(parents=True)
    (left / "0.full").write_bytes(b"x")
    (spool / "other").mkdir()
    with (
        Ingest(catalog, spool_dir=spool, frame_size=LAYER_FRAME),
        Ingest(catalog, spool_dir=spool, frame_size=LAYER_FRAME),
    ):
        names = {path.name for path in spool.iterdir()}
        assert len(names) == 3
        assert "floe-spool-dead" not in names
    assert [path.name for path in spool.iterdir()] == ["other"]


def test_pending_frames_are_bounded():
    assert packwriter._PENDING <= 16 << 20
