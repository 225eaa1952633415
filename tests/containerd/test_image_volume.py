"""A model published as an image: mounted as a volume of pods (CRI, containerd 2.1), beside CSI volumes, by ctr, and where there is no Floe."""

import contextlib
import ctypes
import mmap
import os
import subprocess
from pathlib import Path

import pytest
from support.containerd import each_version, versions
from support.csi import Driver
from support.floe_node import Node, wait_until
from support.images import build_oci, busybox
from support.other_node import started
from support.registry import running_registry

FILES = {"weights.bin": os.urandom(3_000_000), "sub/config.json": b'{"a": 1}'}
NEWEST = pytest.mark.parametrize("version", [one for one in versions() if one.is_2][-1:], ids=str)


@pytest.fixture
def machine(tmp_path):
    """Who pushes: a model in the store, as an image of its own in a registry, and attached to another image."""
    with contextlib.ExitStack() as stack:
        node = Node(tmp_path)
        stack.callback(node.clean_up)
        for name, data in FILES.items():
            path = tmp_path / "model" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        node.floe("model", "push", tmp_path / "model", "weights:1")
        node.registry = stack.enter_context(running_registry(tmp_path / "registry"))
        made = build_oci(tmp_path / "base", [busybox(applets=("cat", "find", "md5sum", "sh", "sleep", "touch"))])
        node.app = node.registry.push(made.source, "app:1")
        node.image = f"{node.registry.host}/models/weights:1"
        node.published = node.json("model", "publish", "--plain-http", "weights:1", node.image)
        yield node


def content(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def in_memory(path):
    """How many of a file's pages the page cache holds; reads none of them."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        anchor = ctypes.c_char.from_buffer(mapped)
        start = ctypes.c_void_p(ctypes.addressof(anchor))
        assert ctypes.CDLL(None).mincore(start, ctypes.c_size_t(len(mapped)), pages) == 0
        del anchor
        return sum(page & 1 for page in pages)


def forget(path):
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return in_memory(path) == 0


def placed_at(daemon, cri, name, image, **settings):
    """The root of a container of `image` that does nothing."""
    container = cri.run_container(cri.run_pod(name), image, ["sleep", "1000"], **settings)
    return Path(f"/proc/{daemon.pid_of(container)}/root")


@NEWEST
def test_volumes_by_cri_and_csi_are_the_model_in_the_memory_of_its_mount(version, machine, tmp_path):
    attached = f"{machine.registry.host}/app:attached"
    machine.floe("image", "attach", "--plain-http", machine.app, attached, "--model", "weights:1=/model")
    with contextlib.ExitStack() as stack:
        daemon, daemons = started(stack, version, machine, tmp_path)
        cri = daemon.cri()
        for image in (machine.app, machine.image, attached):
            cri.pull(image)
        volume = {"image_volumes": {"/model": machine.image}}
        places = [placed_at(daemon, cri, name, machine.app, **volume) / "model" for name in ("one", "two")]
        beside = placed_at(daemon, cri, "three", attached) / "model"
        mountpoint = tmp_path / "host"
        daemons.floe("model", "mount", "weights:1", mountpoint)
        stack.callback(daemons.floe, "umount", mountpoint)
        driver = stack.enter_context(contextlib.closing(Driver(daemons)))
        kubelet = driver.kubelet
        targets = [kubelet.publish(kubelet.pod(), "weights:1", volume=volume) for volume in ("csi-1", "csi-2")]
        for place in (mountpoint, *places, *targets, beside):
            assert content(place) == FILES
        for place in (mountpoint, *places, *targets):
            with pytest.raises(OSError, match="Read-only file system"):
                (place / "mine").touch()
        # One copy on the disk of all of them.
        packs = {pack["id"] for pack in machine.json("model", "show", "weights:1")["packs"]}
        assert {path.name for path in (daemons.cache / "packs").iterdir()} == packs
        # In memory what the mount read is the volumes', and what the attached layer read is its own.
        host, other = mountpoint / "weights.bin", beside / "weights.bin"
        volumes = [place / "weights.bin" for place in (*places, *targets)]
        wait_until(lambda: forget(host) and forget(other))
        assert [in_memory(one) for one in volumes] == [0] * 4
        host.read_bytes()
        whole = -(-len(FILES["weights.bin"]) // mmap.PAGESIZE)
        assert [in_memory(one) for one in volumes] == [whole] * 4
        assert in_memory(other) == 0
        wait_until(lambda: forget(host))
        other.read_bytes()
        assert in_memory(other) > 0
        assert [in_memory(one) for one in (host, *volumes)] == [0] * 5


@pytest.mark.slow
@NEWEST
def test_a_volume_goes_with_its_pods_and_its_image(version, machine, tmp_path):
    with contextlib.ExitStack() as stack:
        daemon, daemons = started(stack, version, machine, tmp_path)
        cri = daemon.cri()
        cri.pull(machine.app)
        cri.pull(machine.image)
        volume = {"image_volumes": {"/model": machine.image}}
        for name in ("one", "two"):
            assert content(placed_at(daemon, cri, name, machine.app, **volume) / "model") == FILES
        assert trees(daemons)
        cri.clean_up()
        cri.remove_image(machine.image)
        wait_until(lambda: not trees(daemons), 60)


def trees(daemons):
    return [target for target in daemons.mounts() if target.startswith(f"{daemons.run_dir}/trees/")]


@each_version(older=pytest.mark.slow)
def test_ctr_mounts_the_image_as_the_model(version, machine, tmp_path):
    mountpoint = tmp_path / "mounted"
    mountpoint.mkdir()
    with contextlib.ExitStack() as stack:
        daemon, _ = started(stack, version, machine, tmp_path)
        cri, before = daemon.cri(), chains(daemon)
        cri.pull(machine.image)
        (chain,) = chains(daemon) - before
        if version.is_2:
            daemon.ctr("images", "mount", "--snapshotter", "floe", machine.image, mountpoint)
        else:  # whose `images mount` knows overlayfs alone
            command = daemon.ctr("snapshots", "--snapshotter", "floe", "view", "--target", mountpoint, "seen", chain)
            subprocess.run(command.stdout.split(), check=True, timeout=20)
        stack.callback(subprocess.run, ["umount", mountpoint], check=True, timeout=20)
        assert content(mountpoint) == FILES


def chains(daemon):
    """The chain ids that the daemon has snapshots of."""
    listed = daemon.ctr("snapshots", "--snapshotter", "floe", "ls").stdout
    return {line.split()[0] for line in listed.splitlines() if line.startswith("sha256:")}


@pytest.mark.slow
@NEWEST
def test_a_volume_on_a_node_without_floe_says_what_is_missing(version, machine, tmp_path):
    with contextlib.ExitStack() as stack:
        daemon, _ = started(stack, version, machine, tmp_path, floe=False)
        cri = daemon.cri()
        cri.pull(machine.app)
        cri.pull(machine.image)
        command = ["sh", "-c", "find /model -type f; cat /model/README"]
        code, text = cri.run(cri.run_pod("plain"), machine.app, command, image_volumes={"/model": machine.image})
        assert code == 0, text
        assert sorted(text.splitlines()[:2]) == ["/model/.floe/model.json", "/model/README"]
        assert "This image is the model weights:1, but its files are not here." in text
