"""The snapshotter with everything real below it: store, node cache, tree mounts; no containerd."""

import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from support.mounts import content_of, mount_node
from support.snapshots import REF, Node, Status, mounted, status

from floe.mount.mountinfo import mount_at, read_mounts
from floe.snapshotter.storelayers import StoreLayers
from floe.store import layout
from floe.store.cache import NodeCache
from floe.store.catalog import Catalog
from floe.store.ids import chain_ids, hexdigest
from floe.store.index import NullIndex
from floe.store.objects import open_store
from floe.store.records import KIND_LAYER, ChainRecord, Manifest, PackEntry, Sizes, TreeEntry
from floe.store.treeobject import encode_tree
from floe.store.trees import TreeStore

SIZE = 1 << 20


class StoreNode:
    """A node whose layers come from a store in a directory; `index` puts a layer there, its packs into the cache."""

    def __init__(self, base, mounts, kind):
        self.base = base
        self.mounts = mounts
        self.catalog = Catalog(open_store(f"file://{base}/store", retry=False), NullIndex())
        self.catalog.ensure_store()
        self.mounter = mounts.mounter(kind=kind)
        self.trees = TreeStore(self.catalog.store, mounts.cache)
        self.node = Node(base / "n", StoreLayers(self.catalog, self.trees, self.mounter), prepare_timeout=5)

    def index(self, name, parent=None, *, complete=True):
        """Store a layer of one random file `file0`; its chain id and tree."""
        scratch = NodeCache(self.base / f"scratch-{name}")
        tree = self.mounts.tree(name, complete=complete, size=SIZE, cache=scratch)
        self.mounts.pack(content_of(name, 0, SIZE), complete=complete)
        image = tree.image.read_bytes()
        self.catalog.store.put(layout.tree_key(tree.digest), encode_tree(image))
        packs = []
        for pack in tree.packs:
            index = (scratch.folder(pack.id) / "index").read_bytes()
            self.catalog.store.put(layout.pack_index_key(pack.id), index)
            packs.append(PackEntry(pack.id, pack.content_size, pack.content_size, 1 << 20))
        manifest = Manifest(
            KIND_LAYER,
            TreeEntry(tree.digest, len(image)),
            tuple(packs),
            Sizes(1, 4, SIZE),
            name,
            "2024-01-01T00:00:00Z",
        )
        diff_id = f"sha256:{hexdigest(name.encode())}"
        chain = chain_ids([parent, diff_id] if parent else [diff_id])[-1]
        self.catalog.set_layer(diff_id, self.catalog.put_manifest(manifest))
        self.catalog.set_chain(chain, ChainRecord(diff_id, parent))
        return chain, tree.digest

    def pull(self, chain, parent=""):
        assert status(self.node.client.prepare, f"extract {chain}", parent, {REF: chain}) is Status.ALREADY_EXISTS
        (found,) = self.node.client.list(f'kind==committed,labels."{REF}"=={chain},parent=="{parent}"')
        return found.name


@pytest.fixture(params=["erofs", "portable"])
def store_node(tmp_path, request):
    (tmp_path / "m").mkdir()
    with mount_node(tmp_path / "m") as mounts:
        made = StoreNode(tmp_path, mounts, request.param)
        yield made
        made.node.stop()
        for entry in reversed(read_mounts()):
            if Path(entry.target).is_relative_to(made.node.config.root):
                os.system(f"umount {entry.target}")


def mounted_tree(made, tree):
    return mount_at(str(made.mounts.run / "trees" / tree), read_mounts())


def test_layers_of_the_store_are_mounted_and_given_back(store_node):
    client = store_node.node.client
    one, tree_one = store_node.index("one")
    two, tree_two = store_node.index("two", one)
    lower = store_node.pull(one)
    upper = store_node.pull(two, lower)
    with mounted(client.prepare("c", upper), store_node.base) as root:
        assert (root / "file0").read_bytes() == content_of("two", 0, SIZE)
        assert (root / "name").readlink() == Path("two")
        (root / "file0").write_bytes(b"changed")
    with mounted(client.view("v", lower), store_node.base) as root:
        assert (root / "file0").read_bytes() == content_of("one", 0, SIZE)
    usage = client.usage(lower)
    assert SIZE <= usage.size < 2 * SIZE
    assert usage.inodes == 2
    for name in ("c", "v", upper, lower):
        client.remove(name)
    assert mounted_tree(store_node, tree_one)
    client.cleanup()
    assert not mounted_tree(store_node, tree_one)
    assert not mounted_tree(store_node, tree_two)
    assert list((store_node.node.config.root / "s").iterdir()) == []


def test_two_uses_share_one_mount(store_node):
    client = store_node.node.client
    chain, tree = store_node.index("one")
    first = store_node.pull(chain)
    store_node.node.layer("base")
    second = store_node.pull(chain, "base")
    assert len(store_node.mounter.uses(tree)) == 2
    client.remove(first)
    client.cleanup()
    with mounted(client.prepare("c", second), store_node.base) as root:
        assert (root / "file0").read_bytes() == content_of("one", 0, SIZE)
    client.remove("c")
    client.remove(second)
    client.cleanup()
    assert store_node.mounter.uses(tree) == set()


def test_after_a_reboot_trees_are_mounted_again_without_the_store(store_node):
    chain, _ = store_node.index("one")
    name = store_node.pull(chain)
    before = store_node.node.client.prepare("c", name)
    store_node.node.stop()
    # A reboot: no mounts, nothing in the run directory.
    for entry in reversed(read_mounts()):
        if Path(entry.target).is_relative_to(store_node.base):
            os.system(f"umount {entry.target}")
    Path(store_node.base / "store").rename(store_node.base / "gone")
    store_node.node.start()
    assert store_node.node.failed == []
    assert store_node.node.client.mounts("c") == before
    with mounted(before, store_node.base) as root:
        assert (root / "file0").read_bytes() == content_of("one", 0, SIZE)


def test_clean_up_after_a_reboot_drops_the_pins_of_what_was_removed(store_node):
    client = store_node.node.client
    names = {
        store_node.pull(chain): tree for chain, tree in (store_node.index(text) for text in ("one", "two", "three"))
    }
    (gone, lost, kept) = names
    client.remove(gone)
    store_node.node.stop()
    for entry in reversed(read_mounts()):
        if Path(entry.target).is_relative_to(store_node.base):
            os.system(f"umount {entry.target}")
    shutil.rmtree(store_node.mounts.run)
    # One is removed before the reboot; another's row is lost, as with a database put back from a backup.
    with sqlite3.connect(store_node.node.config.root / "metadata.db") as db:
        db.execute("DELETE FROM snapshots WHERE name = ?", (lost,))
    db.close()
    store_node.mounter = store_node.mounts.mounter()
    store_node.node.layers = StoreLayers(store_node.catalog, store_node.trees, store_node.mounter)
    store_node.node.start()
    trees = {name: store_node.trees.fetch_local(tree) for name, tree in names.items()}
    pinned = {name for name, tree in trees.items() if store_node.mounts.cache.pins(tree.packs[0].id)}
    assert pinned == {kept}


@pytest.mark.slow
def test_clean_up_finishes_what_a_release_had_to_leave(store_node):
    client = store_node.node.client
    chain, tree = store_node.index("one")
    name = store_node.pull(chain)
    # An overlay in another place keeps the tree's superblock after its unmount.
    with mounted(client.prepare("c", name), store_node.base):
        client.remove("c")
        client.remove(name)
        client.cleanup()
        local = store_node.trees.fetch_local(tree)
        assert store_node.mounts.cache.pins(local.packs[0].id)
    client.cleanup()
    assert not store_node.mounts.cache.pins(local.packs[0].id)


def test_uses_are_those_the_mounter_has_recorded(store_node):
    chain, tree = store_node.index("one")
    store_node.pull(chain)
    assert store_node.node.layers.uses() == [(tree, "snapshot-1")]
    local = store_node.trees.fetch_local(tree)
    assert store_node.node.layers.packs(tree) == {pack.id for pack in local.packs}
    assert store_node.node.layers.packs("f" * 64) is None
    usage = store_node.node.layers.usage(tree, frozenset(pack.id for pack in local.packs))
    assert (usage.inodes, usage.size < SIZE) == (1, True)


def test_layer_that_needs_the_pack_filesystem(store_node):
    client = store_node.node.client
    chain, _ = store_node.index("one", complete=False)
    assert status(client.prepare, "k", "", {REF: chain}) is Status.OK
    assert store_node.node.snapshotter.metrics().fallbacks["packfs"] == 1
    store_node.mounts.serve()
    name = store_node.pull(chain)
    with mounted(client.prepare("c", name), store_node.base) as root:
        assert (root / "file0").read_bytes() == content_of("one", 0, SIZE)


def test_no_store_at_all_means_not_indexed(tmp_path):
    (tmp_path / "m").mkdir()
    with mount_node(tmp_path / "m") as mounts:
        store = open_store(f"file://{tmp_path}/nowhere", retry=False)
        layers = StoreLayers(Catalog(store, NullIndex()), TreeStore(store, mounts.cache), mounts.mounter())
        node = Node(tmp_path / "n", layers)
        for chain in ("sha256:" + "a" * 64, "sha512:" + "a" * 128, "nonsense"):
            assert status(node.client.prepare, chain, "", {REF: chain}) is Status.OK
        assert node.snapshotter.metrics().fallbacks["not_indexed"] == 3
        assert node.snapshotter.metrics().breaker == "closed"
        node.stop()
