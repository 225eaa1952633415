"""Attaching models to images: what the target holds, and what is refused."""

import contextlib
import json
import subprocess
import tarfile

import pytest
from support import images
from support.registry import Front, running_registry
from support.somestore import memory_catalog

from floe.ingest.oci import source as sources
from floe.ingest.oci.attach import attach
from floe.ingest.oci.carried import carried_models
from floe.ingest.oci.image import index_image
from floe.ingest.oci.layout import LayoutTarget
from floe.ingest.oci.opening import open_source
from floe.store import layout
from floe.store.erofs_reader import read_image
from floe.store.errors import AccessDeniedError, BadInputError, DamagedError, FloeError, NotFoundError
from floe.store.ids import ModelRef
from floe.store.nodes import find
from floe.store.profiles import ProfileStore
from floe.store.stub import ANNOTATION, MARKER, MODELS_AHEAD, Marker, parse_models_ahead
from floe.store.treeobject import decode_tree

MODEL = ModelRef.parse("org/model:1")
OTHER = ModelRef.parse("other")
PLACE = "/home/bentoml/models/m"


def base(tar):
    images.add(tar, "home", mode=0o755, kind=tarfile.DIRTYPE)
    images.add(
        tar, "home/bentoml", mode=0o750, uid=1034, gid=1034, kind=tarfile.DIRTYPE, xattrs={"user.a": "b"}, mtime=1.5
    )
    images.add(tar, "home/link", kind=tarfile.SYMTYPE, link="bentoml")
    images.add(tar, "home/file", b"f")
    images.add(tar, "old", mode=0o755, kind=tarfile.DIRTYPE)
    images.add(tar, "old/own", b"the image's own")


@pytest.fixture
def catalog(tmp_path):
    with memory_catalog({MODEL: b"weights" * 1000, OTHER: b"others"}, tmp_path) as made:
        yield made


@pytest.fixture
def built(tmp_path):
    # The upper layer has no entry for the directories: theirs come from below.
    return images.build_oci(tmp_path / "image", [base, lambda tar: images.add(tar, "home/bentoml/x", b"x")])


def tree_of(catalog, stub):
    digest = stub.annotations[ANNOTATION]
    return read_image(decode_tree(catalog.store.get(layout.tree_key(digest)), digest))


@pytest.mark.parametrize("indexed", [True, False])
def test_the_placed_tree_and_the_record(catalog, built, tmp_path, indexed):
    if indexed:
        index_image(catalog, built.source, spool_dir=tmp_path)
    result = attach(catalog, built.source, f"oci:{tmp_path}/out:1", [(MODEL, PLACE), (OTHER, "/old")])
    tree = tree_of(catalog, result.stubs[0])
    home = find(tree, b"home/bentoml")
    assert (home.mode & 0o7777, home.uid, home.mtime, home.mtime_ns, home.xattrs) == (
        0o750,
        1034,
        1,
        500_000_000,
        {b"user.a": b"b"},
    )
    model = find(tree, PLACE.encode())
    assert model.xattrs == {b"trusted.overlay.opaque": b"y"}
    assert find(model, b"w.bin").size == 7000
    assert find(tree_of(catalog, result.stubs[1]), b"old/w.bin").size == 6
    seeds = [ProfileStore(catalog).of_tree(stub.annotations[ANNOTATION]) for stub in result.stubs]
    assert [(seed.source, seed.prefix) for seed in seeds] == [
        ("models/org/model", PLACE.strip("/").encode() + b"/"),
        ("models/other", b"old/"),
    ]
    record = catalog.attachment(result.manifest_digest)
    assert [(m["name"], m["path"]) for m in record.models] == [("org/model:1", PLACE), ("other:latest", "/old")]
    assert record.models[0]["tree"] == result.stubs[0].annotations[ANNOTATION]
    with contextlib.closing(open_source(result.target)) as source:
        image = sources.resolve(source)
    assert image.manifest.digest == result.digest
    assert image.config.diff_ids[:2] == built.diff_ids
    assert [layer.digest for layer in image.manifest.layers[:2]] == [layer["digest"] for layer in built.layers]
    assert image.config.value["created"] == "2024-01-01T00:00:00Z"
    again = attach(catalog, built.source, f"oci:{tmp_path}/out:2", [(MODEL, PLACE), (OTHER, "/old")])
    assert again.digest == result.digest


def test_without_floe_a_readme_is_found(catalog, built, tmp_path):
    result = attach(catalog, built.source, f"oci:{tmp_path}/out:1", [(MODEL, PLACE), (OTHER, "/old")])
    bundle = tmp_path / "bundle"
    subprocess.run(["umoci", "unpack", "--image", f"{tmp_path}/out:1", bundle], check=True, capture_output=True)
    root = bundle / "rootfs"
    assert "The model org/model:1 belongs here" in (root / PLACE[1:] / "README").read_text()
    assert [path.name for path in (root / "old").iterdir()] == ["README"]
    status = (root / "home/bentoml").stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_mtime) == (0o750, 1034, 1.5)
    marker = Marker.decode((root / MARKER).read_bytes(), "marker")
    assert (marker.path, marker.model, marker.tree) == ("/old", "other:latest", result.stubs[1].annotations[ANNOTATION])


def test_in_a_registry_layers_are_mounted_not_copied(catalog, built, tmp_path):
    with running_registry(tmp_path / "registry") as registry:
        source = registry.push(built.source, "app:1")
        before = len(registry.blob_requests())
        result = attach(catalog, source, f"{registry.host}/app-with-model:1", [(MODEL, PLACE)], plain_http=True)
        config = registry.blob_requests()[before:]
        assert built.config_digest in config
        assert result.copied_bytes < 10_000
        with contextlib.closing(open_source(result.target, plain_http=True)) as found:
            raw, _ = found.manifest()
            image = sources.resolve(found)
            assert b"".join(found.open_blob(image.manifest.layers[2]))
    value = json.loads(raw)
    tree = result.stubs[0].annotations[ANNOTATION]
    assert [layer["annotations"] for layer in value["layers"]] == [
        {MODELS_AHEAD: tree},
        {MODELS_AHEAD: tree},
        {ANNOTATION: tree},
    ]
    assert value["annotations"]["io.floe.models"] == f"org/model:1={PLACE}"


def test_a_docker_image_stays_one(catalog, built, tmp_path):
    with running_registry(tmp_path / "registry") as registry:
        source = f"{registry.host}/app:1"
        command = ["skopeo", "--insecure-policy", "copy", "--dest-tls-verify=false", "-q", "--format", "v2s2"]
        subprocess.run([*command, built.source, f"docker://{source}"], check=True)
        result = attach(catalog, source, f"{registry.host}/app:2", [(MODEL, PLACE)], plain_http=True)
        with contextlib.closing(open_source(result.target, plain_http=True)) as found:
            raw, kind = found.manifest()
    assert kind == "application/vnd.docker.distribution.manifest.v2+json"
    stub = json.loads(raw)["layers"][2]
    assert stub["mediaType"] == "application/vnd.docker.image.rootfs.diff.tar.gzip"
    assert ANNOTATION in stub["annotations"]


def test_an_attached_image_is_indexed_without_its_stubs(catalog, built, tmp_path):
    result = attach(catalog, built.source, f"oci:{tmp_path}/out:1", [(MODEL, PLACE)])
    indexed = index_image(catalog, result.target, spool_dir=tmp_path)
    assert [layer.stub for layer in indexed.layers] == [False, False, True]
    assert catalog.chain(indexed.record.chain_ids[2]) is None


def test_attaching_to_an_attached_image(catalog, built, tmp_path):
    first = attach(catalog, built.source, f"oci:{tmp_path}/out:1", [(MODEL, PLACE)])
    with pytest.raises(BadInputError, match="would hide one another"):
        attach(catalog, first.target, f"oci:{tmp_path}/out:2", [(OTHER, PLACE + "/inside")])
    second = attach(catalog, first.target, f"oci:{tmp_path}/out:2", [(OTHER, "/home/bentoml/models/o")])
    assert [m["name"] for m in catalog.attachment(second.digest).models] == ["org/model:1", "other:latest"]
    with contextlib.closing(open_source(second.target)) as source:
        layers = sources.resolve(source).manifest.layers
    one, two = (layer.annotations[ANNOTATION] for layer in layers[2:])
    assert [parse_models_ahead(layer.annotations.get(MODELS_AHEAD, "")) for layer in layers] == [[one, two]] * 2 + [
        [],
        [],
    ]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("relative", "no place for a model"),
        ("/", "no place for a model"),
        ("/a/../b", "no place for a model"),
        ("/proc/x", "cannot be placed"),
        ("/.floe", "cannot be placed"),
        ("/home/link/m", "/home/link is a symlink"),
        ("/home/link", "/home/link is a symlink"),
        ("/home/file/m", "/home/file is no directory"),
        ("/" + "n" * 256, "too long"),
    ],
)
def test_paths_that_are_refused(catalog, built, tmp_path, path, message):
    with pytest.raises(BadInputError, match=message):
        attach(catalog, built.source, f"oci:{tmp_path}/out:1", [(MODEL, path)])
    assert not (tmp_path / "out").exists()
    assert list(catalog.store.list("refs/attachments")) == []


def test_what_else_is_refused(catalog, built, tmp_path):
    target = f"oci:{tmp_path}/out:1"
    with pytest.raises(NotFoundError, match="nobody"):
        attach(catalog, built.source, target, [(ModelRef.parse("nobody"), "/m")])
    with pytest.raises(BadInputError, match="would hide"):
        attach(catalog, built.source, target, [(MODEL, "/m"), (OTHER, "/m/n")])
    with pytest.raises(BadInputError, match="no model"):
        attach(catalog, built.source, target, [])
    for bad in (f"oci-archive:{tmp_path}/x.tar", "host/name@sha256:" + "a" * 64, f"oci:{tmp_path}:x"):
        with pytest.raises(BadInputError):
            attach(catalog, built.source, bad, [(MODEL, "/m")])


def test_a_tag_that_moves_changes_no_target(catalog, built, tmp_path):
    first = catalog.resolve_model(MODEL)[0]
    done = attach(catalog, built.source, f"oci:{tmp_path}/out:1", [(MODEL, PLACE)])
    raw = (tmp_path / "out/blobs/sha256" / done.digest.removeprefix("sha256:")).read_bytes()
    catalog.set_model(MODEL, catalog.resolve_model(OTHER)[0])
    with contextlib.closing(open_source(done.target)) as source:
        image = sources.resolve(source)
        (found,) = carried_models(image)
    assert (image.manifest.raw, found.marker.manifest) == (raw, first)
    (model,) = catalog.attachment(done.digest).models
    assert (model["manifest"], model["tree"]) == (first, found.marker.tree)
    tree = read_image(decode_tree(catalog.store.get(layout.tree_key(found.marker.tree)), found.marker.tree))
    assert find(tree, f"{PLACE}/w.bin".encode()).size == len(b"weights") * 1000
    # Only another attach means what the tag means now.
    again = attach(catalog, built.source, f"oci:{tmp_path}/out:2", [(MODEL, PLACE)])
    assert again.stubs[0].annotations != done.stubs[0].annotations


def test_a_registry_that_refuses_is_named_and_has_no_image(catalog, built, tmp_path):
    with running_registry(tmp_path / "registry") as registry:
        with (
            Front(registry, status=403) as front,
            pytest.raises(AccessDeniedError, match=f"{front.host}/app") as caught,
        ):
            attach(catalog, built.source, f"{front.host}/app:1", [(MODEL, PLACE)], plain_http=True)
        assert caught.value.hint
        opened = contextlib.closing(open_source(f"{registry.host}/app:1", plain_http=True))
        with opened as source, pytest.raises(NotFoundError):
            sources.resolve(source)
        done = attach(catalog, built.source, f"{registry.host}/app:1", [(MODEL, PLACE)], plain_http=True)
        # What the first one left is what this one needs.
        assert [record.key for record in catalog.store.list("refs/attachments")] == [
            layout.attachment_ref_key(done.digest)
        ]


def spoil(built, number=0):
    """Flip a byte of a layer's blob, leaving its size as it was."""
    path = built.directory / "blobs/sha256" / built.layers[number]["digest"].removeprefix("sha256:")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def test_a_damaged_layer_of_a_layout_is_not_passed_on(catalog, built, tmp_path):
    index_image(catalog, built.source, spool_dir=tmp_path)  # so that nothing but the copying reads the layers
    damaged = spoil(built)
    with pytest.raises(DamagedError, match=f"{damaged.name} of {built.source} does not match") as caught:
        attach(catalog, built.source, f"oci:{tmp_path}/out:1", [(MODEL, PLACE)])
    assert caught.value.hint
    assert not (tmp_path / "out/index.json").exists()
    assert not (tmp_path / "out/blobs/sha256" / damaged.name).exists()


def test_a_damaged_blob_of_the_target_is_replaced(catalog, built, tmp_path):
    attach(catalog, built.source, f"oci:{tmp_path}/out:1", [(MODEL, PLACE)])
    path = tmp_path / "out/blobs/sha256" / built.layers[0]["digest"].removeprefix("sha256:")
    whole = path.read_bytes()
    path.unlink()  # a link to the source's
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    attach(catalog, built.source, f"oci:{tmp_path}/out:2", [(MODEL, PLACE)])
    assert path.read_bytes() == whole


def index_of(folder):
    return [
        ((entry.get("annotations") or {}).get("org.opencontainers.image.ref.name"), entry["digest"])
        for entry in json.loads((folder / "index.json").read_text())["manifests"]
    ]


def test_a_target_without_a_tag_replaces_only_its_like(catalog, built, tmp_path):
    out = tmp_path / "out"
    tagged = attach(catalog, built.source, f"oci:{out}:1", [(MODEL, PLACE)])
    first = attach(catalog, built.source, f"oci:{out}", [(OTHER, PLACE)])
    assert index_of(out) == [("1", tagged.digest), (None, first.digest)]
    second = attach(catalog, built.source, f"oci:{out}", [(OTHER, "/elsewhere")])
    assert index_of(out) == [("1", tagged.digest), (None, second.digest)]


def test_a_target_without_a_tag_among_several_is_refused_before_anything_is_written(catalog, built, tmp_path):
    out = tmp_path / "out"
    attach(catalog, built.source, f"oci:{out}:1", [(MODEL, PLACE)])
    index = json.loads((out / "index.json").read_text())
    del index["manifests"][0]["annotations"]
    index["manifests"] *= 2
    (out / "index.json").write_text(json.dumps(index))
    before = sorted(path.name for path in out.rglob("*"))
    with pytest.raises(BadInputError, match="2 images without a tag") as caught:
        attach(catalog, built.source, f"oci:{out}", [(OTHER, PLACE)])
    assert "oci:DIR:TAG" in caught.value.hint
    assert sorted(path.name for path in out.rglob("*")) == before
    assert json.loads((out / "index.json").read_text()) == index


def test_copies_that_fail_leave_no_record(catalog, built, tmp_path, monkeypatch):
    """It would keep the models from garbage collection for ever, under a digest that nobody was told."""
    records = []

    def push_blob(*_):
        records.append(len(list(catalog.store.list("refs/attachments"))))
        raise FloeError("disk gone")

    monkeypatch.setattr(LayoutTarget, "push_blob", push_blob)
    monkeypatch.setattr(LayoutTarget, "mount_blob", lambda *_: False)
    with pytest.raises(FloeError, match="disk gone"):
        attach(catalog, built.source, f"oci:{tmp_path}/out:1", [(MODEL, PLACE)])
    assert (records, len(list(catalog.store.list("refs/attachments")))) == ([0], 0)


def test_a_target_that_fails_has_its_record_first(catalog, built, tmp_path, monkeypatch):
    """The record keeps the models from garbage collection: it may be left over, never missing."""

    def failing(*_):
        raise FloeError("disk gone")

    monkeypatch.setattr(LayoutTarget, "put_manifest", failing)
    with pytest.raises(FloeError, match="disk gone"):
        attach(catalog, built.source, f"oci:{tmp_path}/out:1", [(MODEL, PLACE)])
    assert len(list(catalog.store.list("refs/attachments"))) == 1
    assert not (tmp_path / "out/index.json").exists()
