"""`floe bento` as a user runs it: BentoML's store in, models and an image out."""

import json
import shutil
import stat
import subprocess

import pytest
from support import images
from support.bento import DATA, SPECS, BentoStore, hub_entry, hub_model, with_models
from support.containerd import HOST_PATH
from support.floe_node import Node
from support.registry import running_registry

ROOT = "/home/bentoml/bento"
DOCKERFILE = """\
FROM {base} AS base-container
ENV LANG=C.UTF-8
ARG BENTO_PATH=/home/bentoml/bento
ENV BENTO_PATH=$BENTO_PATH
ENV BENTOML_HOME=/home/bentoml/
RUN mkdir -p $BENTO_PATH
WORKDIR $BENTO_PATH
COPY --chown=1034:1034 . ./
RUN --mount=type=secret,id=TOKEN test "$(cat /run/secrets/TOKEN)" = hush && echo so >/built
RUN chmod +x /home/bentoml/bento/env/docker/entrypoint.sh
USER 1034
ENTRYPOINT [ "/home/bentoml/bento/env/docker/entrypoint.sh" ]
"""
# A stand-in for builders: keeps what it was asked, and answers with an image that is there.
STAND_IN = """\
#!/bin/sh
echo "$@" >>{log}
echo "building" ; echo "as ever" >&2
case "$(basename $0) $1" in
"buildah build") for last; do :; done; cp -r "$last" {context};;
"buildah push") mkdir -p "${{3#oci:}}"; rmdir "${{3#oci:}}"; cp -r {image} "$(echo "$3" | sed 's/^oci:\\(.*\\):built$/\\1/')";;
"buildctl build") for last; do :; done; tar -C {image} -cf "${{last#type=oci,dest=}}" .;;
esac
exit {code}
"""


@pytest.fixture
def node(tmp_path):
    node = Node(tmp_path)
    store = BentoStore(tmp_path / "bentoml")
    node.bentoml = store
    node.environ |= {"BENTOML_HOME": str(store.home), "HF_HOME": str(tmp_path / "hf"), "TOKEN": "hush"}
    yield node
    node.clean_up()


@pytest.fixture
def base(tmp_path):
    return images.build_oci(tmp_path / "base", [images.busybox()], tag="built")


def test_push(node, tmp_path):
    node.bentoml.bento(2, yaml=with_models(2, hub_entry("Acme/Tiny")))
    hub_model(tmp_path / "hf/hub", "Acme/Tiny", {"w": b"w" * 100})
    pushed = node.json("bento", "push", "front")
    assert pushed["bento"] == "front:v1"
    names = [model["name"] for model in pushed["models"]]
    assert names == ["acme/tiny:0123456789abcdef0123456789abcdef01234567", "own:b2", "shared:1"]
    assert all(model["new_bytes"] > 0 and not model["reused"] for model in pushed["models"])
    listed = {f"{model['name']}:{model['tag']}" for model in node.json("model", "ls")}
    assert listed == set(names)
    told = node.floe("bento", "push", "front:v1").stdout
    assert "shared:1: " in told
    assert told.count("in the store already") == 3
    exported = tmp_path / "copy"
    node.floe("model", "export", "shared:1", exported)
    for file in (node.bentoml.home / "models/shared/1").rglob("*.*"):
        assert (exported / file.relative_to(node.bentoml.home / "models/shared/1")).read_bytes() == file.read_bytes()


def test_image_upon_a_base(node, tmp_path, base):
    node.bentoml.bento(2)
    target = f"oci:{tmp_path}/out:1"
    made = node.json("bento", "image", "front", target, "--base", base.source)
    assert [model["path"] for model in made["models"]] == [f"{ROOT}/models/own/b2", f"{ROOT}/models/shared/1"]
    assert made["warnings"] == []
    shown = node.json("image", "index", target)
    assert shown["digest"] == made["digest"]
    assert [layer["model"] for layer in shown["layers"]] == [None, None, "own:b2", "shared:1"]
    told = node.floe("bento", "image", "front", f"oci:{tmp_path}/out:2", "--base", base.source).stdout
    assert f"oci:{tmp_path}/out:2 is {made['digest']}" in told
    assert f"shared:1 at {ROOT}/models/shared/1" in told
    assert list((node.cache / "spool").iterdir()) == []
    bare = node.json("image", "detach", target, f"oci:{tmp_path}/out:bare", "--all")
    assert len(bare["detached"]) == 2


def test_a_bento_without_models(node, tmp_path, base):
    node.bentoml.bento(1, yaml="name: plain\nversion: v1\n", tag="plain:v1", models=False)
    assert "names no models" in node.floe("bento", "push", "plain", code=2).stderr
    made = node.json("bento", "image", "plain", f"oci:{tmp_path}/out:1", "--base", base.source)
    assert (made["models"], made["warnings"]) == ([], ["Bento plain:v1 names no models: the image carries none"])
    assert not (node.store / "refs/attachments").exists()


def without_builders(node, tmp_path):
    """A PATH on which this machine's builders are not found, but what the stand-ins need is."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "cat", "cp", "mkdir", "rmdir", "tar", "basename", "sed"):
        (tools / name).symlink_to(shutil.which(name))
    node.environ["PATH"] = str(tools)
    return tools


def test_without_a_builder_nothing_is_stored(node, tmp_path):
    node.bentoml.bento(2)
    without_builders(node, tmp_path)
    for flags in ((), ("--builder", "buildctl")):
        said = node.floe("bento", "image", "front", f"oci:{tmp_path}/out:1", *flags, code=1).stderr
        assert "buildctl is" in said
        assert "--base IMAGE" in said
    assert not node.store.exists()


@pytest.mark.parametrize("name", ["buildah", "buildctl"])
@pytest.mark.parametrize("code", [0, 7])
def test_what_a_builder_is_asked(node, tmp_path, base, name, code):
    envs = "envs:\n- {name: GREETING, value: hello, stage: all}\n- {name: TOKEN, stage: build}\n"
    text = (DATA / SPECS[2]).read_text()
    bento = node.bentoml.bento(2, yaml=text.replace("envs:\n- name: GREETING\n  value: hello\n  stage: all\n", envs))
    (bento / "models").mkdir()  # as an export's
    (bento / "models/weights").write_text("w")
    log, context = tmp_path / "log", tmp_path / "context"
    program = without_builders(node, tmp_path) / name
    program.write_text(STAND_IN.format(log=log, context=context, image=base.directory, code=code))
    program.chmod(0o755)
    argv = ("bento", "image", "front", f"oci:{tmp_path}/out:1", "--platform", f"linux/{images.ARCHITECTURE}")
    if code:
        said = node.floe(*argv, code=1).stderr
        assert f"`{name} build` failed with status 7" in said
        assert "as ever" in said
        assert not node.store.exists()  # it is built before models are stored
        return
    found = node.floe(*argv, "--json")
    assert "building" in found.stderr
    made = json.loads(found.stdout)
    assert [model["name"] for model in made["models"]] == ["own:b2", "shared:1"]
    asked = log.read_text()
    assert f"linux/{images.ARCHITECTURE}" in asked
    assert "--secret id=TOKEN,type=file,src=" in asked
    assert "env/docker" in asked
    if name == "buildah":
        assert "rmi localhost/floe-bento:" in asked
        assert (context / "bento.yaml").exists()
        assert not (context / "models").exists()


def test_what_a_build_lacks_is_said_before_anything_is_stored(node, tmp_path):
    text = (DATA / SPECS[2]).read_text()
    envs = "envs:\n- {name: TOKEN, stage: build}\n"
    bento = node.bentoml.bento(2, yaml=text.replace("envs:\n- name: GREETING\n  value: hello\n  stage: all\n", envs))
    program = without_builders(node, tmp_path) / "buildah"
    program.write_text("#!/bin/sh\nexit 7\n")
    program.chmod(0o755)
    node.environ.pop("TOKEN")
    argv = ("bento", "image", "front", f"oci:{tmp_path}/out:1")
    assert "needs the variable TOKEN" in node.floe(*argv, code=2).stderr
    (bento / "env/docker/Dockerfile").unlink()
    assert "has no env/docker/Dockerfile" in node.floe(*argv, code=1).stderr
    assert not node.store.exists()


@pytest.mark.slow
def test_a_dockerfile_built_by_buildah(node, tmp_path, base):
    real = shutil.which("buildah", path=HOST_PATH)
    if real is None:
        pytest.skip("no buildah here: run install/setup.sh test")
    with running_registry(tmp_path / "registry") as registry:
        history = {"history": [{"created_by": "busybox"}]}
        source = images.build_oci(
            tmp_path / "from",
            [images.busybox(applets=("cat", "chmod", "mkdir", "sh", "test", "[", "echo"))],
            config=history,
        )
        reference = registry.push(source.source, "python:3")
        envs = "envs:\n- {name: TOKEN, stage: build}\n"
        text = (DATA / SPECS[2]).read_text()
        bento = node.bentoml.bento(
            2, yaml=text.replace("envs:\n- name: GREETING\n  value: hello\n  stage: all\n", envs)
        )
        (bento / "env/docker/Dockerfile").write_text(DOCKERFILE.format(base=reference))
        configuration = tmp_path / "registries.conf"
        configuration.write_text(f'[[registry]]\nlocation = "{registry.host}"\ninsecure = true\n')
        tools = tmp_path / "tools"
        tools.mkdir()
        (tools / "buildah").write_text(
            f'#!/bin/sh\nexec {real} --root {tmp_path}/root --runroot {tmp_path}/run --storage-driver vfs "$@"\n'
        )
        (tools / "buildah").chmod(0o755)
        node.environ |= {"BUILDAH_ISOLATION": "chroot", "CONTAINERS_REGISTRIES_CONF": str(configuration)}
        node.environ["PATH"] = f"{tools}:{HOST_PATH}"
        made = node.json("bento", "image", "front", f"oci:{tmp_path}/out:1", "--builder", "buildah")
    assert [model["path"] for model in made["models"]] == [f"{ROOT}/models/own/b2", f"{ROOT}/models/shared/1"]
    bundle = tmp_path / "bundle"
    subprocess.run(["umoci", "unpack", "--image", f"{tmp_path}/out:1", bundle], check=True, capture_output=True)
    root = bundle / "rootfs"
    assert (root / "built").read_text() == "so\n"
    found = (root / ROOT[1:] / "src/service.py").stat()
    assert (found.st_uid, (root / ROOT[1:] / "models/shared/latest").read_text()) == (1034, "1")
    entry = root / ROOT[1:] / "env/docker/entrypoint.sh"
    assert stat.S_IMODE(entry.stat().st_mode) & 0o111 == 0o111
    assert "hush" not in (tmp_path / "out/index.json").read_text()
