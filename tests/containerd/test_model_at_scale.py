"""A model of a gibibyte, as people have it: pushed, pushed again, changed, mounted, in an image, in a container."""

import contextlib
import hashlib
import json
import subprocess
from urllib.parse import urlsplit

import pytest
from support import fleet, seaweed
from support.containerd import Containerd, each_version, versions
from support.floe_daemons import Daemons
from support.floe_node import Node, wait_until
from support.hfmodel import TENSOR_BYTES, HuggingFaceModel, Weights, file_digest
from support.images import add, build_oci, busybox, make_tar
from support.registry import running_registry
from support.slow_proxy import SlowProxy

from floe.protos.packfs_control import PackfsClient
from floe.store.catalog import Catalog
from floe.store.ids import ModelRef
from floe.store.index import NullIndex
from floe.store.objects import open_store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

MIB = 1 << 20
PATH = "/models/weights"
WEIGHTS = Weights()
SPARE = 8 * MIB  # what a change may store beside the changed tensor


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    assert WEIGHTS.total >= 1 << 30
    return HuggingFaceModel(tmp_path_factory.mktemp("hub"), WEIGHTS)


@pytest.fixture(scope="module")
def node(model, tmp_path_factory):
    """The machine that pushes, into the embedded store; `pushed` is what the first push said."""
    made = Node(tmp_path_factory.mktemp("pusher"))
    made.pushed = made.json("model", "push", model.snapshot, "acme/weights:1")
    yield made
    made.clean_up()


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    with running_registry(tmp_path_factory.mktemp("registry")) as made:
        yield made


@pytest.fixture(scope="module")
def attached(node, registry, tmp_path_factory):
    """The reference of an image that runs busybox and carries the model."""
    image = build_oci(tmp_path_factory.mktemp("base"), [busybox(applets=("cat", "ls", "md5sum", "sh", "touch"))])
    source, target = registry.push(image.source, "app:1"), f"{registry.host}/app:weights"
    node.floe("image", "index", "--plain-http", source)
    node.floe("image", "attach", "--plain-http", source, target, "--model", f"acme/weights:1={PATH}")
    return target


@pytest.fixture
def start(node, registry, tmp_path):
    """Starts a fresh machine: containerd, and with it both of Floe's daemons unless `floe=False`."""
    with contextlib.ExitStack() as stack:

        def start(version, *, floe=True):
            settings = {}
            if floe:
                environ = {key: node.environ[key] for key in ("FLOE_STORE", "FLOE_INDEX")}
                environ["FLOE_PROFILES"] = "off"  # what earlier starts read would be fetched at the pull
                environ["FLOE_PREFETCH_AT_PREPARE"] = "0"  # and without that, all of it
                daemons = Daemons(tmp_path / "h", environ)
                stack.callback(daemons.close)
                settings = {"snapshotter_address": daemons.address, "snapshotter_root": daemons.root}
            daemon = Containerd(version, tmp_path, registries=(registry.host,), **settings)
            stack.callback(daemon.stop)
            return daemon.cri(), daemons if floe else None

        yield start


def objects(node):
    """Every object of the embedded store with its size."""
    return {str(p.relative_to(node.store)): p.stat().st_size for p in node.store.rglob("*") if p.is_file()}


def packs(stored):
    return {name for name in stored if name.startswith("packs/")}


def test_pushing_again_stores_no_new_pack(node, model):
    before = objects(node)
    assert len(packs(before)) > 0
    assert sum(before[name] for name in packs(before)) > 0.5 * WEIGHTS.total
    again = node.json("model", "push", model.snapshot, "acme/weights:1")
    assert (again["new_packs"], again["new_bytes"]) == (0, 0)
    assert again["manifest"] == again["previous"] == node.pushed["manifest"]
    assert objects(node).keys() == before.keys()


def test_one_changed_tensor_stores_that_tensor_alone(node, model, tmp_path):
    name = f"model.layers.{WEIGHTS.tensors + 4}.weight"
    revision = model.changed(1, name)
    before = objects(node)
    node.floe("model", "push", revision, "acme/weights:2")
    new = {key: size for key, size in objects(node).items() if key not in before}
    assert TENSOR_BYTES * 0.8 < sum(new.values()) <= TENSOR_BYTES + SPARE
    assert all(objects(node)[key] == size for key, size in before.items() if key.startswith("packs/"))
    node.floe("model", "mount", "acme/weights:2", tmp_path / "m")
    try:
        expected = {tensor for tensor, file in WEIGHTS.weight_map().items() if file == WEIGHTS.shard_name(1)}
        assert WEIGHTS.load(tmp_path / "m", 1) == expected - {name} | {f"-{name}"}
    finally:
        node.floe("umount", tmp_path / "m")


def test_an_image_layer_with_the_same_file_shares_its_packs(node, model, tmp_path):
    name = WEIGHTS.shard_name(0)
    fill = [busybox(), lambda tar: add(tar, f"srv/{name}", (model.snapshot / name).read_bytes())]
    image = build_oci(tmp_path / "baked", fill, compression="")
    before = objects(node)
    node.floe("image", "index", image.source)
    new = {key: size for key, size in objects(node).items() if key not in before}
    assert sum(new.values()) < SPARE
    catalog = Catalog(open_store(f"file://{node.store}"), NullIndex())
    found = catalog.layer(image.diff_ids[1])
    assert found is not None
    _, manifest = catalog.resolve_model(ModelRef.parse("acme/weights:1"))
    assert {pack.id for pack in manifest.packs} & {pack.id for pack in found[1].packs}


@pytest.mark.parametrize("index", fleet.INDEXES[-1:])
def test_mounting_fetches_next_to_nothing_and_safetensors_loads_it(index, model, tmp_path):
    server = seaweed.running()
    proxy = SlowProxy(("127.0.0.1", urlsplit(server.endpoint).port))
    node = Node(tmp_path)
    node.environ |= {**fleet.environment(index), "FLOE_STORE_TIMEOUT": "30"}
    mountpoint = tmp_path / "mnt"
    try:
        node.floe("model", "push", model.snapshot, "acme/weights")
        # From here on every byte out of the store is counted on its way.
        node.environ["FLOE_STORE"] = node.environ["FLOE_STORE"].replace(
            f"%3A{urlsplit(server.endpoint).port}", f"%3A{urlsplit('//' + proxy.address).port}"
        )
        before = proxy.passed
        node.floe("model", "mount", "acme/weights", mountpoint)
        mounting = proxy.passed - before
        assert 0 < mounting < WEIGHTS.total / 100
        sizes = {path.name: path.stat().st_size for path in mountpoint.iterdir()}
        assert sizes == {path.name: path.stat().st_size for path in model.snapshot.iterdir()}
        assert proxy.passed - before == mounting
        weight_map = json.loads((mountpoint / "model.safetensors.index.json").read_text())["weight_map"]
        assert weight_map == WEIGHTS.weight_map()
        for shard in range(WEIGHTS.shards):
            name = WEIGHTS.shard_name(shard)
            assert WEIGHTS.load(mountpoint, shard) == {tensor for tensor, file in weight_map.items() if file == name}
            # Each frame once: what was not read yet was not fetched, but for what was read ahead (`readahead`).
            wanted = (shard + 1) * WEIGHTS.total // WEIGHTS.shards
            assert wanted * 0.7 < proxy.passed - before < wanted * 1.02 + 128 * MIB
        assert proxy.passed - before < WEIGHTS.total * 1.02
        node.floe("umount", mountpoint)
        wait_until(lambda: not node.processes())
    finally:
        proxy.close()
        node.clean_up()


@each_version()
def test_a_container_of_an_attached_image_reads_the_model(version, attached, model, registry, start):
    cri, daemons = start(version)
    worker = PackfsClient(daemons.run_dir)
    registry_before = registry.blob_requests()
    cri.pull(attached)
    pulled = fetched(worker)
    assert pulled < WEIGHTS.total / 100
    assert not layers(attached) & set(registry.blob_requests()[len(registry_before) :])
    # Another shard, and with it other packs' bytes, for each version.
    name = WEIGHTS.shard_name(versions().index(version) % WEIGHTS.shards)
    shard = model.snapshot / name
    script = f"cat {PATH}/config.json; echo; ls {PATH}; md5sum <{PATH}/{name}; echo own >{PATH}/config.json; >{PATH}/x"
    pod = cri.run_pod("reader")
    code, text = cri.run(pod, attached, ["sh", "-c", script])
    assert code == 0
    lines = text.splitlines()
    assert json.loads(lines[0]) == json.loads((model.snapshot / "config.json").read_text())
    assert set(lines[1:-1]) == set(model.blobs)
    with shard.open("rb") as file:
        assert lines[-1].split()[0] == file_digest(file, "md5")
    read = fetched(worker) - pulled
    assert 0.7 * shard.stat().st_size < read < shard.stat().st_size + 80 * MIB
    # The model is read-only: what a container writes at its path is that container's own, as docs/SEMANTICS.md says.
    code, text = cri.run(pod, attached, ["sh", "-c", f"cat {PATH}/config.json; echo; ls {PATH}"])
    assert (code, text.splitlines()) == (0, lines[:-1])


@each_version()
def test_without_floe_the_attached_image_starts_and_says_what_is_missing(version, attached, model, start):
    cri, _ = start(version, floe=False)
    cri.pull(attached)
    code, text = cri.run(cri.run_pod("plain"), attached, ["sh", "-c", f"ls {PATH}; cat {PATH}/README*"])
    assert code == 0
    assert text.splitlines()[0].startswith("README")
    assert "Floe" in text
    assert "acme/weights:1" in text
    assert WEIGHTS.shard_name(0) not in text


@each_version()
def test_an_image_built_upon_an_attached_one_has_the_model_too(version, attached, model, registry, start, tmp_path):
    child = build_child(attached, registry, tmp_path / "child", f"child:{version.name}")
    cri, daemons = start(version)
    cri.pull(child)
    script = f"cat /own; cat {PATH}/config.json; echo; ls {PATH}"
    code, text = cri.run(cri.run_pod("child"), child, ["sh", "-c", script])
    assert code == 0, text
    lines = text.splitlines()
    assert lines[0] == "of the child"
    assert json.loads(lines[1]) == json.loads((model.snapshot / "config.json").read_text())
    assert set(model.blobs) <= set(lines[2:])
    assert fetched(PackfsClient(daemons.run_dir)) < WEIGHTS.total / 10


def build_child(attached, registry, directory, name):
    """What a builder makes of `FROM attached` and one more file: no layer keeps its descriptor's annotations."""
    copy = ["skopeo", "--insecure-policy", "copy", "-q", "--src-tls-verify=false"]
    subprocess.run([*copy, f"docker://{attached}", f"oci:{directory}:1"], check=True, timeout=60)
    blobs = directory / "blobs" / "sha256"

    def read(descriptor):
        return json.loads((blobs / descriptor["digest"].partition(":")[2]).read_bytes())

    def write(descriptor, data):
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {**descriptor, "digest": f"sha256:{digest}", "size": len(data)}

    index = json.loads((directory / "index.json").read_text())
    manifest = read(index["manifests"][0])
    config = read(manifest["config"])
    assert any(layer.pop("annotations", None) for layer in manifest["layers"])
    layer = make_tar(lambda tar: add(tar, "own", b"of the child\n"))
    manifest["layers"].append(write({"mediaType": "application/vnd.oci.image.layer.v1.tar"}, layer))
    config["rootfs"]["diff_ids"].append(manifest["layers"][-1]["digest"])
    config.pop("history", None)
    manifest["config"] = write(manifest["config"], json.dumps(config).encode())
    index["manifests"][0] = write(index["manifests"][0], json.dumps(manifest).encode())
    (directory / "index.json").write_text(json.dumps(index))
    return registry.push(f"oci:{directory}:1", name)


def layers(reference):
    """The digests of an image's layers."""
    found = subprocess.run(
        ["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{reference}"],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return {layer["digest"] for layer in json.loads(found.stdout)["layers"]}


def fetched(worker):
    """Bytes that the pack filesystem has had from the store, read ahead included."""
    counters = worker.status()["counters"]
    return counters["store_bytes"] + counters["readahead_bytes"]
