"""The whole of Floe as a user runs it: commands and daemons as processes, a registry, a real containerd, CRI."""

import hashlib
import os

import pytest
from support.blobhost import BlobHost
from support.containerd import Containerd, each_version
from support.floe_daemons import Daemons, tree_listing
from support.images import APPLETS, add, build_oci, busybox, files
from support.mounts import until

pytestmark = pytest.mark.timeout(110)


def content(tar):
    big = os.urandom(3_000_000)
    files({"data/big": big, **{f"data/small/{n}": f"{n}" * n for n in range(1, 60)}})(tar)
    add(tar, "data/suid", b"x", mode=0o4755, uid=7, gid=8, mtime=1.5)


def change(tar):
    files({"data/small/3": "changed"})(tar)
    add(tar, "data/small/.wh.4")
    add(tar, "data/.wh.suid")


@pytest.fixture
def image(tmp_path):
    applets = (*APPLETS, "sort")
    return build_oci(tmp_path / "image", [busybox(applets=applets), content, change], tag="1")


@pytest.fixture
def registry(image):
    host = BlobHost()
    yield host
    host.close()


@pytest.fixture
def daemons(tmp_path):
    made = Daemons(tmp_path / "h")
    yield made
    made.close()


def containerd(version, tmp_path, daemons, registry, **settings):
    return Containerd(
        version,
        tmp_path,
        snapshotter_address=daemons.address,
        snapshotter_root=daemons.root,
        registries=(registry.address,),
        **settings,
    )


def listing(cri, reference):
    return tree_listing(cri, cri.run_container(cri.run_pod("listed"), reference, ["sleep", "1000"]))


def traced(daemons, container, reference, containerd):
    """The start of a container as its node knows it, by id and by image: its Prepare, after those of the layers, its first output."""
    until(lambda: container[:40] in daemons.floe("trace").stdout)  # events are written a moment after they happened
    found = daemons.json("trace", container[:12], "--containerd-socket", containerd)
    assert found["key"].endswith(f"/{container}")
    # containerd 1.6 tells the image with disable_snapshot_annotations = false only; later the profile's source has the repository.
    assert found["name"] in (reference, reference.rpartition(":")[0], None)
    kinds = [event["kind"] for event in found["events"]]
    assert kinds.count("layer") == 3
    assert kinds[0] == "pull"
    assert kinds.index("container") > kinds.index("layer")
    assert min(map(kinds.index, ("running", "first output"))) > kinds.index("container")
    assert "first output" not in {
        event["kind"] for event in daemons.json("trace", container)["events"]
    }  # of another containerd
    assert all("lazily, tree" in event["what"] for event in found["events"] if event["kind"] == "layer")
    assert daemons.json("trace", reference)["key"] == found["key"]


@each_version()
def test_indexed_image_equals_the_unpacked_one_and_downloads_no_layer(version, daemons, registry, image, tmp_path):
    reference = registry.add(image, "app")
    (tmp_path / "o").mkdir()
    plain = Containerd(version, tmp_path / "o", registries=(registry.address,))
    try:
        cri = plain.cri()
        cri.pull(reference)
        expected = listing(cri, reference)
    finally:
        plain.stop()
    daemons.floe("image", "index", "--plain-http", reference)
    fetched = registry.layers_fetched()
    daemon = containerd(version, tmp_path, daemons, registry)
    try:
        cri = daemon.cri()
        cri.pull(reference)
        assert registry.layers_fetched() == fetched
        assert listing(cri, reference) == expected
        assert expected.count("\n") > 100
        told = daemons.json("status")
        assert told
        # kill -9 of the snapshotter, then of containerd: the container reads on, and new ones start.
        container = cri.run_container(cri.run_pod("killed"), reference, ["sh", "-c", "echo ready; sleep 1000"])
        until(lambda: cri.logs(container) == "ready\n")
        traced(daemons, container, reference, daemon.address)
        daemons.restart_snapshotter()
        assert tree_listing(cri, container) == expected
        daemon.kill()
        daemon.start()
        until(cri.ready)
        assert tree_listing(cri, container) == expected
        assert cri.run(cri.run_pod("after"), reference, ["true"])[0] == 0
        cri.clean_up()
        cri.remove_image(reference)
        until(lambda: not any(info.labels.get("containerd.io/snapshot.ref") for info in daemons.client.list()))
    finally:
        daemon.stop()


@each_version()
def test_image_with_an_attached_model(version, daemons, registry, image, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    weights = os.urandom(5_000_000)
    (model / "weights.bin").write_bytes(weights)
    (model / "config.json").write_text("{}")
    daemons.floe("model", "push", model, "demo:1")
    daemons.floe("image", "index", image.source)
    daemons.floe("image", "attach", image.source, f"oci:{tmp_path}/attached:1", "--model", "demo:1=/models/demo")
    attached = registry.add_layout(tmp_path / "attached", "1", "attached")
    script = "md5sum < /models/demo/weights.bin; cat /models/demo/config.json; touch /models/demo/x 2>/dev/null; ls /models/demo"
    daemon = containerd(version, tmp_path, daemons, registry)
    try:
        cri = daemon.cri()
        store = daemons.store.rename(daemons.home / "away")
        with pytest.raises(Exception, match="model tree"):
            cri.pull(attached)
        store.rename(daemons.store)
        until(lambda: pulls(cri, attached), 30)
        code, text = cri.run(cri.run_pod("p"), attached, ["sh", "-c", script])
        assert code == 0
        assert text.splitlines()[0] == f"{hashlib.md5(weights).hexdigest()}  -"
        assert "weights.bin" in text
    finally:
        daemon.stop()


def pulls(cri, reference):
    try:
        return cri.pull(reference)
    except Exception:
        return None
