"""Fetching a tree: everything verified, once, in time, or an honest error."""

import stat
import threading
import time

import pytest
from support.packs import make_pack, random_content
from support.stores import LastByteFlipStore, RecordingStore, SilentStore, SlowStore

from floe.ingest.entries import Chunk, FileContent, Node
from floe.ingest.erofs_writer import build_image
from floe.store import erofs, layout
from floe.store.cache import NodeCache
from floe.store.erofs_inodes import Inodes
from floe.store.errors import DamagedError, DeadlineError, NotFoundError
from floe.store.ids import digest, hexdigest
from floe.store.objects.memory import MemoryStore
from floe.store.packindex import BLOCK
from floe.store.treeobject import encode_tree
from floe.store.trees import TreeStore


@pytest.fixture
def memory():
    return MemoryStore()


@pytest.fixture
def packs(memory):
    return [make_pack(random_content(8 * BLOCK, seed)).publish(memory) for seed in range(5)]


@pytest.fixture
def tree(memory, packs):
    root = Node(stat.S_IFDIR | 0o755)
    for number, pack in enumerate(packs):
        chunk = Chunk(digest(pack.content), len(pack.content), pack.id, 0)
        content = FileContent(len(pack.content), 15, (chunk,))
        root.children[b"%d" % number] = Node(stat.S_IFREG | 0o644, content=content)
    image = build_image(root, {pack.id: 8 for pack in packs})
    name = hexdigest(image)
    memory.put(layout.tree_key(name), encode_tree(image))
    return name


@pytest.fixture
def cache(tmp_path):
    return NodeCache(tmp_path / "cache")


def test_all_pack_indexes_are_asked_for_at_the_same_time(memory, packs, tree, cache):
    gate = threading.Event()
    store = SlowStore(memory, gate=gate, matches=f"{layout.PACK_INDEXES}/")
    found = []
    fetching = threading.Thread(target=lambda: found.append(TreeStore(store, cache).fetch(tree, 20)))
    fetching.start()
    until = time.monotonic() + 10
    while store.waiting < len(packs) and time.monotonic() < until:
        time.sleep(0.002)
    waiting = store.waiting
    gate.set()
    fetching.join(20)
    assert waiting == len(packs)
    assert len(found[0].packs) == len(packs)


def test_a_tree_is_fetched_once_and_then_local(memory, packs, tree, cache):
    store = RecordingStore(memory)
    trees = TreeStore(store, cache)
    assert trees.fetch_local(tree) is None
    found = trees.fetch(tree, 10)
    assert {p.id for p in found.packs} == {p.id for p in packs}
    assert all(p.data.stat().st_size == p.content_size == 8 * BLOCK and not p.complete for p in found.packs)
    assert hexdigest(found.image.read_bytes()) == tree
    assert len(store.requests) == 6
    assert trees.fetch(tree, 10) == TreeStore(store, NodeCache(cache.root)).fetch_local(tree) == found
    assert len(store.requests) == 6


def test_many_threads_cause_one_fetch(memory, tree, cache):
    store = SilentStore(RecordingStore(memory))
    trees, found = TreeStore(store, cache), []
    threads = [threading.Thread(target=lambda: found.append(trees.fetch(tree, 20))) for _ in range(20)]
    for thread in threads:
        thread.start()
    store.release()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    assert len(store.inner.requests) == 6


def test_a_silent_store_ends_in_the_deadline_and_is_found_later(memory, tree, cache):
    store = SilentStore(memory)
    trees = TreeStore(store, cache)
    with pytest.raises(DeadlineError, match=tree):
        trees.fetch(tree, 0.1)
    store.release()
    assert trees.fetch(tree, 10).digest == tree


@pytest.mark.parametrize("matches", [layout.TREES, layout.PACK_INDEXES])
def test_damage_in_transit_is_fetched_again_and_at_rest_told(memory, tree, cache, tmp_path, matches):
    assert TreeStore(LastByteFlipStore(memory, matches, 2), cache).fetch(tree, 10).digest == tree
    with pytest.raises(DamagedError) as caught:
        TreeStore(LastByteFlipStore(memory, matches), NodeCache(tmp_path / "other")).fetch(tree, 10)
    assert caught.value.hint


def test_what_is_not_in_the_store_is_named(memory, packs, tree, cache):
    memory.delete(layout.pack_index_key(packs[2].id))
    with pytest.raises(NotFoundError, match=packs[2].id):
        TreeStore(memory, cache).fetch(tree, 10)
    with pytest.raises(NotFoundError, match="0" * 64):
        TreeStore(memory, cache).fetch("0" * 64, 10)


def test_damaged_local_files_are_fetched_again(memory, packs, tree, cache):
    found = TreeStore(memory, cache).fetch(tree, 10)
    for path in (found.image, cache.folder(packs[0].id) / "index"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    fresh = NodeCache(cache.root)
    assert fresh.tree_path(tree) is None
    assert TreeStore(memory, fresh).fetch_local(tree) is None
    assert fresh.index(packs[0].id) is None
    assert TreeStore(memory, fresh).fetch(tree, 10).digest == tree
    assert fresh.index(packs[0].id) == packs[0].index


def unsound(memory):
    """A tree by its right digest, in which an inode has a link too many."""
    image = bytearray(build_image(Node(stat.S_IFDIR | 0o755, children={b"f": Node(stat.S_IFREG | 0o644)}), {}))
    inodes = Inodes(bytes(image))
    nid = inodes.lookup(inodes.inode(inodes.superblock.root_nid), b"f")
    image[nid * erofs.SLOT + 44] = 2
    checksum = erofs.superblock_checksum(image)
    image[erofs.SUPERBLOCK_OFFSET + 4 : erofs.SUPERBLOCK_OFFSET + 8] = checksum.to_bytes(4, "little")
    name = hexdigest(image)
    memory.put(layout.tree_key(name), encode_tree(image))
    return name, bytes(image)


def test_a_tree_that_is_what_its_digest_says_and_yet_unsound_is_not_kept(memory, cache):
    name, _ = unsound(memory)
    trees = TreeStore(memory, cache)
    for _ in range(2):
        with pytest.raises(DamagedError, match=f"tree {name} is damaged"):
            trees.fetch(name, 20)
        assert trees.fetch_local(name) is None
    assert list(cache.trees.iterdir()) == []


def test_a_tree_that_an_earlier_version_kept_is_checked_before_it_is_used(memory, cache, tree):
    TreeStore(memory, cache).fetch(tree, 20)
    name, image = unsound(memory)
    (cache.trees / f"{name}.erofs").write_bytes(image)
    (cache.trees / f"{tree}.checked").unlink()
    fresh = TreeStore(memory, NodeCache(cache.root))
    for use in (fresh.fetch_local, lambda digest: fresh.fetch(digest, 20)):
        with pytest.raises(DamagedError, match="links"):
            use(name)
    assert fresh.fetch_local(tree) is not None
    assert (cache.trees / f"{tree}.checked").exists()
