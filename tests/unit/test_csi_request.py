"""What the CSI driver reads of a request, by which rules it goes, and that its messages are the specification's."""

from pathlib import Path

import pytest

from floe.cli.settings import load
from floe.csi.request import Wanted, check_place, pod_of, read_publish
from floe.csi.rules import Rule, check_allowed
from floe.csi.service import DriverService
from floe.protos.gen.csi import csi_pb2 as pb
from floe.store.errors import AccessDeniedError, BadInputError

UID = "7b1d5a52-4a4c-4a4e-8f0e-2f6b6a4c9c11"
TARGET = f"/var/lib/kubelet/pods/{UID}/volumes/kubernetes.io~csi/llama/mount"
RULES = (Rule("team-*", ("llama/*", "bert")), Rule("team-b", ("gpt",)), Rule("empty"))


def wanted(target=TARGET, namespace="team-a", uid=UID):
    return Wanted("csi-1", Path(target), "bert:1", namespace, "pod", uid)


@pytest.mark.parametrize(
    ("namespace", "model", "allowed"),
    [
        ("team-a", "bert", True),
        ("team-a", "llama/8b", True),
        ("team-a", "gpt", False),
        ("team-b", "gpt", True),  # all rules that match count
        ("team-b", "bert", True),
        ("team", "bert", False),
        ("Team-a", "bert", False),
        ("empty", "bert", False),
        ("", "bert", False),
    ],
)
def test_rules(namespace, model, allowed):
    if allowed:
        check_allowed(namespace, model, RULES)
    else:
        with pytest.raises(AccessDeniedError, match=repr(namespace)) as error:
            check_allowed(namespace, model, RULES)
        assert "csi_rules" in error.value.hint
    check_allowed(namespace, model, ())


def test_a_refusal_says_what_is_allowed():
    with pytest.raises(AccessDeniedError) as error:
        check_allowed("team-b", "other", RULES)
    assert "llama/*, bert, gpt" in error.value.hint
    with pytest.raises(AccessDeniedError) as error:
        check_allowed("empty", "other", RULES)
    assert "none" in error.value.hint


def test_a_pod_is_who_its_target_belongs_to():
    assert pod_of(wanted()) == "team-a"
    assert pod_of(wanted(TARGET.replace("/var/lib/kubelet", "/k"))) == "team-a"


@pytest.mark.parametrize(
    "request_",
    [
        wanted(namespace=""),
        wanted(uid=""),
        wanted(uid="another"),
        wanted(uid=UID[:-1]),
        wanted(TARGET.replace("kubernetes.io~csi", "kubernetes.io~nfs")),
        wanted(TARGET + "/mount"),
        wanted(TARGET.removesuffix("/mount")),
        wanted(TARGET.replace("kubernetes.io~csi", "kubernetes.io~csi/x")),
        wanted(f"/srv/{UID}"),
        # Of two pods in one path only the whole of it counts.
        wanted(f"/pods/{UID}/volumes/kubernetes.io~csi/x/mount/pods/other/volumes/kubernetes.io~csi/y/mount"),
    ],
)
def test_a_pod_that_cannot_be_told_is_refused(request_):
    with pytest.raises(AccessDeniedError) as error:
        pod_of(request_)
    assert "podInfoOnMount" in error.value.hint


@pytest.mark.parametrize("target", ["", "a", "/a/", "/a//b", "/a/./b", "/a/../b", "//a", "/a\0b", "/" + "a" * 4095])
def test_targets_that_are_refused(target):
    with pytest.raises(BadInputError, match="target_path"):
        check_place("v", target)


# the wire


def field(number, data):
    """A field of bytes, as protobuf encodes it, for numbers up to 15 and lengths up to 127."""
    assert number < 16
    assert len(data) < 128
    return bytes([number << 3 | 2, len(data)]) + data


def entry(key, value):
    return field(1, key) + field(2, value)


def test_a_request_is_read_by_the_numbers_of_the_specification():
    """Encoded by hand after csi.proto of the specification, with what the driver does not know of."""
    capability = field(2, field(1, b"") + field(2, b"ro") + field(3, b"1000")) + field(3, b"\x08\x03")
    data = (
        field(1, b"vol")
        + field(2, entry(b"unused", b"x"))
        + field(3, b"/staging")
        + field(4, b"/target")
        + field(5, capability)
        + b"\x30\x01"  # readonly
        + field(7, entry(b"token", b"hidden"))
        + field(8, entry(b"model", b"m:1"))
        + field(8, entry(b"csi.storage.k8s.io/pod.name", b"p"))
        + field(15, b"of a later version")
    )
    request = pb.NodePublishVolumeRequest.FromString(data)
    assert (request.volume_id, request.target_path, request.readonly) == ("vol", "/target", True)
    assert request.staging_target_path == "/staging"
    assert request.volume_capability.access_mode.mode == pb.VolumeCapability.AccessMode.MULTI_NODE_READER_ONLY
    assert list(request.volume_capability.mount.mount_flags) == ["ro"]
    assert "hidden" not in str(request)
    assert read_publish(request) == Wanted("vol", Path("/target"), "m:1", "", "p", "")
    block = pb.VolumeCapability.FromString(field(1, b"") + field(3, b"\x08\x07"))
    assert block.WhichOneof("access_type") == "block"
    assert block.access_mode.mode == pb.VolumeCapability.AccessMode.SINGLE_NODE_MULTI_WRITER
    gone = pb.NodeUnpublishVolumeRequest.FromString(field(1, b"vol") + field(2, b"/target"))
    assert (gone.volume_id, gone.target_path) == ("vol", "/target")


def test_answers_are_by_the_numbers_of_the_specification():
    service = DriverService(None, "n" * 300)
    assert service.get_plugin_info(None).SerializeToString().startswith(field(1, b"csi.floe") + b"\x12")
    assert service.probe(None).SerializeToString() == field(1, b"\x08\x01")
    assert service.get_plugin_capabilities(None).SerializeToString() == b""
    assert service.get_capabilities(None).SerializeToString() == b""
    assert DriverService(None, "node-1").get_info(None).SerializeToString() == field(1, b"node-1")
    assert len(service.get_info(None).node_id) == 256


# settings


def test_rules_are_written_as_they_are_read():
    text = '[{namespace = "team-*", models = ["llama/*", "bert"]}, {namespace = "none", models = []}]'
    found = load({"csi_rules": text}, {}, config="").csi_rules
    assert found.rules == (Rule("team-*", ("llama/*", "bert")), Rule("none"))
    assert str(found) == text
    assert str(load({"csi_rules": "none"}, {}, config="").csi_rules) == "none"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("[]", "a list of no rules"),
        ("nothing", "not a list of tables"),
        ('["a"]', "not a list of tables"),
        ('[{models = ["a"]}]', "table 1 has no namespace"),
        ('[{namespace = "a"}]', "table 1 (a): models is no list of texts"),
        ('[{namespace = "a", models = "b"}]', "models is no list of texts"),
        ('[{namespace = "a", models = [1]}]', "models is no list of texts"),
        ('[{namespace = "A", models = []}]', "'A' is no pattern of namespaces"),
        ('[{namespace = "a", models = ["b:1"]}]', "'b:1' is no pattern of model names"),
        ('[{namespace = "a", models = ["B"]}]', "'B' is no pattern of model names"),
        ('[{namespace = "a", models = []}, {namespace = "b", model = []}]', "table 2 (b) has an unknown key 'model'"),
    ],
)
def test_rules_that_are_refused(value, said):
    with pytest.raises(BadInputError) as error:
        load({"csi_rules": value}, {}, config="")
    assert said in str(error.value)
    assert error.value.hint
    assert str(error.value).startswith("--csi-rules: ")
