"""The image of a Bento on real containerd: its models are where BentoML looks for them, and readable by BentoML's user."""

import contextlib
import hashlib
import tarfile

import pytest
from support.bento import COMMIT, BentoStore, hub_entry, hub_model, with_models
from support.containerd import each_version
from support.floe_node import Node
from support.images import add, build_oci, busybox, files
from support.other_node import started
from support.registry import running_registry

ROOT = "/home/bentoml/bento"
APPLETS = ("cat", "find", "id", "ls", "md5sum", "sh", "sort", "touch", "xargs")
MODELS = {
    "own:b2": {"weights.bin": b"own" * 3000, "sub/config.json": b"{}"},
    "shared:1": {"weights.bin": bytes(range(256)) * 5000},
}
HUB = {"model.safetensors": b"tiny" * 3000, "config.json": b'{"a": 1}'}


@pytest.fixture
def machine(tmp_path):
    """Who pushes: BentoML's store with two Bentos, a registry, and a base image in it."""
    with contextlib.ExitStack() as stack:
        node = Node(tmp_path)
        stack.callback(node.clean_up)
        node.bentoml = BentoStore(tmp_path / "bentoml")
        for tag, content in MODELS.items():
            node.bentoml.model(tag, content)
        text = with_models(2, hub_entry("Acme/Tiny"))
        for tag in ("front:v1", "other:v9"):
            node.bentoml.bento(2, tag=tag, yaml=text)
        node.hub = hub_model(tmp_path / "hub", "Acme/Tiny", HUB)
        node.environ |= {"BENTOML_HOME": str(node.bentoml.home), "HF_HUB_CACHE": str(tmp_path / "hub")}
        node.registry = stack.enter_context(running_registry(tmp_path / "registry"))
        made = build_oci(tmp_path / "base", [busybox(applets=APPLETS), lambda tar: add(tar, "etc/base", b"base")])
        node.base = node.registry.push(made.source, "python:3")
        yield node


def publish(node, bento, name):
    target = f"{node.registry.host}/{name}"
    node.floe("bento", "image", "--plain-http", bento, target, "--base", node.base)
    return target


def expected(node):
    """Path below the Bento -> content, of all that a container sees of models."""
    found = {
        f"models/{tag.replace(':', '/')}/{name}": data
        for tag, content in MODELS.items()
        for name, data in content.items()
    }
    for tag in MODELS:
        path = f"models/{tag.replace(':', '/')}/model.yaml"
        found[path] = (node.bentoml.home / path).read_bytes()
        found[f"models/{tag.partition(':')[0]}/latest"] = tag.partition(":")[2].encode()
    hub = "hf-models/models--acme--tiny"
    found |= {f"{hub}/snapshots/{COMMIT}/{name}": data for name, data in HUB.items()}
    found |= {f"{hub}/{path.relative_to(node.hub)}": path.read_bytes() for path in (node.hub / "blobs").iterdir()}
    found[f"{hub}/refs/main"] = COMMIT.encode()
    return found


@each_version()
def test_a_container_of_a_bento_has_its_models(version, machine, tmp_path):
    target, other = publish(machine, "front", "front:v1"), publish(machine, "other", "other:v9")
    with contextlib.ExitStack() as stack:
        cri = started(stack, version, machine, tmp_path)[0].cri()
        pod = cri.run_pod("bento")
        seen = []
        for reference in (target, other):
            cri.pull(reference)
            # By the image's own user, without a word of who that is.
            script = f"id -u; find {ROOT}/models {ROOT}/hf-models -type f -o -type l | sort | xargs md5sum; touch {ROOT}/mine"
            code, text = cri.run(pod, reference, ["sh", "-c", script])
            assert code == 0, text
            lines = text.splitlines()
            assert lines[0] == "1034"
            seen.append(dict(reversed(line.split(None, 1)) for line in lines[1:]))
            code, text = cri.run(
                pod, reference, ["sh", "-c", f"cat {ROOT}/bento.yaml; echo $BENTO_PATH $HF_HUB_OFFLINE"]
            )
            assert text.splitlines()[-1] == f"{ROOT} 1"
            assert f"version: {reference.rpartition(':')[2]}" in text
        wanted = {f"{ROOT}/{path}": hashlib.md5(data).hexdigest() for path, data in expected(machine).items()}
        assert seen == [wanted, wanted]


@each_version(older=pytest.mark.slow)
def test_an_image_with_its_models_inside_runs_beside_one_without(version, machine, tmp_path):
    """What was built before, as `bentoml containerize` does, on a node with Floe: unpacked, or lazily once it is indexed."""
    inside = {f"{ROOT}/{path}"[1:]: data for path, data in expected(machine).items()}
    hub = f"{ROOT}/hf-models/models--acme--tiny/snapshots/{COMMIT}"[1:]
    links = {f"{hub}/{name}": f"../../blobs/{hashlib.sha256(data).hexdigest()}" for name, data in HUB.items()}
    fill = files({name: data for name, data in inside.items() if name not in links})
    layers = {}
    for name in ("plain", "indexed"):

        def old(tar, name=name):
            add(tar, "etc/which", name.encode())  # a layer of its own for each
            fill(tar)
            for path, target in links.items():
                add(tar, path, kind=tarfile.SYMTYPE, link=target, mode=0o777)

        made = build_oci(tmp_path / name, [busybox(applets=APPLETS), old])
        machine.registry.push(made.source, f"{name}:1")
        layers[name] = made.layers[-1]["digest"]
    plain, indexed = (f"{machine.registry.host}/{name}:1" for name in layers)
    machine.floe("image", "index", "--plain-http", indexed)
    new = publish(machine, "front", "front:v1")
    wanted = {f"{ROOT}/{path}": hashlib.md5(data).hexdigest() for path, data in expected(machine).items()}
    fetched = machine.registry.blob_requests()
    with contextlib.ExitStack() as stack:
        cri = started(stack, version, machine, tmp_path)[0].cri()
        pod = cri.run_pod("bento")
        for reference in (plain, indexed, new):
            cri.pull(reference)
            script = f"find {ROOT}/models {ROOT}/hf-models -type f -o -type l | sort | xargs md5sum"
            code, text = cri.run(pod, reference, ["sh", "-c", script])
            assert code == 0, text
            assert dict(reversed(line.split(None, 1)) for line in text.splitlines()) == wanted
    asked = machine.registry.blob_requests()[len(fetched) :]
    assert (layers["plain"] in asked, layers["indexed"] in asked) == (True, False)


@pytest.mark.slow
@each_version()
def test_a_node_without_floe_starts_a_bento_and_says_what_is_missing(version, machine, tmp_path):
    target = publish(machine, "front", "front:v1")
    with contextlib.ExitStack() as stack:
        cri = started(stack, version, machine, tmp_path, floe=False)[0].cri()
        cri.pull(target)
        script = f"cd {ROOT}/models/shared; cat latest; ls 1; cat 1/README"
        code, text = cri.run(cri.run_pod("plain"), target, ["sh", "-c", script])
        assert code == 0
        assert text.startswith("1README")
        assert "The model shared:1 belongs here" in text


@pytest.mark.slow
@each_version()
def test_attached_several_and_detached(version, machine, tmp_path):
    for tag in MODELS:
        machine.floe("model", "push", machine.bentoml.home / "models" / tag.replace(":", "/"), tag)
    source, both, one = (f"{machine.registry.host}/app:{tag}" for tag in ("0", "both", "one"))
    made = build_oci(
        tmp_path / "app",
        [busybox(applets=APPLETS), lambda tar: add(tar, "models/own/was", b"here before", mode=0o644)],
    )
    machine.registry.push(made.source, "app:0")
    models = [
        word for name in ("own:b2", "shared:1") for word in ("--model", f"{name}=/models/{name.partition(':')[0]}")
    ]
    machine.floe("image", "attach", "--plain-http", source, both, *models)
    machine.floe("image", "detach", "--plain-http", both, one, "--model", "own")
    with contextlib.ExitStack() as stack:
        cri = started(stack, version, machine, tmp_path)[0].cri()
        pod = cri.run_pod("app")
        seen = {}
        for reference in (both, one):
            cri.pull(reference)
            code, text = cri.run(
                pod, reference, ["sh", "-c", "ls /models/own /models/shared; md5sum </models/shared/weights.bin"]
            )
            assert code == 0, text
            seen[reference] = text.splitlines()
    assert seen[both][:5] == ["/models/own:", "model.yaml", "sub", "weights.bin", ""]
    assert seen[one][:3] == ["/models/own:", "was", ""]
    assert seen[both][5:] == seen[one][3:]
