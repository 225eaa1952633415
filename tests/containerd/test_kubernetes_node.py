"""What the pods of install/kubernetes run on a node, with a host, an API server and a systemd that are made up; what kustomize makes of it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from bootstrap.record import Record

KUBERNETES = Path(__file__).resolve().parents[2] / "install/kubernetes"
KUSTOMIZATIONS = sorted(path.parent for path in KUBERNETES.rglob("kustomization.yaml"))
INDEXER = KUBERNETES / "examples/indexer"
BOOTSTRAP = KUBERNETES.parent / "bootstrap-node.sh"
(DAEMONSET,) = yaml.safe_load_all((KUBERNETES / "base/daemonset.yaml").read_text())
INSTALL_ARGUMENTS = DAEMONSET["spec"]["template"]["spec"]["initContainers"][0]["args"]
KEY = "startup-taint.cluster-autoscaler.kubernetes.io/floe"
OURS, OTHER = {"key": KEY, "effect": "NoSchedule"}, {"key": "dedicated", "value": "gpu", "effect": "NoSchedule"}

sys.path.insert(0, str(KUBERNETES))
import untaint  # noqa: E402 - of the image, no part of the package

sys.path.remove(str(KUBERNETES))


# kustomize


needs_kubectl = pytest.mark.skipif(
    not shutil.which("kubectl"), reason="no kubectl on this machine; tests/unit reads the files as they lie there"
)


def kustomized(folder):
    """The manifests that kubectl makes of a folder, each valid."""
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    found = [one for one in yaml.safe_load_all(done.stdout) if one]
    for one in found:
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)
    return found


@needs_kubectl
def test_kustomize_makes_indexers():
    found = kustomized(INDEXER)
    (deployment,) = (one for one in found if one["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    assert all(one["image"].startswith("registry.example/floe-indexer:") for one in pod["containers"])
    made = {(one["kind"], one["metadata"]["name"]) for one in found}
    named = {("ConfigMap", one["configMapRef"]["name"]) for c in pod["containers"] for one in c["envFrom"]}
    named |= {("Secret", one["secret"]["secretName"]) for one in pod["volumes"] if "secret" in one}
    named.remove(("Secret", "floe-indexer-registry"))  # made of a Docker configuration, by hand
    assert {kind for kind, _ in named} == {"ConfigMap", "Secret"}
    assert named <= made


@needs_kubectl
@pytest.mark.parametrize("folder", [one for one in KUSTOMIZATIONS if one != INDEXER], ids=lambda path: path.name)
def test_kustomize_makes_manifests_of_it(folder):
    found = kustomized(folder)
    (daemonset,) = (one for one in found if one["kind"] == "DaemonSet" and one["metadata"]["name"] == "floe")
    pod = daemonset["spec"]["template"]["spec"]
    containers = pod.get("initContainers", []) + pod["containers"]
    assert all(one["image"].startswith("registry.example/floe-installer:") for one in containers)
    volumes = {one["name"] for one in pod["volumes"]}
    assert {mount["name"] for one in containers for mount in one.get("volumeMounts", [])} <= volumes
    # What a pod names must be what was generated, digest and all.
    made = {one["metadata"]["name"] for one in found if one["kind"] == "ConfigMap"}
    assert {name["configMapRef"]["name"] for one in containers for name in one.get("envFrom", [])} <= made
    kinds = {one["kind"] for one in found}
    if folder.name == "uninstall":
        assert pod["initContainers"][0]["args"] == ["uninstall"]
        assert "RuntimeClass" not in kinds
    else:
        assert "RuntimeClass" in kinds
    if folder.name == "preinstalled":
        assert volumes == {"state", "token"}
        assert "initContainers" not in pod
    if folder.name == "csi":
        assert pod["initContainers"][0]["args"][-1] == "--csi"
        assert "CSIDriver" in kinds
    if folder.name == "s3":
        assert pod["initContainers"][0]["args"][-1] == "--format"


@needs_kubectl
@pytest.mark.parametrize("folder", ["examples/s3", "overlays/uninstall", "overlays/csi", "overlays/preinstalled"])
def test_the_image_that_a_fleet_names_is_the_one_that_runs(folder, tmp_path):
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    fleet = tmp_path / "fleet"
    fleet.mkdir()
    image = {"name": "registry.example/floe-installer", "newName": "my.registry/team/floe", "newTag": "9.9.9"}
    own = tmp_path / "kubernetes" / folder / "kustomization.yaml"
    found = yaml.safe_load(own.read_text())
    if "images" in found:  # it is edited, as it says
        assert [one["name"] for one in found["images"]] == [image["name"]]
        own.write_text(yaml.safe_dump({**found, "images": [image]}))
        fleet = own.parent
    else:
        mine = {"resources": [f"../kubernetes/{folder}"], "images": [image]}
        (fleet / "kustomization.yaml").write_text(yaml.safe_dump(mine))
    pods = [one["spec"]["template"]["spec"] for one in kustomized(fleet) if one["kind"] == "DaemonSet"]
    images = [one["image"] for pod in pods for one in (*pod.get("initContainers", ()), *pod["containers"])]
    theirs = [name for name in images if "node-driver-registrar" not in name]
    assert set(theirs) == {"my.registry/team/floe:9.9.9"}


# the taint


class Api(BaseHTTPRequestHandler):
    """Enough of an API server for one node: GET, and the two operations of a JSON patch that are needed."""

    def log_message(self, *_):
        pass

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.server.seen.append(("GET", self.path, self.headers["Authorization"]))
        self.answer(200, self.server.node)

    def do_PATCH(self):
        assert self.headers["Content-Type"] == "application/json-patch+json"
        patch = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.before_patch()
        taints = list(self.server.node["spec"]["taints"])
        for one in patch:
            number = int(one["path"].removeprefix("/spec/taints/"))
            if one["op"] == "test" and (number >= len(taints) or taints[number] != one["value"]):
                self.answer(422, {"message": "the server rejected our request: testing value failed"})
                return
            if one["op"] == "remove":
                del taints[number]
        self.server.node["spec"]["taints"] = taints
        self.answer(200, self.server.node)


@pytest.fixture
def api(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    server.node = {"metadata": {"name": "n1"}, "spec": {"taints": [OTHER, OURS]}, "status": {}}
    server.seen, server.before_patch = [], lambda: None
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    (tmp_path / "token").write_text("of-this-hour\n")
    server.cluster = untaint.Cluster(f"http://127.0.0.1:{server.server_port}", tmp_path)
    server.ready = tmp_path / "ready"
    yield server
    server.shutdown()
    server.server_close()


def look(api):
    return untaint.look(api.cluster, "n1", KEY, api.ready)


def test_the_taint_goes_when_floe_serves_and_no_other(api):
    with pytest.raises(untaint.WaitingError, match="does not serve"):
        look(api)
    assert api.seen == []
    api.ready.touch()
    assert KEY in look(api)
    assert api.node["spec"]["taints"] == [OTHER]
    assert api.seen == [("GET", "/api/v1/nodes/n1", "Bearer of-this-hour")]
    assert look(api) == ""
    api.node["spec"]["taints"] = [OURS, OTHER, {**OURS, "effect": "NoExecute"}]  # the node came back
    assert KEY in look(api)
    assert api.node["spec"]["taints"] == [OTHER]


def test_taints_that_others_change_meanwhile_are_left_alone(api):
    api.ready.touch()
    api.before_patch = lambda: api.node["spec"]["taints"].insert(0, {"key": "new", "effect": "NoExecute"})
    with pytest.raises(OSError, match="422"):
        look(api)
    assert OURS in api.node["spec"]["taints"]
    api.before_patch = lambda: None
    assert KEY in look(api)
    assert [one["key"] for one in api.node["spec"]["taints"]] == ["new", "dedicated"]


def test_a_handler_that_kubelet_does_not_know_yet_is_waited_for(api):
    api.ready.write_text("runc-floe\n")
    api.node["status"]["runtimeHandlers"] = [{"name": ""}, {"name": "runc"}]
    with pytest.raises(untaint.WaitingError, match="runc-floe"):
        look(api)
    api.node["status"]["runtimeHandlers"].append({"name": "runc-floe"})
    assert KEY in look(api)


def test_where_floe_is_for_all_pods_no_handler_is_waited_for(api):
    api.ready.touch()
    api.node["status"]["runtimeHandlers"] = [{"name": ""}, {"name": "runc"}]
    assert KEY in look(api)
    assert api.node["spec"]["taints"] == [OTHER]


# the node


@pytest.fixture
def host(tmp_path):
    """A host's root, the pod's Secret, a bootstrap-node.sh that notes how it was called, and a systemd by way of nsenter."""
    for name in ("host/etc", "host/proc", "secrets", "wheels", "bin", "state"):
        (tmp_path / name).mkdir(parents=True)
    program(
        tmp_path / "bootstrap-node.sh", f'echo "$@" >{tmp_path}/called; env >{tmp_path}/environ; exit "${{CODE:-0}}"'
    )
    program(
        tmp_path / "bin/nsenter",
        f'for last; do :; done; echo "$*" >>{tmp_path}/asked\n'
        f'case "$*" in *" -- cat /"*) exec cat "{tmp_path}/host$last" ;;\n'
        f'*" is-enabled "*) exec grep -qx "$last" {tmp_path}/enabled ;; esac; grep -qx "$last" {tmp_path}/active',
    )
    for name in ("active", "enabled"):
        (tmp_path / name).write_text("")
    return tmp_path


def program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def environ(host, **more):
    return {
        "PATH": f"{host}/bin:{os.environ['PATH']}",
        "FLOE_NODE_HOST": f"{host}/host",
        "FLOE_NODE_SECRETS": f"{host}/secrets",
        "FLOE_NODE_WHEELS": f"{host}/wheels",
        "FLOE_NODE_STATE": f"{host}/state/ready",
        "FLOE_NODE_BOOTSTRAP": f"{host}/bootstrap-node.sh",
        "FLOE_STORE": "s3://b/p",
        **more,
    }


def node_sh(host, *words, code=0, **more):
    done = subprocess.run(
        [KUBERNETES / "node.sh", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        env=environ(host, **more),
    )
    assert done.returncode == code, done.stderr
    return done


def test_install_is_bootstrap_node_on_the_host(host):
    node_sh(host, "install", "--runtime-handler", "runc-floe")
    assert (host / "called").read_text().split() == [
        "--host-root", f"{host}/host", "--offline", f"{host}/wheels", "--yes", "--declarative", "--runtime-handler", "runc-floe",
    ]  # fmt: skip
    variables = (host / "environ").read_text()
    assert "FLOE_STORE=s3://b/p" in variables
    assert "FLOE_NODE_" not in variables
    assert not (host / "host/etc/floe").exists()
    assert units_of(host) == set()
    node_sh(host, "install", code=7, CODE="7")


def test_the_secret_lies_on_the_node_and_follows_its_changes(host):
    placed = host / "host/etc/floe/secrets"
    (host / "secrets/aws-credentials").write_text("[default]\n")
    (host / "secrets/redis-password").write_text("one")
    said = node_sh(host, "install").stdout
    assert "aws-credentials" in said
    assert "one" not in said
    assert (placed / "redis-password").read_text() == "one"
    assert (placed.stat().st_mode & 0o777, (placed / "redis-password").stat().st_mode & 0o777) == (0o700, 0o600)
    drop_ins = [
        host / f"host/etc/systemd/system/{unit}.service.d/secrets.conf" for unit in ("floe-packfs", "floe-snapshotter")
    ]
    for path in drop_ins:
        assert (
            path.read_text() == "[Service]\nEnvironment=AWS_SHARED_CREDENTIALS_FILE=/etc/floe/secrets/aws-credentials\n"
        )
    before = (placed / "aws-credentials").stat().st_ino
    (host / "secrets/redis-password").write_text("two")
    node_sh(host, "install")
    assert (placed / "redis-password").read_text() == "two"
    assert (placed / "aws-credentials").stat().st_ino == before
    (host / "secrets/aws-credentials").unlink()
    node_sh(host, "install")
    assert [path.name for path in placed.iterdir()] == ["redis-password"]
    assert not any(path.parent.exists() for path in drop_ins)
    (host / "secrets/redis-password").unlink()  # or there is no Secret any more
    node_sh(host, "install")
    assert not placed.exists()


def test_uninstall_keeps_the_secret_until_it_was_done(host):
    (host / "secrets/aws-credentials").write_text("[default]\n")
    node_sh(host, "install")
    node_sh(host, "uninstall", code=1, CODE="1")  # containers need Floe
    assert (host / "host/etc/floe/secrets/aws-credentials").exists()
    node_sh(host, "uninstall")
    assert (host / "called").read_text().split() == ["--host-root", f"{host}/host", "--uninstall", "--yes"]
    assert not (host / "host/etc/floe").exists()
    assert list((host / "host/etc/systemd/system").iterdir()) == []


def units_of(host):
    folder = host / "host/etc/systemd/system"
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() or path.is_symlink()}


def test_on_gke_floe_is_put_back_into_the_configuration_that_is_written_at_boot(host):
    """By a drop-in of containerd's unit, which is there before the installer runs, and gone before containerd is restarted without Floe."""
    units = host / "host/etc/systemd/system"
    units.mkdir(parents=True)
    theirs = "kube-node-configuration.service"
    (units / theirs).write_text("")
    program(host / "bootstrap-node.sh", f"ls {units}/containerd.service.d >>{host}/seen 2>&1; exit ${{CODE:-0}}")
    node_sh(host, *INSTALL_ARGUMENTS)
    ours = {
        "containerd.service.d/50-floe.conf",
        "floe-planted.service",
        "floe-packfs.service.wants/floe-planted.service",
    }
    drop_in = units / "containerd.service.d/50-floe.conf"
    assert units_of(host) == {theirs, *ours}
    assert drop_in.read_text().endswith(
        "[Service]\nExecStartPre=-/usr/local/bin/floe containerd configure --runtime runc-floe\n"
    )
    copy = host / "host/opt/floe-planted/copy-cache.sh"
    assert copy.stat().st_mode & 0o777 == 0o755
    node_sh(host, "uninstall", code=1, CODE="1")  # containers need Floe: all is as it was
    assert units_of(host) == {theirs, *ours}
    assert "--runtime runc-floe" in drop_in.read_text()
    node_sh(host, "install", "--runtime-handler", "none")
    assert drop_in.read_text().endswith("floe containerd configure\n")
    (host / "seen").unlink()
    (host / "active").write_text("daemon-reload\n")
    node_sh(host, "uninstall")
    assert "50-floe.conf" not in (host / "seen").read_text()
    assert units_of(host) == {theirs}
    assert not copy.parent.exists()
    assert "systemctl daemon-reload" in (host / "asked").read_text()


@pytest.mark.skipif(not BOOTSTRAP.exists(), reason="this tree has no install/bootstrap-node.sh")
@pytest.mark.parametrize("words", [INSTALL_ARGUMENTS, [*INSTALL_ARGUMENTS, "--format"], ["uninstall"]])
def test_bootstrap_node_knows_these_flags(host, words):
    node_sh(host, *words)
    flags = (host / "called").read_text().split()
    # A root without /bin/sh: refused, after the flags were read and before anything changes.
    (host / "wheels/floe-1-py3-none-any.whl").touch()
    done = subprocess.run([BOOTSTRAP, *flags], capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, "has no /bin/sh" in done.stderr) == (1, True), done.stderr


def test_a_host_that_is_not_mounted_and_an_unknown_word_are_refused(host):
    assert "hostPath" in node_sh(host, "install", code=1, FLOE_NODE_HOST=f"{host}/nothing").stderr
    node_sh(host, "installl", code=2)
    node_sh(host, code=2)
    assert not (host / "called").exists()


@pytest.fixture
def watching(host):
    """A `node.sh watch`, and what makes it look again without its ten seconds. It has ended afterwards."""
    program(host / "bin/sleep", f"while [ ! -e {host}/go ]; do /bin/sleep 0.02; done; rm {host}/go")
    process = subprocess.Popen(
        [KUBERNETES / "node.sh", "watch"], stdout=subprocess.PIPE, text=True, env=environ(host), start_new_session=True
    )

    def look_again():
        (host / "go").touch()
        until(lambda: not (host / "go").exists())

    process.look_again = look_again
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the sleep that it waits for, or left
        process.wait(10)
        process.stdout.close()


def test_watch_says_ready_only_while_both_daemons_serve(host, watching):
    ready = host / "state/ready"
    looks = [
        ("", False),
        ("floe-packfs\n", False),
        ("floe-packfs\nfloe-snapshotter\n", True),
        ("floe-snapshotter\n", False),
    ]
    for number, (active, wanted) in enumerate(looks):
        if number:
            (host / "active").write_text(active)
            watching.look_again()
        until(lambda wanted=wanted: ready.exists() == wanted and (host / "asked").exists())
    watching.send_signal(signal.SIGTERM)
    assert watching.wait(10) == 0
    (host / "go").touch()  # for the sleep that it left, which has its output open
    assert watching.stdout.read().splitlines() == [
        f"floe-node: the daemons serve: {word}" for word in ("no", "yes", "no")
    ]
    assert "--target 1 --mount -- systemctl is-active --quiet floe-packfs" in (host / "asked").read_text()


def test_watch_looks_at_the_csi_driver_where_it_is_installed(host, watching):
    ready, daemons = host / "state/ready", "floe-packfs\nfloe-snapshotter\n"
    (host / "enabled").write_text("floe-csi\n")
    for active, wanted in ((daemons, False), (f"{daemons}floe-csi\n", True), (daemons, False)):
        (host / "active").write_text(active)
        watching.look_again()
        until(lambda wanted=wanted: ready.exists() == wanted)
    (host / "enabled").write_text("")
    watching.look_again()
    until(ready.exists)


def test_watch_says_for_which_handler_the_node_was_configured(host, watching):
    """As bootstrap-node.sh noted it, whatever the manifest says: the taint of a node with Floe for all pods goes too."""
    ready, node = host / "state/ready", Record(host / "host/var/lib/floe/node")
    for asked, handler in (
        ({"runtime_handler": "runc-floe", "disks": "auto"}, "runc-floe\n"),
        ({"runtime_handler": "none"}, ""),
        ({"disks": "auto"}, ""),
    ):
        node.data["asked"] = asked
        node.save()
        for active, there in (("floe-packfs\nfloe-snapshotter\n", True), ("", False)):
            (host / "active").write_text(active)
            watching.look_again()
            until(lambda there=there: ready.exists() == there)
            assert not there or ready.read_text() == handler
    shutil.rmtree(node.place)  # Floe was put here by hand
    (host / "active").write_text("floe-packfs\nfloe-snapshotter\n")
    watching.look_again()
    until(ready.exists)
    assert ready.read_text() == ""


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
