"""The CSI driver as a process, with a real pack filesystem and EROFS: volumes of pods, as a kubelet asks for them."""

import contextlib
import fcntl
import os
import signal
import socket
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.csi import MODE, Driver, capability, refused
from support.floe_daemons import Daemons
from support.floe_node import wait_until
from support.mounts import entry_at
from support.packfs import alive

from floe import __version__
from floe.csi.service import IDENTITY, NODE
from floe.protos.gen.csi import csi_pb2 as pb

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

FILES = {"weights.bin": os.urandom(3_000_000), "sub/config.json": b'{"a": 1}'}
RULES = '[{namespace = "team-*", models = ["weights", "llama/*"]}, {namespace = "none", models = []}]'


def push(node, name, files=FILES):
    folder = node.home / "pushed" / name.replace(":", "-")
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    node.floe("model", "push", folder, name)


def content(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def home(tmp_path_factory):
    """A node's folder, not named after the test: the addresses of sockets in it have room for 107 characters."""
    return tmp_path_factory.mktemp("n")


@pytest.fixture
def machine(home):
    """A node with Floe's daemons and the models weights:1 and weights:2."""
    daemons = Daemons(home)
    try:
        push(daemons, "weights:1")
        push(daemons, "weights:2", {"other": b"2"})
        yield daemons
    finally:
        daemons.close()


@pytest.fixture
def driver(machine):
    with contextlib.closing(Driver(machine)) as made:
        yield made


@pytest.fixture
def kubelet(driver):
    return driver.kubelet


def trees(node):
    return [target for target in node.mounts() if target.startswith(f"{node.run_dir}/trees/")]


def test_a_volume_is_the_model_read_only_until_it_is_unpublished(machine, kubelet):
    pod = kubelet.pod()
    target = kubelet.publish(pod, "weights:1")
    assert content(target) == FILES
    assert {"ro", "nosuid", "nodev"} <= entry_at(target).options
    with pytest.raises(OSError, match="Read-only file system"):
        (target / "mine").touch()
    (mounted,) = machine.json("status")["mounts"]
    assert str(target) in str(mounted)
    kubelet.unpublish(target)
    assert not target.exists()
    assert target.parent.exists()
    assert trees(machine) == []


def test_the_same_again_changes_nothing_and_another_is_refused(machine, kubelet):
    pod = kubelet.pod()
    target = kubelet.publish(pod, "weights:1")
    before = entry_at(target)
    assert kubelet.publish(pod, "weights:1") == target
    assert entry_at(target) == before
    assert refused(kubelet.publish, pod, "weights:2")[0] == "ALREADY_EXISTS"
    assert refused(kubelet.publish, pod, "weights:1", volume="csi-2")[0] == "ALREADY_EXISTS"
    assert refused(kubelet.unpublish, target, "csi-2")[0] == "FAILED_PRECONDITION"
    assert content(target) == FILES
    kubelet.unpublish(target)
    kubelet.unpublish(target)
    kubelet.unpublish(kubelet.pod().target())


def test_who_it_says_it_is(driver):
    info = driver.kubelet.identity("GetPluginInfo", pb.GetPluginInfoRequest(), pb.GetPluginInfoResponse)
    assert (info.name, info.vendor_version) == ("csi.floe", __version__)
    node = driver.kubelet.node("NodeGetInfo", pb.NodeGetInfoRequest(), pb.NodeGetInfoResponse)
    assert node.node_id == socket.gethostname()
    assert driver.kubelet.identity("Probe", pb.ProbeRequest(), pb.ProbeResponse).ready.value
    for service, method in ((IDENTITY, "GetPluginCapabilities"), (NODE, "NodeGetCapabilities")):
        assert driver.kubelet.raw(service, method, b"") == b""
    assert refused(driver.kubelet.raw, NODE, "NodeStageVolume", b"")[0] == "UNIMPLEMENTED"
    assert refused(driver.kubelet.raw, "csi.v1.Controller", "CreateVolume", b"")[0] == "UNIMPLEMENTED"
    assert refused(driver.kubelet.raw, NODE, "NodePublishVolume", b"\xff")[0] == "INTERNAL"
    assert stat.S_IMODE(driver.address.stat().st_mode) == 0o600


def test_one_driver_a_node_and_one_operation_a_target(driver, machine):
    second = machine.floe("csi", *driver.flags, code=1)
    assert "belongs to a running csi" in second.stderr
    assert driver.kubelet.identity("Probe", pb.ProbeRequest(), pb.ProbeResponse).ready.value
    pod = driver.kubelet.pod()
    models = machine.run_dir / "locks/models.lock"
    with models.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as a mount under way
        with ThreadPoolExecutor() as threads:
            first = threads.submit(driver.kubelet.publish, pod, "weights:1")
            wait_until(lambda: has_open(driver.process.pid, models))
            assert refused(driver.kubelet.publish, pod, "weights:2")[0] == "ABORTED"
            assert refused(driver.kubelet.unpublish, pod.target())[0] == "ABORTED"
            fcntl.flock(lock, fcntl.LOCK_UN)
            target = first.result()
    assert content(target) == FILES
    driver.kubelet.unpublish(target)


def has_open(pid, path):
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if fd.samefile(path):
                return True
    return False


def test_metrics_count_requests_by_their_end(driver, machine):
    kubelet = driver.kubelet
    kubelet.publish(kubelet.pod(), "weights:1")
    for _ in range(2):
        assert refused(kubelet.publish, kubelet.pod(), "missing:1")[0] == "NOT_FOUND"
    kubelet.unpublish(kubelet.pod().target())
    command = ["curl", "-s", "--unix-socket", machine.run_dir / "csi-metrics.sock", "http://localhost/metrics"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    assert 'floe_csi_requests_total{outcome="ok",request="publish"} 1.0' in said
    assert 'floe_csi_requests_total{outcome="not_found",request="publish"} 2.0' in said
    assert 'floe_csi_requests_total{outcome="ok",request="unpublish"} 1.0' in said
    assert "floe_csi_volumes 1.0" in said


def test_two_pods_share_one_tree_and_one_leaves_it_to_the_other(machine, kubelet):
    first, second = (kubelet.publish(kubelet.pod(), "weights:1", volume=name) for name in ("csi-a", "csi-b"))
    assert first.stat().st_dev == second.stat().st_dev
    kubelet.unpublish(first, "csi-a")
    assert content(second) == FILES
    kubelet.unpublish(second, "csi-b")
    assert trees(machine) == []


def test_a_persistent_volume_is_published_to_who_only_reads(kubelet):
    pod = kubelet.pod()
    many = capability(MODE.MULTI_NODE_READER_ONLY)
    target = kubelet.publish(pod, "weights:1", volume="weights-pv", volume_capability=many, readonly=False)
    assert content(target) == FILES
    kubelet.unpublish(target, "weights-pv")


def test_a_digest_names_a_model_too_and_a_tag_that_moves_or_goes_changes_nothing(machine, driver, kubelet):
    digest = machine.json("model", "show", "weights:1")["manifest"]
    by_digest = kubelet.publish(kubelet.pod(), f"weights@{digest}", volume="csi-d")
    pod = kubelet.pod()
    by_tag = kubelet.publish(pod, "weights:1")
    machine.floe("model", "rm", "weights:1")
    driver.kill()
    driver.start()
    driver.kubelet.publish(pod, "weights:1")  # the kubelet does so when it starts again
    assert content(by_tag) == content(by_digest) == FILES
    status, message = refused(driver.kubelet.publish, driver.kubelet.pod(), "weights:1")
    assert status == "NOT_FOUND"
    assert "weights:1" in message
    for target, volume in ((by_tag, "csi-1"), (by_digest, "csi-d")):
        driver.kubelet.unpublish(target, volume)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"readonly": False}, "readOnly: true"),
        ({"volume_capability": pb.VolumeCapability(block=pb.VolumeCapability.BlockVolume())}, "block device"),
        ({"volume_capability": None}, "not asked for as files"),
        ({"volume_capability": capability(MODE.SINGLE_NODE_WRITER, fs_type="ext4")}, "fsType"),
        ({"volume_capability": capability(MODE.SINGLE_NODE_WRITER, mount_flags=["noexec"])}, "'noexec'"),
        ({"volume_context": {}}, "names no model"),
        ({"volume_context": {"model": "weights:1", "modle": "x"}}, "'modle'"),
        ({"volume_id": None}, "no volume_id"),
        ({"target_path": "relative"}, "no absolute path"),
        ({"target_path": "/a/../b"}, "no absolute path"),
        ({"volume_context": {"model": "we!ghts"}}, "'we!ghts'"),
        ({"target_path": "/nowhere/at/all"}, "make the directory above it first"),
    ],
)
def test_what_cannot_be_meant_is_an_invalid_argument_and_changes_nothing(machine, kubelet, changes, said):
    before = machine.mounts()
    pod = kubelet.pod()
    status, message = refused(kubelet.publish, pod, "weights:1", **changes)
    assert (status, said in message) == ("INVALID_ARGUMENT", True), message
    assert machine.mounts() == before
    assert not pod.target().exists()


def test_a_refused_pod_is_told_why_and_an_allowed_one_has_its_model(machine):
    with contextlib.closing(Driver(machine, RULES)) as driver:
        kubelet = driver.kubelet
        assert content(kubelet.publish(kubelet.pod("team-a"), "weights:1")) == FILES
        for namespace, said in (
            ("default", "no rule of this node allows pods of namespace 'default' any model"),
            ("none", "pods of namespace 'none' may not have model 'weights'"),
        ):
            pod = kubelet.pod(namespace)
            assert refused(kubelet.publish, pod, "weights:1")[0] == "PERMISSION_DENIED"
            assert said in refused(kubelet.publish, pod, "weights:1")[1]
            assert not pod.target().exists()
        # By digest only what a tag of the allowed name names, or did: the name alone is the pod's own word.
        push(machine, "secret:1", {"x": b"1"})
        secret, weights = (machine.json("model", "show", name)["manifest"] for name in ("secret:1", "weights:1"))
        status, message = refused(kubelet.publish, kubelet.pod("team-a"), f"weights@{secret}")
        assert (status, "no tag of weights names" in message) == ("PERMISSION_DENIED", True)
        machine.floe("model", "tag", "weights:2", "weights:1")
        assert content(kubelet.publish(kubelet.pod("team-a"), f"weights@{weights}", volume="csi-d")) == FILES
        # A volume of another pod's, and none that the kubelet vouches for.
        mine, other = kubelet.pod("team-a"), kubelet.pod("default")
        for pod, target in ((mine, other.target()), (mine, mine.target() / "mount")):
            assert refused(kubelet.publish, pod, "weights:1", target=target)[0] == "PERMISSION_DENIED"
        status, message = refused(kubelet.publish, mine, "weights:1", volume_context={"model": "weights:1"})
        assert status == "PERMISSION_DENIED"
        assert "podInfoOnMount" in message


def test_a_driver_that_is_killed_finds_its_volumes_again(driver, machine):
    pod = driver.kubelet.pod()
    target = driver.kubelet.publish(pod, "weights:1")
    before = entry_at(target)
    with (target / "weights.bin").open("rb") as file:
        driver.kill()
        assert content(target) == FILES
        driver.start()
        assert entry_at(target) == before
        driver.kubelet.publish(pod, "weights:1")
        assert refused(driver.kubelet.unpublish, target)[0] == "UNAVAILABLE"  # a file is open
        assert file.read() == FILES["weights.bin"]
    driver.stop()
    assert content(target) == FILES
    driver.start()
    driver.kubelet.unpublish(target)
    assert not target.exists()
    assert trees(machine) == []


def test_deaths_of_the_pack_filesystem_are_pauses(driver, machine):
    target = driver.kubelet.publish(driver.kubelet.pod(), "weights:1")
    worker = int((machine.run_dir / "worker.pid").read_text())
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: not alive(worker))
    assert content(target) == FILES
    os.kill(machine.packfs.pid, signal.SIGKILL)  # the next keeper has the mount from the worker that lives
    machine.packfs.wait()
    machine.packfs = machine.start("packfs")
    assert (target / "weights.bin").read_bytes() == FILES["weights.bin"]
    driver.kubelet.unpublish(target)
    assert trees(machine) == []


def test_volumes_are_there_again_after_their_pack_filesystem_was_lost(driver, machine):
    target = driver.kubelet.publish(driver.kubelet.pod(), "weights:1")
    machine.floe("umount", target)
    driver.kubelet.unpublish(target)
    pod = driver.kubelet.pod()
    target = driver.kubelet.publish(pod, "weights:2")
    subprocess.run(["umount", target], check=True)
    assert content(target) == {}
    driver.kubelet.publish(pod, "weights:2")  # as a kubelet that starts does
    assert content(target) == {"other": b"2"}
    subprocess.run(["umount", target], check=True)
    driver.kill()
    driver.start()  # in its place before anybody asks
    assert content(target) == {"other": b"2"}
    driver.kubelet.unpublish(target)


def test_a_volume_whose_pod_s_directory_is_gone_is_forgotten(driver, machine):
    target = driver.kubelet.publish(driver.kubelet.pod(), "weights:1")
    subprocess.run(["umount", target], check=True)
    target.rmdir()
    target.parent.rmdir()
    driver.kill()
    driver.start()
    assert trees(machine) == []
    assert "forgotten" in driver.log()
    driver.kubelet.unpublish(target)


def test_nothing_else_is_unmounted_or_hidden(driver, machine):
    kubelet = driver.kubelet
    pod = kubelet.pod()
    target = pod.target()
    target.mkdir()
    (target / "mine").touch()
    status, message = refused(kubelet.publish, pod, "weights:1")
    assert (status, "not empty" in message) == ("INVALID_ARGUMENT", True)
    (target / "mine").unlink()
    subprocess.run(["mount", "-t", "tmpfs", "none", target], check=True)
    assert refused(kubelet.publish, pod, "weights:1")[0] == "UNAVAILABLE"
    assert refused(kubelet.unpublish, target)[0] == "FAILED_PRECONDITION"
    assert entry_at(target).fstype == "tmpfs"
    subprocess.run(["umount", target], check=True)
    machine.floe("model", "mount", "weights:1", target)
    assert refused(kubelet.publish, pod, "weights:1")[0] == "ALREADY_EXISTS"
    assert refused(kubelet.unpublish, target)[0] == "FAILED_PRECONDITION"
    assert content(target) == FILES
    machine.floe("umount", target)
    target.mkdir(exist_ok=True)  # left by a reboot
    assert content(kubelet.publish(pod, "weights:1")) == FILES
    kubelet.unpublish(target)
    assert not target.exists()


def test_without_a_pack_filesystem_a_volume_waits_for_one(home):
    node = Daemons(home)
    try:
        push(node, "weights:1")
        with contextlib.closing(Driver(node)) as driver:
            node.packfs.terminate()
            assert node.packfs.wait(timeout=20) == 0
            pod = driver.kubelet.pod()
            status, message = refused(driver.kubelet.publish, pod, "weights:1")
            assert status == "UNAVAILABLE"
            assert "the pack filesystem does not run on this node (systemctl start floe-packfs" in message
            assert not pod.target().exists()
            assert not Path(node.run_dir / "packfs.started").exists()
            node.packfs = node.start("packfs")
            assert content(driver.kubelet.publish(pod, "weights:1")) == FILES
            driver.kubelet.unpublish(pod.target())
    finally:
        node.close()


def test_volumes_are_mounted_again_over_a_new_pack_filesystem(driver, machine):
    pod = driver.kubelet.pod()
    target = driver.kubelet.publish(pod, "weights:1")
    with (target / "weights.bin").open("rb") as file:
        keeper, worker = (int((machine.run_dir / f"{name}.pid").read_text()) for name in ("keeper", "worker"))
        os.kill(keeper, signal.SIGSTOP)  # so that it starts no other
        os.kill(worker, signal.SIGKILL)
        os.kill(keeper, signal.SIGKILL)
        machine.packfs.wait()
        wait_until(lambda: not alive(worker))
        with pytest.raises(OSError, match="Input/output error"):
            file.read()
    status, message = refused(driver.kubelet.publish, driver.kubelet.pod(), "weights:2", volume="csi-2")
    assert status == "UNAVAILABLE", message
    machine.packfs = machine.start("packfs")
    driver.kill()
    driver.start()
    assert content(target) == FILES
    assert "is at" in driver.log()
    driver.kubelet.unpublish(target)
    assert trees(machine) == []
