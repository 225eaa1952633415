"""What docs/OPERATIONS.md tells an administrator to do with images, done with a real containerd."""

from pathlib import Path

import grpc
import pytest
from support.blobhost import BlobHost
from support.containerd import Containerd, each_version
from support.floe_daemons import Daemons
from support.images import APPLETS, build_oci, busybox, files
from support.mounts import until

pytestmark = pytest.mark.timeout(110)
CHAIN = "containerd.io/snapshot.ref"


class Cluster:
    """Floe's daemons, a registry with one image, and a containerd that uses Floe."""

    def __init__(self, version, base):
        image = build_oci(base / "image", [busybox(applets=APPLETS), files({"data/x": "seen\n" * 1000})], tag="1")
        self.registry = BlobHost()
        self.reference = self.registry.add(image, "app")
        self.daemons = Daemons(base / "h")
        self.containerd = Containerd(
            version,
            base,
            snapshotter_address=self.daemons.address,
            snapshotter_root=self.daemons.root,
            registries=(self.registry.address,),
        )
        self.cri = self.containerd.cri()
        self.names = 0

    def index(self):
        self.daemons.floe("image", "index", "--plain-http", self.reference)

    def layers_fetched_by(self, action):
        before = self.registry.layers_fetched()
        action()
        return self.registry.layers_fetched() - before

    def pull(self):
        self.cri.pull(self.reference)

    def runs(self):
        self.names += 1
        code, text = self.cri.run(self.cri.run_pod(f"p{self.names}"), self.reference, ["tail", "-n1", "/data/x"])
        return (code, text) == (0, "seen\n")

    def switch_to_overlayfs(self):
        """Change the configuration and restart containerd, as an administrator would."""
        self.cri.clean_up()
        self.containerd.terminate()
        config = Path(self.containerd.config)
        config.write_text(config.read_text().replace('snapshotter = "floe"', 'snapshotter = "overlayfs"'))
        self.containerd.start()
        until(self.cri.ready)

    def lazy(self):
        return sum(bool(info.labels.get(CHAIN)) for info in self.daemons.client.list())

    def close(self):
        self.containerd.stop()
        self.daemons.close()
        self.registry.close()


@pytest.fixture
def cluster(request, tmp_path):
    made = Cluster(request.getfixturevalue("version"), tmp_path)
    yield made
    made.close()


@each_version(older=pytest.mark.slow)
def test_the_blobs_of_a_lazily_pulled_image_are_fetched_when_wanted(version, cluster, tmp_path):
    cluster.index()
    assert cluster.layers_fetched_by(cluster.pull) == 0
    export = ("images", "export", tmp_path / "image.tar", cluster.reference)
    told = cluster.containerd.ctr(*export, check=False)
    assert told.returncode != 0
    assert "not found" in told.stderr
    fetch = ("content", "fetch", "--plain-http", cluster.reference)
    assert cluster.layers_fetched_by(lambda: cluster.containerd.ctr(*fetch)) == 2
    cluster.containerd.ctr(*export)
    assert cluster.lazy() == 2
    assert cluster.runs()
    # With its blobs there the image can be unpacked for another snapshotter.
    cluster.switch_to_overlayfs()
    assert cluster.runs()


@each_version(older=pytest.mark.slow)
def test_after_switching_to_overlayfs_a_lazily_pulled_image_is_removed_and_pulled_again(version, cluster):
    cluster.index()
    cluster.pull()
    cluster.switch_to_overlayfs()
    with pytest.raises(grpc.RpcError, match="not found"):
        cluster.runs()
    cluster.cri.clean_up()
    cluster.cri.remove_image(cluster.reference)
    assert cluster.layers_fetched_by(cluster.pull) == 2
    assert cluster.runs()
    until(lambda: cluster.lazy() == 0)


@each_version(older=pytest.mark.slow)
def test_a_layer_unpacked_once_stays_unpacked_until_its_image_is_removed(version, cluster):
    assert cluster.layers_fetched_by(cluster.pull) == 2
    cluster.index()
    fallbacks = cluster.daemons.json("status")["snapshotter"]["fallbacks"]
    assert fallbacks["not_indexed"] == 2
    cluster.pull()
    # No Prepare was sent: nothing is lazy and nothing was counted.
    assert cluster.daemons.json("status")["snapshotter"]["fallbacks"] == fallbacks
    unpacked = {info.name for info in cluster.daemons.client.list()}
    cluster.cri.remove_image(cluster.reference)
    until(lambda: len(unpacked & {info.name for info in cluster.daemons.client.list()}) <= len(unpacked) - 2)
    cluster.pull()
    assert cluster.daemons.json("status")["snapshotter"]["snapshots"]["lazy"] == 2
    assert cluster.runs()
