"""A model's content on its way while its image is still pulled, by a real containerd: in order of events, not of time."""

import hashlib
import random
import threading

import grpc
import pytest
from support.blobhost import BlobHost
from support.containerd import Containerd, versions
from support.floe_daemons import Daemons
from support.images import build_oci, busybox, files
from support.mounts import until

from floe.protos.packfs_control import PackfsClient

pytestmark = pytest.mark.timeout(110)

MIB = 1 << 20
WEIGHTS = random.Random(11).randbytes(24 * MIB)
PATH = "/models/demo"
newest = pytest.mark.parametrize("version", versions()[-1:], ids=str)


@pytest.fixture
def registry():
    host = BlobHost()
    yield host
    for event in host.held.values():
        event.set()
    host.close()


@pytest.fixture
def start(registry, tmp_path):
    """Starts both daemons with these settings, and a containerd; a reference to an image that carries a model."""
    made = []

    def start(version, **environ):
        daemons = Daemons(tmp_path / "h", environ)
        made.append(daemons.close)
        model = tmp_path / "model"
        model.mkdir()
        (model / "weights.bin").write_bytes(WEIGHTS)
        (model / "config.json").write_text("{}")
        image = build_oci(tmp_path / "image", [busybox(), files({"data": "of a layer"})], tag="1")
        daemons.floe("model", "push", model, "demo:1")
        daemons.floe("image", "attach", image.source, f"oci:{tmp_path}/attached:1", "--model", f"demo:1={PATH}")
        reference = registry.add_layout(tmp_path / "attached", "1", "attached")
        daemon = Containerd(
            version,
            tmp_path,
            snapshotter_address=daemons.address,
            snapshotter_root=daemons.root,
            registries=(registry.address,),
        )
        made.append(daemon.stop)
        return daemon.cri(), daemons, reference, registry.images["attached"].layers

    yield start
    for close in reversed(made):
        close()


def counters(daemons):
    return PackfsClient(daemons.run_dir).status()["counters"]


def pulling(cri, reference):
    """A pull in a thread of its own, and where its error will be."""
    failed = []

    def pull():
        try:
            cri.pull(reference)
        except (grpc.RpcError, ValueError) as error:  # the latter: the channel was closed
            failed.append(error)

    thread = threading.Thread(target=pull)
    thread.start()
    return thread, failed


@newest
def test_the_model_is_here_before_its_image_is_unpacked(version, start, registry):
    """The image's first layer is held back: nothing is unpacked, yet the model arrives whole, and is read without the store."""
    cri, daemons, reference, layers = start(version, FLOE_PROFILES="off")
    held = registry.held[layers[0]["digest"]] = threading.Event()
    pull, failed = pulling(cri, reference)
    until(lambda: counters(daemons)["kept_stored_bytes"] >= len(WEIGHTS), 60)
    assert pull.is_alive()
    assert not [info for info in daemons.client.list("kind==committed") if "models-ahead" in str(info.labels)]
    assert counters(daemons)["front_bytes"] >= len(WEIGHTS)
    held.set()
    pull.join()
    assert not failed
    script = f"md5sum < {PATH}/weights.bin; cat {PATH}/config.json"
    code, text = cri.run(cri.run_pod("p"), reference, ["sh", "-c", script])
    assert (code, text) == (0, f"{hashlib.md5(WEIGHTS).hexdigest()}  -\n{{}}\n")
    found = counters(daemons)
    assert found["store_requests"] == 0


@newest
def test_a_pull_that_is_given_up_ends_the_fetch(version, start, registry):
    """Containerd removes the pull's snapshots, and no more of the model is asked for."""
    cri, daemons, reference, layers = start(version)
    registry.held[layers[0]["digest"]] = threading.Event()
    other = cri.again()
    pull, failed = pulling(other, reference)
    until(lambda: counters(daemons)["front_requests"], 60)
    other.close()
    pull.join()
    assert failed
    until(lambda: "is fetched no further" in daemons.log("snapshotter").read_text(), 30)


@newest
def test_nothing_of_it_happens_when_it_is_switched_off(version, start):
    cri, daemons, reference, _ = start(version, FLOE_PREFETCH_AT_PREPARE="0")
    cri.pull(reference)
    assert counters(daemons)["front_requests"] == counters(daemons)["profile_requests"] == 0
    assert cri.run(cri.run_pod("p"), reference, ["cat", f"{PATH}/config.json"]) == (0, "{}\n")
