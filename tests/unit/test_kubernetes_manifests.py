"""install/kubernetes as it lies there: schemas, and what must hold between its files. Reads files, nothing else."""

import re
from pathlib import Path

import celpy
import kubernetes_validate
import pytest
import yaml

import floe
from floe.cli import settings
from floe.cli.main import build_parser
from floe.csi import request, service
from floe.indexer.webhook import parse_listen
from floe.store.index.redis.keys import Keys

INSTALL = Path(__file__).parents[2] / "install"
KUBERNETES = INSTALL / "kubernetes"
TAINT = "startup-taint.cluster-autoscaler.kubernetes.io/floe"
OLDEST, NEWEST = "1.30", kubernetes_validate.latest_version()
KUSTOMIZATIONS = sorted(KUBERNETES.rglob("kustomization.yaml"))
SINCE = {"image-volume": "1.31"}  # for what older ones do not know
MANIFESTS = sorted(
    path
    for path in INSTALL.rglob("*.yaml")
    if path.name != "kustomization.yaml" and not {"identity", "observability"} & {*path.parts}
)


def documents(path):
    return [one for one in yaml.safe_load_all(path.read_text()) if one]


def named(path, kind):
    (found,) = (one for one in documents(path) if one["kind"] == kind)
    return found


DAEMONSET = named(KUBERNETES / "base/daemonset.yaml", "DaemonSet")
POD = DAEMONSET["spec"]["template"]["spec"]
CONTAINERS = {one["name"]: one for one in POD["initContainers"] + POD["containers"]}


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifests_are_what_their_schemas_say(path, version):
    found = documents(path)
    assert found
    for one in found:
        if one["apiVersion"].startswith("keda.sh/"):
            continue  # a resource that others define; what Floe says in it is looked at below
        kubernetes_validate.validate(one, SINCE.get(path.stem, version) if version == OLDEST else version, strict=True)


def test_a_manifest_with_a_slip_would_be_refused():
    one = named(KUBERNETES / "base/runtimeclass.yaml", "RuntimeClass")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**one, "handlers": "runc-floe"}, NEWEST, strict=True)


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda path: path.parent.name)
def test_kustomizations_name_what_is_there(path):
    (found,) = documents(path)
    assert (found["kind"], found["apiVersion"]) == ("Kustomization", "kustomize.config.k8s.io/v1beta1")
    for resource in found.get("resources", []):
        assert (path.parent / resource).exists(), resource
    for generator in found.get("secretGenerator", []):
        for file in generator["files"]:
            assert (path.parent / file).is_file(), file
    for patch in found.get("patches", []):
        assert list(yaml.safe_load_all(patch["patch"]))
    for image in found.get("images", []):
        assert image["name"] in ("registry.example/floe-installer", "floe-indexer")
        assert image["newTag"] == floe.__version__


def test_the_base_names_the_image_of_this_version():
    """By the one name that every fleet's kustomization replaces."""
    assert {one["image"] for one in CONTAINERS.values()} == {f"registry.example/floe-installer:{floe.__version__}"}


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda path: path.parent.name)
def test_settings_are_floe_s(path):
    (found,) = documents(path)
    for generator in found.get("configMapGenerator", []):
        for literal in generator["literals"]:
            name = literal.partition("=")[0]
            assert name.removeprefix("FLOE_").lower() in settings.KEYS, name


def test_base_holds_all_that_lies_in_it():
    (found,) = documents(KUBERNETES / "base/kustomization.yaml")
    assert sorted(found["resources"]) == sorted(
        path.name for path in (KUBERNETES / "base").glob("*.yaml") if path.name != "kustomization.yaml"
    )


def test_taint_handler_and_label_have_one_name_everywhere():
    runtime = named(KUBERNETES / "base/runtimeclass.yaml", "RuntimeClass")
    handler = runtime["handler"]
    arguments = CONTAINERS["install"]["args"]
    assert arguments[arguments.index("--runtime-handler") + 1] == handler
    untaint = {one["name"]: one.get("value") for one in CONTAINERS["untaint"]["env"]}
    # Which handler is waited for the node says: an overlay may give the installer another, or none.
    assert {key: value for key, value in untaint.items() if value} == {"TAINT": TAINT, "STATE": "/state/ready"}
    assert TAINT in (KUBERNETES / "base/admission.yaml").read_text()
    assert runtime["scheduling"]["nodeSelector"].items() <= POD["nodeSelector"].items()
    files = [path for path in (KUBERNETES / "examples").glob("*.yaml") if path.name != "csi.yaml"]  # of any runtime
    examples = [one for path in files for one in documents(path)]
    assert len(examples) > 3
    for one in examples:
        template = {"Pod": one, "Deployment": one.get("spec", {}).get("template")}.get(one["kind"])
        if template:
            assert template["spec"]["runtimeClassName"] == runtime["metadata"]["name"]
            assert template["metadata"]["annotations"]["io.containerd.cri.runtime-handler"] == handler


def test_who_has_the_host_has_no_token_and_who_has_the_token_has_no_host():
    assert POD["automountServiceAccountToken"] is False
    mounts = {name: {one["name"] for one in container["volumeMounts"]} for name, container in CONTAINERS.items()}
    privileged = {name for name, one in CONTAINERS.items() if one["securityContext"].get("privileged")}
    assert privileged == {"install", "watch"}
    assert {name for name, volumes in mounts.items() if "token" in volumes} == {"untaint"}
    assert {name for name, volumes in mounts.items() if volumes & {"host", "secrets"}} == {"install"}
    weak = CONTAINERS["untaint"]["securityContext"]
    assert weak["runAsNonRoot"]
    assert weak["readOnlyRootFilesystem"]
    assert weak["capabilities"] == {"drop": ["ALL"]}
    (role,) = (one for one in documents(KUBERNETES / "base/rbac.yaml") if one["kind"] == "ClusterRole")
    assert role["rules"] == [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "patch"]}]


CSI = KUBERNETES / "overlays/csi"


def test_the_driver_is_registered_where_it_listens_and_examples_ask_for_it():
    name = named(CSI / "csidriver.yaml", "CSIDriver")["metadata"]["name"]
    assert name == service.NAME
    spec = named(CSI / "csidriver.yaml", "CSIDriver")["spec"]
    assert spec["podInfoOnMount"] is True  # rules rest on it
    assert spec["attachRequired"] is False  # else kubelets would wait for a controller
    pod = named(CSI / "registrar.yaml", "DaemonSet")["spec"]["template"]["spec"]
    arguments = dict(one.removeprefix("--").split("=") for one in pod["containers"][0]["args"])
    assert arguments["kubelet-registration-path"] == str(settings.Settings().csi_socket)
    places = {one["mountPath"]: one["name"] for one in pod["containers"][0]["volumeMounts"]}
    hosts = {one["name"]: one["hostPath"]["path"] for one in pod["volumes"]}
    assert arguments["csi-address"] == "/csi/csi.sock"
    assert hosts[places["/csi"]] == str(settings.Settings().csi_socket.parent)
    assert hosts[places["/registration"]] == str(settings.Settings().kubelet_dir / "plugins_registry")
    assert pod["nodeSelector"] == POD["nodeSelector"]
    assert pod["automountServiceAccountToken"] is False
    assert "privileged" not in pod["containers"][0]["securityContext"]
    found = documents(KUBERNETES / "examples/csi.yaml")
    inline, persistent, claim, claims = found
    asked = [inline["spec"]["volumes"][0]["csi"], persistent["spec"]["csi"]]
    assert [one["driver"] for one in asked] == [name, name]
    assert all(one["readOnly"] for one in asked)
    assert claim["spec"]["volumeName"] == persistent["metadata"]["name"]
    assert claims["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


@pytest.mark.parametrize("number", [0, 1], ids=["inline", "persistent"])
def test_what_a_kubelet_makes_of_the_examples_is_accepted(number):
    spec = documents(KUBERNETES / "examples/csi.yaml")[number]["spec"]
    volume = spec["csi"] if number else spec["volumes"][0]["csi"]
    mode = request.csi_pb2.VolumeCapability.AccessMode
    wanted = request.read_publish(
        request.csi_pb2.NodePublishVolumeRequest(
            volume_id=volume.get("volumeHandle", "csi-1"),
            target_path="/var/lib/kubelet/pods/1/volumes/kubernetes.io~csi/llama/mount",
            # Of a claim a kubelet says what the pod's volume says, and the volume's first mode.
            readonly=not number and volume["readOnly"],
            volume_capability=request.csi_pb2.VolumeCapability(
                mount=request.csi_pb2.VolumeCapability.MountVolume(),
                access_mode=mode(mode=mode.MULTI_NODE_READER_ONLY if number else mode.SINGLE_NODE_WRITER),
            ),
            volume_context=volume["volumeAttributes"],
        )
    )
    assert wanted.model == "llama:8b"


def test_indexers_have_nothing_of_a_node_and_their_settings_can_be_read():
    folder = KUBERNETES / "examples/indexer"
    deployment = named(folder / "deployment.yaml", "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert not [volume for volume in pod["volumes"] if "hostPath" in volume]
    args = build_parser().parse_args(container["args"])
    assert parse_listen(args.webhook)[1] == container["ports"][0]["containerPort"]
    (found,) = documents(folder / "kustomization.yaml")
    (generator,) = found["configMapGenerator"]
    environ = dict(literal.partition("=")[::2] for literal in generator["literals"])
    assert generator["name"] == container["envFrom"][0]["configMapRef"]["name"]
    read = settings.load({}, environ, config="")
    assert len(read.image_policy.rules) == 2
    assert read.image_grace == 7 * 86_400
    mounts = {one["mountPath"] for one in container["volumeMounts"]}
    assert any(str(read.spool).startswith(f"{mount}/") for mount in mounts)
    (secrets,) = found["secretGenerator"]
    assert Path(args.webhook_secret).name in secrets["files"]
    for name in re.findall(r"/secrets/([\w.-]+)", read.index):
        assert name in secrets["files"]


def test_indexers_are_scaled_by_the_stream_that_they_read():
    scaled = named(KUBERNETES / "examples/indexer/scaledobject.yaml", "ScaledObject")
    deployment = named(KUBERNETES / "examples/indexer/deployment.yaml", "Deployment")
    assert scaled["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    (trigger,) = scaled["spec"]["triggers"]
    stream = Keys("floe", "uuid").jobs("stream")
    assert re.sub(r"^floe:[^:]+:", "floe:STORE:", stream) == trigger["metadata"]["stream"]


def test_nodes_are_upgraded_one_by_one_and_a_service_s_name_is_no_setting():
    assert DAEMONSET["spec"]["updateStrategy"]["rollingUpdate"] == {"maxUnavailable": 1}
    assert POD["enableServiceLinks"] is False


@pytest.mark.skipif(not (INSTALL / "bootstrap-node.sh").exists(), reason="this tree has no install/bootstrap-node.sh")
def test_what_the_image_copies_is_there():
    text = (KUBERNETES / "Containerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert "install/kubernetes/node.sh" in copied
    assert [name for name in copied if not (INSTALL.parent / name).exists()] == []
    ignored = (KUBERNETES / "Containerfile.dockerignore").read_text().split()
    wheel = (KUBERNETES / "wheelhouse.sh").read_text()
    parts = re.search(r"for name in ([^;]+); do cp", wheel)[1].split()
    assert {f"!{name}" for name in parts} | {"!install"} <= set(ignored)


# the policy, by an evaluator of its language

OURS = {"key": TAINT, "effect": "NoSchedule"}
OTHER = {"key": "dedicated", "value": "gpu", "effect": "NoSchedule"}


def node(*taints, name="n1", labels=None, **spec):
    return {"metadata": {"name": name, "labels": labels or {"a": "b"}}, "spec": {"taints": list(taints), **spec}}


def refusals(old, new, token_of="n1"):
    """The messages of the policy's rules that a change breaks."""
    spec = named(KUBERNETES / "base/admission.yaml", "ValidatingAdmissionPolicy")["spec"]
    environment = celpy.Environment()
    extra = {"authentication.kubernetes.io/node-name": [token_of]} if token_of else {"other": ["x"]}
    facts = {
        "request": {"userInfo": {"username": "system:serviceaccount:floe-system:floe", "extra": extra}},
        "object": new,
        "oldObject": old,
    }

    def value(expression, more=None):
        program = environment.program(environment.compile(expression))
        return program.evaluate({**celpy.json_to_cel(facts), **(more or {})})

    assert all(value(one["expression"]) for one in spec["matchConditions"])
    variables = celpy.celtypes.MapType()
    for one in spec["variables"]:
        variables[celpy.celtypes.StringType(one["name"])] = value(one["expression"])
    return [one["message"] for one in spec["validations"] if not value(one["expression"], {"variables": variables})]


def test_the_policy_allows_what_untaint_does():
    assert refusals(node(OURS, OTHER), node(OTHER)) == []
    assert refusals(node(OTHER), node(OTHER)) == []
    gone = node(OURS)
    assert refusals(gone, {**gone, "spec": {}}) == []


@pytest.mark.parametrize(
    ("old", "new", "token_of", "why"),
    [
        (node(OURS), node(), "n2", "its own node"),
        (node(OURS), node(), None, "its own node"),
        (node(OURS, OTHER), node(), "n1", "Floe's startup taint only"),
        (node(OTHER), node({**OTHER, "value": "x"}), "n1", "add no taint"),
        (node(), node(OTHER), "n1", "add no taint"),
        (node(OURS), node(labels={"a": "c"}), "n1", "taints only"),
        (node(OURS), node(unschedulable=True), "n1", "taints only"),
    ],
)
def test_the_policy_refuses_everything_else(old, new, token_of, why):
    assert any(why in message for message in refusals(old, new, token_of))
