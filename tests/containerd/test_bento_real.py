"""A Bento that the real bentoml built: what Floe reads of it, and the real bentoml serving it out of a lazily mounted image."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from support.bento import stock_layer
from support.containerd import TOOLS, Containerd, versions
from support.fakehub import running_hub
from support.floe_daemons import Daemons
from support.floe_node import Node
from support.images import add, build_oci
from support.pythonimage import ENV, PYTHON, app_layers
from support.registry import running_registry

BENTOML = TOOLS / "bentoml" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not BENTOML.exists(), reason="no BentoML in .tools/bentoml: run install/setup.sh test"),
]
ROOT = "/home/bentoml/bento"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "fedcba9876543210fedcba9876543210fedcba98"
HUB = {"config.json": b'{"a": 1}', "model.safetensors": bytes(range(256)) * 1000}
HUB_OLDER = {"config.json": b'{"a": 1}', "model.safetensors": bytes(range(255, -1, -1)) * 1000}
SERVICE = """
import hashlib
from pathlib import Path
import bentoml

def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()

@bentoml.service
class Encoder:
    shared = bentoml.models.BentoModel("shared:latest")

    @bentoml.api
    def encode(self, text: str) -> str:
        return digest(self.shared.path_of("weights.bin")) + text

@bentoml.service(envs=[{"name": "GREETING", "value": "hello"}])
class Front:
    shared = bentoml.models.BentoModel("shared:latest")
    own = bentoml.models.BentoModel("own:2")
    tiny = bentoml.models.HuggingFaceModel("Acme/Tiny")
    encoder = bentoml.depends(Encoder)

    @bentoml.api
    def predict(self, text: str) -> dict:
        return {
            "shared": digest(self.shared.path_of("weights.bin")),
            "own": digest(self.own.path_of("weights.bin")),
            "tiny": digest(Path(self.tiny) / "model.safetensors"),
            "encoded": self.encoder.encode(text),
        }
"""
# Two commits of one repository, which `bentoml containerize` cannot put into an image.
BOTH = """
import bentoml

@bentoml.service
class Both:
    newer = bentoml.models.HuggingFaceModel("Acme/Tiny")
    older = bentoml.models.HuggingFaceModel("Acme/Tiny", revision="v1")

    @bentoml.api
    def paths(self) -> list[str]:
        return [self.newer, self.older]
"""
BUILD_BOTH = """
import sys
import bentoml
options = {"version": "v1", "name": "both", "python": {"lock_packages": False, "packages": ["bentoml"]}}
bentoml.bentos.build("service:Both", build_ctx=sys.argv[1], **options)
"""
# The models as a server resolves them at its start.
RESOLVE = """
import json
import bentoml
print(json.dumps([model.to_model().resolve() for model in bentoml.bentos.get("both:v1").info.all_models]))
"""
# What `bentoml containerize` gives a builder, kept for comparison.
BUILD = """
import os, shutil, sys
import bentoml
from bentoml._internal.container import construct_containerfile
for name, size in (("shared:0", 10), ("shared:1", 3_000_000), ("own:1", 1000), ("own:2", 2000)):
    with bentoml.models.create(name) as model:
        with open(model.path_of("weights.bin"), "wb") as file:
            file.write(os.urandom(size))
options = {"version": "v1", "name": "front", "python": {"lock_packages": False, "packages": ["bentoml"]}}
bento = bentoml.bentos.build("service:Front", build_ctx=sys.argv[1], **options)
bentoml.bentos.export_bento("front:v1", sys.argv[2])
with construct_containerfile(bento, enable_buildkit=False) as (context, _):
    shutil.copytree(context, sys.argv[3], symlinks=True)
"""
# Inside the container: serve, ask once, stop.
ASK = """
import json, subprocess, sys, time, urllib.request
server = subprocess.Popen([sys.executable, "-m", "bentoml", "serve", "--port", "3999", "/home/bentoml/bento"], stdout=sys.stderr)
for _ in range(600):
    time.sleep(0.2)
    try:
        urllib.request.urlopen("http://127.0.0.1:3999/readyz")
        break
    except OSError:
        if server.poll() is not None:
            sys.exit("bentoml serve ended")
request = urllib.request.Request("http://127.0.0.1:3999/predict", json.dumps({"text": "hi"}).encode(), {"Content-Type": "application/json"})
print(urllib.request.urlopen(request).read().decode())
server.terminate()
"""
LIST = f"""
import hashlib, json, os
found = {{}}
for base, folders, names in os.walk("{ROOT}"):
    for name in folders:
        found[os.path.join(base, name)] = "folder"
    for name in names:
        path = os.path.join(base, name)
        found[path] = os.readlink(path) if os.path.islink(path) else hashlib.sha256(open(path, "rb").read()).hexdigest()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The store, export and build context that the real package made."""
    folder = tmp_path_factory.mktemp("bentoml")
    (folder / "src").mkdir()
    (folder / "both").mkdir()
    (folder / "src/service.py").write_text(SERVICE)
    (folder / "both/service.py").write_text(BOTH)
    environ = {
        **os.environ,
        "PATH": f"{BENTOML.parent}:{os.environ['PATH']}",
        "BENTOML_HOME": str(folder / "home"),
        "HF_HOME": str(folder / "hf"),
        "BENTOML_DO_NOT_TRACK": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    with running_hub("Acme/Tiny", {COMMIT: HUB, OLDER: HUB_OLDER}, {"main": COMMIT, "v1": OLDER}) as hub:
        environ["HF_ENDPOINT"] = hub
        bentoml(environ, BUILD, folder / "src", folder / "front.bento", folder / "context")
        bentoml(environ, BUILD_BOTH, folder / "both")
        bentoml(environ, RESOLVE)  # as who runs it once: both commits are in the cache then
    return folder


def bentoml(environ, program, *argv):
    """Run a program where the real package is; its stdout."""
    command = [BENTOML, "-c", program, *argv]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def machine(built, tmp_path_factory):
    with contextlib.ExitStack() as stack:
        node = Node(tmp_path_factory.mktemp("machine"))
        stack.callback(node.clean_up)
        node.environ |= {"BENTOML_HOME": str(built / "home"), "HF_HOME": str(built / "hf")}
        node.registry = stack.enter_context(running_registry(tmp_path_factory.mktemp("registry")))
        yield node


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_the_models_of_the_store_and_of_the_export_are_the_same(machine, built, tmp_path):
    pushed = machine.json("bento", "push", "front")["models"]
    assert sorted(model["name"] for model in pushed) == [f"acme/tiny:{COMMIT}", "own:2", "shared:1"]
    before = {model["name"]: model["manifest"] for model in pushed}
    again = machine.json("bento", "push", built / "front.bento", "--read-again", "--bentoml-home", tmp_path)["models"]
    assert {model["name"]: model["manifest"] for model in again} == before
    for name in ("own/2", "shared/1"):
        copy = tmp_path / name.replace("/", "-")
        machine.floe("model", "export", name.replace("/", ":"), copy)
        stored = built / "home/models" / name
        assert {path.name: digest(path) for path in copy.iterdir()} == {
            path.name: digest(path) for path in stored.iterdir()
        }


def test_two_commits_of_one_repository_are_resolved_out_of_one_model(machine, built, tmp_path):
    (model,) = machine.json("bento", "push", "both")["models"]
    assert model["name"] == f"acme/tiny:{COMMIT[:12]}-{OLDER[:12]}"
    cache = tmp_path / "hf-models"
    cache.mkdir()
    machine.floe("model", "export", model["name"], cache / "models--acme--tiny")
    environ = {"BENTOML_HOME": str(built / "home"), "BENTOML_HF_CACHE_DIR": str(cache), "HF_HUB_OFFLINE": "1"}
    found = json.loads(bentoml({**os.environ, **environ, "BENTOML_DO_NOT_TRACK": "1"}, RESOLVE).splitlines()[-1])
    assert [Path(path).name for path in found] == [COMMIT, OLDER]
    for path, content in zip(found, (HUB, HUB_OLDER), strict=True):
        assert {file.name: file.read_bytes() for file in Path(path).iterdir()} == content


def listing(cri, pod, image):
    """What a container has at the Bento's path, and its digest of the Dockerfile, which `bentoml containerize` makes anew."""
    code, text = cri.run(pod, image, [PYTHON, "-c", LIST])
    assert code == 0, text
    found = json.loads(text.splitlines()[-1])
    return found, found.pop(f"{ROOT}/env/docker/Dockerfile")


def test_bentoml_serves_out_of_the_image(machine, built, tmp_path):
    site = BENTOML.parent.parent / "lib" / f"python3.{sys.version_info[1]}" / "site-packages"
    layers = [*app_layers("", site=site, bytecode=True), lambda tar: add(tar, "tmp", kind=tarfile.DIRTYPE, mode=0o1777)]
    image = build_oci(tmp_path / "base", layers, env=(*ENV, "HOME=/home/bentoml"), compression="none")
    made = build_oci(tmp_path / "stock", [*layers, stock_layer(built / "context")], env=ENV, compression="none")
    stock = machine.registry.push(made.source, "stock:v1")
    base, target = machine.registry.push(image.source, "python:3"), f"{machine.registry.host}/front:v1"
    machine.floe("bento", "image", "--plain-http", "front:v1", target, "--base", base)
    machine.floe("image", "index", "--plain-http", target)
    version = versions()[-1]
    with contextlib.ExitStack() as stack:
        environ = {key: machine.environ[key] for key in ("FLOE_STORE", "FLOE_INDEX")}
        daemons = Daemons(tmp_path / "h", environ)
        stack.callback(daemons.close)
        settings = {"snapshotter_address": daemons.address, "snapshotter_root": daemons.root}
        daemon = Containerd(version, tmp_path, registries=(machine.registry.host,), **settings)
        stack.callback(daemon.stop)
        cri = daemon.cri()
        cri.pull(target)
        cri.pull(stock)
        pod = cri.run_pod("bento")
        wanted, _ = listing(cri, pod, stock)
        seen, dockerfile = listing(cri, pod, target)
        assert dockerfile == digest(built / "home/bentos/front/v1/env/docker/Dockerfile")
        assert wanted[f"{ROOT}/models/shared/1/weights.bin"] == digest(built / "home/models/shared/1/weights.bin")
        assert seen.keys() == wanted.keys()
        assert {path: (seen[path], wanted[path]) for path in seen if seen[path] != wanted[path]} == {}
        models = {
            name: digest(built / f"home/models/{path}/weights.bin")
            for name, path in (("own", "own/2"), ("shared", "shared/1"))
        }
        tiny = hashlib.sha256(HUB["model.safetensors"]).hexdigest()
        for _ in ("lazily", "warm"):
            code, text = cri.run(pod, target, [PYTHON, "-c", ASK])
            assert code == 0, text[-3000:]
            (answer,) = [json.loads(line) for line in text.splitlines() if line.startswith('{"')]
            assert answer == {**models, "tiny": tiny, "encoded": models["shared"] + "hi"}
