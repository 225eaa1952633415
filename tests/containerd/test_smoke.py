"""A real containerd runs real containers from Floe's snapshotter, images unpacked the ordinary way."""

import pytest
from support.containerd import Containerd, each_version
from support.images import build_oci, busybox, files, oci_archive
from support.snapshots import Node

IMAGE = "floe.test/hello:1"


@pytest.fixture
def node(tmp_path):
    node = Node(tmp_path / "n")
    yield node
    node.stop()
    node.layers.close()


@each_version()
def test_ordinary_image_runs_by_ctr_and_cri(version, node, tmp_path):
    image = tmp_path / "image"
    layers = [busybox(), files({"etc/motd": "one\n", "data/a": "a"}), files({"etc/motd": "two\n"})]
    build_oci(image, layers, tag=IMAGE)
    daemon = Containerd(version, tmp_path, snapshotter_address=node.config.address, snapshotter_root=node.config.root)
    try:
        daemon.import_image(oci_archive(image, tmp_path / "image.tar"))
        ran = daemon.ctr("run", "--rm", "--snapshotter", "floe", IMAGE, "one", "cat", "/etc/motd")
        assert ran.stdout == "two\n"
        cri = daemon.cri()
        assert cri.ready()
        pod = cri.run_pod("p")
        assert cri.run(pod, IMAGE, ["sh", "-c", "cat /etc/motd /data/a; touch /new && ls /new"]) == (0, "two\na/new\n")
        container = cri.run_container(pod, IMAGE, ["sleep", "1000"])
        assert cri.execute(container, "cat", "/data/a") == (0, b"a", b"")
        (usage,) = cri.image_file_systems()
        # containerd 1.6 does not look at `exports.root`.
        assert not version.is_2 or usage.fs_id.mountpoint == str(node.config.root)
        cri.clean_up()
        names = node.client.names()
        assert any("sha256:" in name for name in names)
        daemon.ctr("images", "rm", "--sync", IMAGE)
        assert len(node.client.names()) < len(names)
    finally:
        daemon.stop()
    assert node.snapshotter.metrics().snapshots["active"] == 0
