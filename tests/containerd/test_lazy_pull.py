"""Pulls by CRI through Floe: nothing of an indexed image's layers is downloaded or unpacked."""

import hashlib
from pathlib import Path

import grpc
import pytest
from support.blobhost import BlobHost
from support.containerd import Containerd, each_version, versions
from support.images import add, build_oci, busybox, files
from support.mounts import content_of, mount_node, until
from support.snapshots import Node

from floe.ingest.oci.image import index_image
from floe.mount.mountinfo import read_mounts
from floe.mount.syscalls import unmount
from floe.snapshotter.storelayers import StoreLayers
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.frames import decode_frame
from floe.store.ids import chain_ids
from floe.store.index import NullIndex
from floe.store.objects import open_store
from floe.store.stub import ANNOTATION
from floe.store.trees import TreeStore

CONTENT = {"etc/motd": "one\n", "data/big": "x" * 300_000, "data/gone": "gone"}


def fill(tar):
    files({"etc/motd": "two\n"})(tar)
    add(tar, "data/.wh.gone", b"")


class LazyNode:
    """A store, a registry, the snapshotter; packs are whole in the node cache as soon as they are indexed."""

    def __init__(self, base, mounts):
        self.base = base
        self.mounts = mounts
        self.catalog = Catalog(open_store(f"file://{base}/store", retry=False), NullIndex())
        self.catalog.ensure_store()
        self.registry = BlobHost()
        trees = TreeStore(self.catalog.store, mounts.cache)
        self.node = Node(base / "n", StoreLayers(self.catalog, trees, mounts.mounter()), prepare_timeout=5)

    def index(self, image):
        """Put every layer of an image into the store, and its packs into the cache."""
        spool = self.base / "spool"
        spool.mkdir(exist_ok=True)
        index_image(self.catalog, image.source, spool_dir=spool)
        for chain in chain_ids(image.diff_ids):
            found = self.catalog.resolve_chain(chain)
            assert found is not None
            for pack in found[2].packs:
                self._make_whole(pack.id)

    def _make_whole(self, pack_id):
        store, cache = self.catalog.store, self.mounts.cache
        index = cache.add_index(pack_id, store.get(layout.pack_index_key(pack_id)))
        stored, content = bytes(store.get(layout.pack_key(pack_id))), []
        for number, (entry, start) in enumerate(zip(index.frames, index.stored_offsets, strict=False)):
            data = stored[start : start + entry.stored]
            content.append(bytes(decode_frame(data, entry, index.content_length(number)).content))
        cache.data_path(pack_id).write_bytes(b"".join(content))
        (cache.folder(pack_id) / "complete").touch()

    def close(self):
        self.registry.close()
        self.node.stop()
        for entry in reversed(read_mounts()):
            if Path(entry.target).is_relative_to(self.node.config.root):
                unmount(entry.target, detach=True)


@pytest.fixture
def lazy_node(tmp_path):
    (tmp_path / "m").mkdir()
    with mount_node(tmp_path / "m") as mounts:
        made = LazyNode(tmp_path, mounts)
        yield made
        made.close()


@pytest.fixture
def start(lazy_node, tmp_path):
    """Starts a containerd that pulls through the node; all are stopped at the end."""
    started = []

    def start(version, **settings):
        daemon = Containerd(
            version,
            tmp_path,
            snapshotter_address=lazy_node.node.config.address,
            snapshotter_root=lazy_node.node.config.root,
            registries=(lazy_node.registry.address,),
            **settings,
        )
        started.append(daemon)
        return daemon

    yield start
    for daemon in started:
        daemon.stop()


def tree_mounts(base):
    return [entry for entry in read_mounts() if entry.fstype == "erofs" and Path(entry.target).is_relative_to(base)]


def figures(lazy_node):
    return lazy_node.node.snapshotter.metrics()


@each_version()
def test_indexed_image_is_pulled_without_its_layers(version, lazy_node, start, tmp_path):
    image = build_oci(tmp_path / "image", [busybox(), files(CONTENT), fill], tag="1")
    lazy_node.index(image)
    reference = lazy_node.registry.add(image, "app")
    client = lazy_node.node.client
    cri = start(version).cri()
    before = client.names()
    cri.pull(reference)
    assert lazy_node.registry.layers_fetched() == 0
    assert (figures(lazy_node).snapshots["lazy"], sum(figures(lazy_node).fallbacks.values())) == (3, 0)
    pod = cri.run_pod("p")
    code, text = cri.run(pod, reference, ["sh", "-c", "cat /etc/motd; ls /data; md5sum < /data/big; id -u"])
    assert (code, text) == (0, "two\nbig\nd408ed46ebcc326f9e7c6bb9c77af1cd  -\n0\n")
    assert lazy_node.registry.layers_fetched() == 0
    # Removing the image gives everything back: containerd's garbage collection, then our Cleanup.
    cri.clean_up()
    cri.remove_image(reference)
    until(lambda: figures(lazy_node).snapshots["lazy"] == 0)
    assert client.names() == before
    client.cleanup()
    assert not tree_mounts(tmp_path)


@each_version()
def test_image_that_is_not_indexed_is_unpacked_and_counted(version, lazy_node, start, tmp_path):
    image = build_oci(tmp_path / "image", [busybox(), files(CONTENT), fill], tag="1")
    reference = lazy_node.registry.add(image, "app")
    cri = start(version).cri()
    cri.pull(reference)
    assert lazy_node.registry.layers_fetched() == 3
    assert figures(lazy_node).fallbacks["not_indexed"] == 3
    assert cri.run(cri.run_pod("p"), reference, ["cat", "/etc/motd"]) == (0, "two\n")


@each_version()
def test_containers_outlive_the_snapshotter(version, lazy_node, start, tmp_path):
    image = build_oci(tmp_path / "image", [busybox(), files(CONTENT)], tag="1")
    lazy_node.index(image)
    reference = lazy_node.registry.add(image, "app")
    cri = start(version).cri()
    cri.pull(reference)
    pod = cri.run_pod("p")
    container = cri.run_container(pod, reference, ["sleep", "1000"])
    lazy_node.node.stop()
    assert cri.execute(container, "cat", "/etc/motd") == (0, b"one\n", b"")
    lazy_node.node.start()
    assert cri.execute(container, "md5sum", "/data/big")[1].startswith(b"d408ed46")
    # containerd dials again after a pause of its own.
    until(lambda: succeeds(cri.run, pod, reference, ["true"]), 20)


def succeeds(call, *args):
    try:
        return call(*args) or True
    except grpc.RpcError as error:
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.NOT_FOUND):
            return False
        raise


@each_version()
def test_layer_annotated_with_a_model_is_that_model_or_the_pull_fails(version, lazy_node, start, tmp_path):
    tree = lazy_node.mounts.tree("model", size=1 << 20)
    stub = files({"models/m/README": "Floe is missing here"})
    image = build_oci(tmp_path / "image", [busybox(), stub], tag="1", annotations={1: {ANNOTATION: tree.digest}})
    reference = lazy_node.registry.add(image, "app")
    cri = start(version).cri()
    away = tmp_path / "away"
    tree.image.rename(away)
    with pytest.raises(grpc.RpcError, match=tree.digest):
        cri.pull(reference)
    away.rename(tree.image)
    # Again, as a kubelet does: containerd's garbage collection of the failed pull may run into the next one.
    until(lambda: succeeds(cri.pull, reference), 20)
    assert figures(lazy_node).snapshots["lazy"] == 1
    pod = cri.run_pod("p")
    expected = hashlib.md5(content_of("model", 0, 1 << 20)).hexdigest()
    assert cri.run(pod, reference, ["sh", "-c", "md5sum < /file0; ls /models 2>&1"])[1].startswith(f"{expected}  -\n")


@pytest.mark.parametrize("version", [version for version in versions() if version.is_2], ids=str)
def test_two_namespaces_share_what_they_may(version, lazy_node, start, tmp_path):
    image = build_oci(tmp_path / "image", [busybox(), files(CONTENT)], tag="1")
    lazy_node.index(image)
    reference = lazy_node.registry.add(image, "app")
    daemon = start(version)

    def pull(namespace):
        daemon.ctr(
            "images", "pull", "--snapshotter=floe", f"--hosts-dir={tmp_path}/certs.d", reference, namespace=namespace
        )

    for namespace in ("one", "two"):
        pull(namespace)
    assert lazy_node.registry.layers_fetched() == 0
    assert figures(lazy_node).snapshots["lazy"] == 2
    daemon.ctr("images", "rm", "--sync", reference, namespace="one")
    ran = daemon.ctr("run", "--rm", "--snapshotter=floe", reference, "c", "cat", "/etc/motd", namespace="two")
    assert ran.stdout == "one\n"


@pytest.mark.parametrize("version", [version for version in versions() if version.is_2], ids=str)
def test_user_namespaces_stay_lazy(version, lazy_node, start, tmp_path):
    image = build_oci(tmp_path / "image", [busybox(), files(CONTENT)], tag="1")
    lazy_node.index(image)
    reference = lazy_node.registry.add(image, "app")
    daemon = start(version)
    daemon.ctr("images", "pull", "--snapshotter=floe", f"--hosts-dir={tmp_path}/certs.d", reference)
    mapped = ("--uidmap=0:100000:65536", "--gidmap=0:200000:65536", "--remap-labels")
    script = "stat -c %u:%g /bin/busybox /; touch /new; cat /proc/self/uid_map; sleep 1000"
    daemon.ctr("run", "--detach", "--snapshotter=floe", *mapped, reference, "c", "sh", "-c", script)
    container = next(info for info in lazy_node.node.client.list("kind==active"))
    upper = lazy_node.node.upper(lazy_node.node.client.mounts(container.name))
    until((upper / "new").exists)
    # On disk the host's ids, in the container root: nothing was copied or changed owner.
    found = (upper / "new").stat()
    assert (found.st_uid, found.st_gid) == (100000, 200000)
    assert not (upper / "bin").exists()
    shown = daemon.ctr("tasks", "exec", "--exec-id=x", "c", "stat", "-c", "%u:%g", "/bin/busybox", "/", "/new").stdout
    assert shown.split() == ["0:0"] * 3


@each_version()
def test_without_remap_ids_containerd_changes_owners_and_floe_maps_nothing(version, lazy_node, start, tmp_path):
    daemon = start(version, remap_ids=False)
    cri = daemon.cri()
    lazy = build_oci(tmp_path / "lazy", [busybox(), files(CONTENT)], tag="1")
    plain = build_oci(tmp_path / "plain", [busybox(), files({"etc/motd": "plain"})], tag="1")
    lazy_node.index(lazy)
    mapped = ("--uidmap=0:100000:65536", "--gidmap=0:200000:65536", "--remap-labels")
    for name, image, layers in (("lazy", lazy, 0), ("plain", plain, 2)):
        reference = lazy_node.registry.add(image, name)
        before = lazy_node.registry.layers_fetched()
        cri.pull(reference)
        # The first layer of both is the same, which is there lazily after the first pull.
        assert lazy_node.registry.layers_fetched() - before <= layers
        run = ("run", "--rm", "--snapshotter=floe", *mapped, reference, name)
        shown = daemon.ctr(*run, "stat", "-c", "%u:%g", "/bin/busybox", "/", "/etc/motd").stdout
        assert shown.split() == ["0:0"] * 3


@each_version()
def test_pods_start_while_the_store_is_unreachable(version, lazy_node, start, tmp_path):
    image = build_oci(tmp_path / "image", [busybox(), files(CONTENT)], tag="1")
    lazy_node.index(image)
    reference = lazy_node.registry.add(image, "app")
    daemon = start(version)
    daemon.cri().pull(reference)
    daemon.terminate()
    (tmp_path / "store").rename(tmp_path / "gone")
    lazy_node.node.restart()
    assert lazy_node.node.failed == []
    daemon.start()
    cri = daemon.cri()
    until(cri.ready)
    # Ordinary images too, the one of the sandbox among them: they are not indexed.
    other = lazy_node.registry.add(build_oci(tmp_path / "other", [busybox(), files({"x": "y\n"})], tag="1"), "other")
    cri.pull(other)
    pod = cri.run_pod("p")
    assert cri.run(pod, reference, ["cat", "/etc/motd"]) == (0, "one\n")
    assert cri.run(pod, other, ["cat", "/x"]) == (0, "y\n")
