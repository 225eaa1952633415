"""Pulls by CRI on a node with trusted keys, both daemons running, while somebody changes what the bucket says."""

import json
import re

import grpc
import pytest
from support.blobhost import BlobHost
from support.containerd import Containerd, versions
from support.floe_daemons import Daemons
from support.images import build_oci, busybox, files

from floe.store.keyfiles import create_key

pytestmark = pytest.mark.timeout(110)

PATH = "/models/m"


@pytest.fixture
def registry():
    with_blobs = BlobHost()
    yield with_blobs
    with_blobs.close()


@pytest.fixture
def key(tmp_path):
    """Made first: a node does not start with a directory of keys that holds none."""
    (tmp_path / "keys").mkdir()
    create_key(tmp_path / "keys" / "k")
    return tmp_path / "keys" / "k"


@pytest.fixture
def daemons(key, tmp_path):
    """A node that trusts `key`, whose commands publish unsigned unless told to sign."""
    # Without an index: it would have the good refs still.
    environ = {"FLOE_TRUSTED_KEYS": str(key.parent), "FLOE_PREFETCH_AT_PREPARE": "0", "FLOE_INDEX": "none"}
    made = Daemons(tmp_path / "h", environ)
    yield made
    made.close()


@pytest.fixture
def cri(daemons, registry, tmp_path):
    daemon = Containerd(
        versions()[-1],
        tmp_path,
        snapshotter_address=daemons.address,
        snapshotter_root=daemons.root,
        registries=(registry.address,),
    )
    yield daemon.cri()
    daemon.stop()


def fallbacks(daemons):
    return {reason: n for reason, n in daemons.json("status")["snapshotter"]["fallbacks"].items() if n}


def image(tmp_path, name):
    """An image none of whose layers is another's, but for busybox."""
    return build_oci(tmp_path / name, [files({"name": name}), busybox(), files({"etc/motd": f"{name}\n"})], tag="1")


def test_layers_are_lazy_when_signed_and_unpacked_when_not(daemons, cri, registry, key, tmp_path):
    sign = ("--signing-key", key)
    signed, unsigned, forged = (image(tmp_path, name) for name in ("signed", "unsigned", "forged"))
    daemons.floe("image", "index", unsigned.source)
    daemons.floe("image", "index", signed.source, *sign)
    daemons.floe("image", "index", forged.source, *sign)
    # The attacker lets the forged image's last layer be another one, with the signature that was there.
    refs = daemons.store / "refs/layers/sha256"
    ref = refs / forged.diff_ids[2].removeprefix("sha256:")
    other = json.loads((refs / signed.diff_ids[2].removeprefix("sha256:")).read_bytes())
    ref.write_bytes(json.dumps({**json.loads(ref.read_bytes()), "manifest": other["manifest"]}).encode())
    # busybox's layer, which all have, is signed with the others; containerd fetches it, since one below is unpacked.
    for built, layers, reasons in ((signed, 0, {}), (unsigned, 3, {"untrusted": 2}), (forged, 1, {"untrusted": 3})):
        before = registry.layers_fetched()
        reference = registry.add(built, built.directory.name)
        cri.pull(reference)
        assert registry.layers_fetched() - before == layers
        assert fallbacks(daemons) == reasons
        pod = cri.run_pod(built.directory.name)
        assert cri.run(pod, reference, ["cat", "/etc/motd"]) == (0, f"{built.directory.name}\n")


def test_a_model_is_mounted_when_signed_and_its_pull_fails_when_not(daemons, cri, registry, key, tmp_path):
    sign = ("--signing-key", key)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "w").write_bytes(b"weights")
    daemons.floe("model", "push", tmp_path / "model", "demo:1", *sign)
    base = image(tmp_path, "base")
    target = f"oci:{tmp_path}/attached:1"
    daemons.floe("image", "attach", base.source, target, "--model", f"demo:1={PATH}", *sign)
    reference = registry.add_layout(tmp_path / "attached", "1", "attached")
    # Of the model's own tree, and of the placed one.
    signatures = sorted((daemons.store / "signatures").rglob("*"))
    files_of = [path for path in signatures if path.is_file()]
    assert len(files_of) == 2
    kept = {path: path.read_bytes() for path in files_of}
    for path in files_of:
        path.unlink()
    with pytest.raises(grpc.RpcError, match="is not signed"):
        cri.pull(reference)
    one, two = kept
    one.write_bytes(kept[two].replace(two.name.encode(), one.name.encode()))
    two.write_bytes(kept[one].replace(one.name.encode(), two.name.encode()))
    with pytest.raises(grpc.RpcError, match="made for something else, or altered"):
        cri.pull(reference)
    assert re.search(r"model tree \w+ cannot be .*: untrusted", daemons.log("snapshotter").read_text())
    for path, data in kept.items():
        path.write_bytes(data)
    cri.pull(reference)
    pod = cri.run_pod("p")
    assert cri.run(pod, reference, ["cat", f"{PATH}/w"]) == (0, "weights\n")
    assert "trusts 1 key and nothing else" in daemons.floe("status").stdout
