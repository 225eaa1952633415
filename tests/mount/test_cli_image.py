"""`floe image` as a user runs it, on OCI layouts on disk."""

import json
import os
import subprocess
import sys

import pytest
from support import dockersave
from support.floe_node import Node
from support.images import build_oci, files, oci_archive
from support.registry import running_registry


@pytest.fixture
def node(tmp_path):
    node = Node(tmp_path)
    yield node
    node.clean_up()


def build(folder, tag="v1", content="hello", **options):
    layers = [files({"etc/one": "one" * 1000}), files({"etc/two": content})]
    return build_oci(folder, layers, tag=tag, **options)


def test_index_list_show_remove(node, tmp_path):
    image = build(tmp_path / "oci")
    name = f"oci:{tmp_path}/oci:v1"
    indexed = node.json("image", "index", name)
    assert indexed["digest"] == image.manifest_digest
    assert (indexed["new_layers"], len(indexed["layers"]), indexed["names"]) == (2, 2, [name])
    assert [layer["diff_id"] for layer in indexed["layers"]] == list(image.diff_ids)
    assert all(layer["indexed"] for layer in indexed["layers"])

    again = node.json("image", "index", name)
    assert (again["new_layers"], again["new_packs"], again["new_bytes"]) == (0, 0, 0)
    for option in ("--profile", "--no-profile"):  # nobody started it yet
        again = node.json("image", "index", option, name)
        assert (again["laid_out_layers"], again["hot_bytes"], again["copied_bytes"], again["new_packs"]) == (0, 0, 0, 0)
    assert [listed["digest"] for listed in node.json("image", "ls")] == [image.manifest_digest]
    assert name in node.floe("image", "ls").stdout
    for text in (name, image.manifest_digest, image.manifest_digest[7:19]):
        assert node.json("image", "show", text)["digest"] == image.manifest_digest
    assert image.diff_ids[0] in node.floe("image", "show", name).stdout

    assert image.manifest_digest in node.floe("image", "rm", name).stdout
    assert node.json("image", "ls") == []
    node.floe("image", "show", name, code=1)
    node.floe("image", "rm", name, code=1)
    # The layers are shared, and stay.
    assert node.json("image", "index", name)["new_layers"] == 0


def test_an_archive_and_the_text_for_people(node, tmp_path):
    build(tmp_path / "oci")
    archive = oci_archive(tmp_path / "oci", tmp_path / "image.tar")
    told = node.floe("image", "index", f"oci-archive:{archive}").stdout
    assert "2 layers, 2 of them new" in told


def test_a_file_of_docker_save(node, tmp_path):
    image = build(tmp_path / "oci")
    name = f"docker-archive:{dockersave.legacy(tmp_path / 'saved.tar', [(image, ['app:1']), (image, None)])}:app:1"
    indexed = node.json("image", "index", name)
    assert [layer["diff_id"] for layer in indexed["layers"]] == list(image.diff_ids)
    full = name.replace(":app:1", ":docker.io/library/app:1")
    assert indexed["names"] == [full]
    assert node.json("image", "show", name)["digest"] == indexed["digest"]


def test_what_is_taken_from_a_registry_is_what_its_log_says_to_the_byte(node, tmp_path):
    contents = [files({"etc/one": os.urandom(1_000_003)}), files({"etc/two": "two" * 100_000})]
    image = build_oci(tmp_path / "oci", contents)
    with running_registry(tmp_path / "registry") as registry:
        name = registry.push(image.source, "app:1")
        before = registry.downloads()  # the push may have asked for something
        told, after = node.json("image", "index", "--plain-http", name)["registry"], registry.downloads()
        assert told == {what: {k: after[what][k] - before[what][k] for k in after[what]} for what in after}
        assert told["requests"] == {"blob": 3, "manifest": 1}
        assert told["bytes"]["blob"] > sum(layer["size"] for layer in image.layers) > 1_000_003
        # What is stored costs its configuration and manifest alone.
        again = node.json("image", "index", "--plain-http", name)["registry"]
        assert again["requests"] == {"blob": 1, "manifest": 1}
        assert again["bytes"] == {k: registry.downloads()["bytes"][k] - after["bytes"][k] for k in again["bytes"]}


def test_registries_are_reached_as_hosts_toml_says(node, tmp_path):
    image = build(tmp_path / "oci")
    with running_registry(tmp_path / "registry") as registry:
        registry.push(image.source, "app:1")
        hosts = tmp_path / "certs.d" / "registry.example" / "hosts.toml"
        hosts.parent.mkdir(parents=True)
        hosts.write_text(f'server = "http://{registry.host}"\n')
        given = ("--registry-config", str(tmp_path / "certs.d"))
        indexed = node.json("image", "index", "registry.example/app:1", *given)
        assert indexed["digest"] == image.manifest_digest
        assert indexed["names"] == ["registry.example/app:1"]
        hosts.write_text("server = 3\n")
        refused = node.floe("image", "index", "registry.example/app:1", *given, code=2)
        assert f"{hosts}: server: it is no text" in refused.stderr


def a_missing_layout(node, home):
    return [f"oci:{home}/nowhere"], 1


def a_missing_tag(node, home):
    build(home / "oci")
    return [f"oci:{home}/oci:v2"], 1


def a_bad_reference(node, home):
    return ["UPPER CASE"], 2


def a_bad_platform(node, home):
    build(home / "oci")
    return [f"oci:{home}/oci:v1", "--platform", "nonsense"], 2


def a_truncated_layer(node, home):
    image = build(home / "oci")
    blob = home / "oci" / "blobs" / "sha256" / image.layers[1]["digest"].removeprefix("sha256:")
    blob.write_bytes(blob.read_bytes()[:-10])
    return [f"oci:{home}/oci:v1"], 1


def an_unreachable_registry(node, home):
    return ["127.0.0.1:1/app:v1", "--plain-http"], 1


def an_unreachable_store(node, home):
    build(home / "oci")
    node.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    node.environ["FLOE_STORE"] = "s3://bucket/prefix?endpoint=http://127.0.0.1:1&region=r&path_style=true"
    return [f"oci:{home}/oci:v1"], 1


@pytest.mark.parametrize(
    "fault",
    [
        a_missing_layout,
        a_missing_tag,
        a_bad_reference,
        a_bad_platform,
        a_truncated_layer,
        an_unreachable_registry,
        an_unreachable_store,
    ],
)
def test_an_index_that_cannot_be_publishes_nothing(node, tmp_path, fault):
    build(tmp_path / "other", content="other")
    node.floe("image", "index", f"oci:{tmp_path}/other:v1")
    before = node.refs()
    argv, code = fault(node, tmp_path)
    node.floe("image", "index", *argv, code=code)
    assert node.refs() == before


def test_attach(node, tmp_path):
    build(tmp_path / "oci")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "weights").write_bytes(bytes(range(256)) * 100)
    model = node.json("model", "push", tmp_path / "m", "iris")
    target = f"oci:{tmp_path}/out:v1"
    made = node.json("image", "attach", f"oci:{tmp_path}/oci:v1", target, "--model", "iris=/opt/model")
    assert made["models"] == [{"name": "iris:latest", "path": "/opt/model"}]
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["manifests"][0]["digest"] == made["digest"]
    manifest = json.loads((tmp_path / "out" / "blobs" / "sha256" / made["digest"].removeprefix("sha256:")).read_text())
    annotations = manifest["layers"][-1]["annotations"]
    assert "containerd.io/snapshot/floe.model" in annotations
    shown = node.json("image", "index", target)
    assert [model_["manifest"] for model_ in shown["models"]] == [model["manifest"]]
    told = node.floe("image", "show", target).stdout
    assert "iris:latest at /opt/model" in told


def test_attach_several_and_detach(node, tmp_path):
    build(tmp_path / "oci")
    for name in ("iris", "rose"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
        node.floe("model", "push", tmp_path / name, f"{name}:1")
    both, out = f"oci:{tmp_path}/out:both", f"oci:{tmp_path}/out"
    models = ["--model", "iris:1=/m/iris", "--model", "rose:1=/m/rose"]
    made = node.json("image", "attach", f"oci:{tmp_path}/oci:v1", both, *models)
    assert [model["path"] for model in made["models"]] == ["/m/iris", "/m/rose"]
    node.floe("image", "index", both)

    refused = node.floe("image", "detach", both, f"{out}:x", "--model", "tulip", code=1).stderr
    assert "does not carry tulip:latest" in refused
    assert "it carries iris:1 at /m/iris, rose:1 at /m/rose" in refused
    less = node.json("image", "detach", both, f"{out}:rose", "--model", "iris")
    assert [model["name"] for model in less["detached"]] == ["iris:1"]
    assert [(model["name"], model["path"]) for model in less["models"]] == [("rose:1", "/m/rose")]
    shown = node.json("image", "index", f"{out}:rose")
    assert [layer["model"] for layer in shown["layers"]] == [None, None, "rose:1"]
    told = node.floe("image", "detach", both, f"{out}:bare", "--model", "/m/iris", "--model", "rose:1").stdout
    assert "without iris:1 at /m/iris\nwithout rose:1 at /m/rose\n" in told
    assert node.json("image", "detach", both, f"{out}:all", "--all")["digest"] in told


def test_weights_leave_the_layers(node, tmp_path):
    big = {"opt/m/a.bin": b"a" * 70_000, "opt/m/b.bin": b"b" * 80_000, "opt/m/small": b"s", "srv/c.bin": b"c" * 66_000}
    build_oci(
        tmp_path / "oci", [files(big), files({"opt/m/b.bin": b"B" * 90_000, "etc/x": "x"})], tag="v1", compression=""
    )
    source, target = f"oci:{tmp_path}/oci:v1", f"oci:{tmp_path}/out:v1"
    found = node.json("image", "weights", source, "--min-size", "64KiB")
    assert found == [
        {"path": "/opt/m", "files": 2, "size_bytes": 160_000},
        {"path": "/srv", "files": 1, "size_bytes": 66_000},
    ]
    assert not node.store.exists()
    assert node.floe("image", "weights", source).stdout.split() == ["DIRECTORY", "FILES", "SIZE"]
    made = node.json("image", "detach", source, target, "--directory", "/opt/m=weights:1")
    assert (made["new_layers"], made["models"][0]["path"]) == (2, "/opt/m")
    node.floe("model", "export", "weights:1", tmp_path / "copy")
    assert (tmp_path / "copy/b.bin").read_bytes() == b"B" * 90_000
    told = node.floe(
        "image", "detach", source, target, "--directory", "/opt/m=weights:1", "--directory", "/srv=c"
    ).stdout
    assert "2 layers written anew" in told
    assert "c:latest at /srv" in told
    assert [one["path"] for one in node.json("image", "weights", target, "--min-size", "64KiB")] == []


@pytest.mark.parametrize(
    ("models", "code"),
    [
        (["nothing=/opt/model"], 1),
        (["iris=relative"], 2),
        (["iris=/a", "iris=/a"], 2),
        (["iris=/a", "iris=/a/b"], 2),
        (["Bad Name=/a"], 2),
        (["iris"], 2),
    ],
)
def test_an_attach_that_cannot_be_writes_nothing(node, tmp_path, models, code):
    build(tmp_path / "oci")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "weights").write_bytes(b"w")
    node.floe("model", "push", tmp_path / "m", "iris")
    before = node.refs()
    flags = [word for model in models for word in ("--model", model)]
    node.floe("image", "attach", f"oci:{tmp_path}/oci:v1", f"oci:{tmp_path}/out:v1", *flags, code=code)
    assert not (tmp_path / "out").exists()
    assert node.refs() == before


def test_only_the_layers_of_models_are_shown_as_such(node, tmp_path):
    image = build(tmp_path / "oci")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "weights").write_bytes(b"w")
    node.floe("model", "push", tmp_path / "m", "iris")
    target = f"oci:{tmp_path}/out:v1"
    node.floe("image", "attach", f"oci:{tmp_path}/oci:v1", target, "--model", "iris=/opt/model")
    node.floe("image", "index", target)
    (node.store / "refs" / "layers" / image.diff_ids[0].replace(":", "/")).unlink()
    node.environ["FLOE_INDEX"] = "none"
    layers = node.json("image", "show", target)["layers"]
    assert [(layer["indexed"], layer["model"]) for layer in layers] == [
        (False, None), (True, None), (False, "iris:latest")
    ]  # fmt: skip
    states = [line.split()[-1] for line in node.floe("image", "show", target).stdout.splitlines()[-3:]]
    assert states == ["indexed", "indexed", "model"]  # the first of them: "not indexed"


def test_a_layer_missing_from_the_store_is_shown_as_such(node, tmp_path):
    image = build(tmp_path / "oci")
    node.floe("image", "index", f"oci:{tmp_path}/oci:v1")
    (node.store / "refs" / "layers" / image.diff_ids[0].replace(":", "/")).unlink()
    node.environ["FLOE_INDEX"] = "none"
    shown = node.json("image", "show", image.manifest_digest)
    assert [layer["indexed"] for layer in shown["layers"]] == [False, True]
    assert "not indexed" in node.floe("image", "show", image.manifest_digest).stdout


@pytest.mark.parametrize("change", [b'"names":5', b'"chain_ids":[]'])
def test_a_damaged_record_is_listed_as_such_and_replaced(node, tmp_path, change):
    name = f"oci:{tmp_path}/oci:v1"
    image = build(tmp_path / "oci")
    node.floe("image", "index", name)
    record = node.store / "refs" / "images" / image.manifest_digest.replace(":", "/")
    value = json.loads(record.read_bytes()) | json.loads(b"{%s}" % change)
    record.unlink()
    record.write_text(json.dumps(value))
    argv = [sys.executable, "-m", "floe", "image", "ls", "--json"]
    found = subprocess.run(argv, env=node.environ, capture_output=True, check=False, text=True)
    assert found.returncode == 1
    assert [listed["digest"] for listed in json.loads(found.stdout)] == [image.manifest_digest]
    assert "refs/images" in found.stderr
    node.floe("image", "show", image.manifest_digest, code=1)
    node.floe("image", "index", name)
    assert len(node.json("image", "ls")[0]["names"]) == 1


def test_output_into_a_closed_pipe_is_quiet(node, tmp_path):
    build(tmp_path / "oci")
    node.floe("image", "index", f"oci:{tmp_path}/oci:v1")
    listing = subprocess.Popen(
        [sys.executable, "-m", "floe", "image", "ls"], env=node.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    listing.stdout.close()
    assert listing.stderr.read() == b""
    listing.stderr.close()
    assert listing.wait(20) == 1


def test_a_model_is_published_as_an_image(node, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_bytes(b"weights" * 1000)
    pushed = node.json("model", "push", tmp_path / "model", "org/model:1")
    target = f"oci:{tmp_path}/out:1"
    made = node.json("model", "publish", "org/model:1", target)
    assert (made["name"], made["manifest"], made["target"]) == ("org/model:1", pushed["manifest"], target)
    assert [one["platform"] for one in made["manifests"]] == ["linux/amd64", "linux/arm64"]
    told = node.floe("model", "publish", "org/model:1", target).stdout.splitlines()
    assert told[0] == f"{target} is {made['digest']}: org/model:1 at {pushed['manifest']}"
    assert told[1:] == [f"{one['platform']}: {one['digest']}" for one in made["manifests"]]
    before = node.refs()
    node.floe("model", "publish", "org/model:2", target, code=1)
    node.floe("model", "publish", "org/model:1", target, "--platform", "s390x", code=2)
    node.floe("model", "publish", "org/model:1", "127.0.0.1:1/m:1", "--plain-http", code=1)
    assert node.refs() == before
    # What keeps the model, for the day when the image is needed no more.
    (one, _) = made["manifests"]
    assert one["digest"] in node.floe("image", "rm", one["digest"]).stdout
