"""Containers of lazy images where trees are not mounted by EROFS on files: on loop devices, and portably."""

import itertools
import os
import signal

import grpc
import pytest
from support.blobhost import BlobHost
from support.containerd import Containerd, versions
from support.floe_daemons import Daemons, tree_listing
from support.images import APPLETS, add, build_oci, busybox, files
from support.mounts import until

from floe.mount.loop import attached_loops
from floe.store import mounttable
from floe.store.process import is_alive

pytestmark = [
    pytest.mark.timeout(110),
    pytest.mark.skipif(not versions(), reason="no containerd here: run install/setup.sh test"),
]
MOUNTERS = {"loop": {"FLOE_LOOP": "always"}, "portable": {"FLOE_MOUNTER": "portable"}}


def content(tar):
    files({"data/big": os.urandom(3_000_000), **{f"data/small/{n}": f"{n}" * n for n in range(1, 60)}})(tar)
    add(tar, "data/suid", b"x", mode=0o4755, uid=7, gid=8, mtime=1.5)


def change(tar):
    files({"data/small/3": "changed"})(tar)
    add(tar, "data/small/.wh.4")
    add(tar, "data/.wh.suid")


@pytest.fixture(params=MOUNTERS)
def daemons(request, tmp_path):
    made = Daemons(tmp_path / "h", MOUNTERS[request.param])
    made.kind = request.param
    yield made
    made.close()


@pytest.fixture
def registry():
    host = BlobHost()
    yield host
    host.close()


def start(tmp_path, registry, **settings):
    return Containerd(versions()[-1], tmp_path, registries=(registry.address,), **settings)


def servers(daemons):
    """The processes behind the portable mounts of this machine, as a mount's source names them."""
    sources = {m.source for m in mounttable.mounts() if m.target.startswith(f"{daemons.home}/")}
    return sorted(source.removeprefix("floe:") for source in sources if source.startswith("floe:"))


def loops(daemons):
    return [file for file in attached_loops().values() if file.startswith(str(daemons.home))]


@pytest.mark.slow
def test_an_image_equals_the_unpacked_one_and_all_is_given_back(daemons, registry, tmp_path):
    image = build_oci(tmp_path / "image", [busybox(applets=(*APPLETS, "sort")), content, change], tag="1")
    reference = registry.add(image, "app")
    (tmp_path / "o").mkdir()
    plain = start(tmp_path / "o", registry)
    try:
        cri = plain.cri()
        cri.pull(reference)
        expected = tree_listing(cri, cri.run_container(cri.run_pod("plain"), reference, ["sleep", "1000"]))
    finally:
        plain.stop()
    daemons.floe("image", "index", "--plain-http", reference)
    fetched = registry.layers_fetched()
    daemon = start(tmp_path, registry, snapshotter_address=daemons.address, snapshotter_root=daemons.root)
    try:
        cri = daemon.cri()
        cri.pull(reference)
        assert registry.layers_fetched() == fetched
        container = cri.run_container(cri.run_pod("lazy"), reference, ["sleep", "1000"])
        assert tree_listing(cri, container) == expected
        mounts = daemons.json("status")["mounts"]
        assert {mount["by"] for mount in mounts} == {"portable" if daemons.kind == "portable" else "erofs"}
        assert len(mounts) == 3
        serving = servers(daemons)
        assert len(serving) == (3 if daemons.kind == "portable" else 0)
        if daemons.kind == "loop":
            assert len(loops(daemons)) >= 6  # an image and a pack for each layer
        before = sorted(mount["at"] for mount in mounts)
        # kill -9 of the snapshotter: the container reads on, the next one finds the mounts as they are.
        daemons.restart_snapshotter()
        assert tree_listing(cri, container) == expected
        assert sorted(mount["at"] for mount in daemons.json("status")["mounts"]) == before
        assert cri.run(cri.run_pod("after"), reference, ["true"])[0] == 0
        cri.clean_up()
        cri.remove_image(reference)
        until(lambda: not any(info.labels.get("containerd.io/snapshot.ref") for info in daemons.client.list()))
        daemons.client.cleanup()
        assert daemons.json("status")["mounts"] == []
        assert loops(daemons) == []
        assert not any(map(is_alive, serving))
    finally:
        daemon.stop()


@pytest.mark.parametrize("daemons", ["portable"], indirect=True)
def test_a_killed_server_is_replaced_for_the_next_container(daemons, registry, tmp_path):
    image = build_oci(tmp_path / "image", [busybox(), files({"data/text": "here"})], tag="1")
    reference = registry.add(image, "app")
    daemons.floe("image", "index", "--plain-http", reference)
    daemon = start(tmp_path, registry, snapshotter_address=daemons.address, snapshotter_root=daemons.root)
    try:
        cri = daemon.cri()
        cri.pull(reference)
        assert cri.run(cri.run_pod("one"), reference, ["cat", "/data/text"]) == (0, "here\n")
        found = [mount["at"] for mount in daemons.json("status")["mounts"]]
        numbers = itertools.count()
        os.kill(int(servers(daemons)[0].partition(".")[0]), signal.SIGKILL)
        until(lambda: succeeds(cri, f"p{next(numbers)}", reference), 20)
        assert sorted(mount["at"] for mount in daemons.json("status")["mounts"]) == sorted(found)
        cri.clean_up()
    finally:
        daemon.stop()


def succeeds(cri, pod, reference):
    try:
        return cri.run(cri.run_pod(pod), reference, ["cat", "/data/text"]) == (0, "here\n")
    except grpc.RpcError:  # a tree found healthy is not asked again for two seconds
        return False
