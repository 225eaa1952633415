"""Taking attached models off images again, attaching several at once, and what images say of the models they carry."""

import contextlib
import json
import subprocess

import pytest
from support import images
from support.registry import Front, running_registry

from floe.ingest.model import push_model
from floe.ingest.oci import source as sources
from floe.ingest.oci.attach import attach
from floe.ingest.oci.carried import _marker, carried_models
from floe.ingest.oci.detach import detach
from floe.ingest.oci.image import index_image
from floe.ingest.oci.layout import LayoutTarget
from floe.ingest.oci.opening import open_source
from floe.ingest.oci.references import LayoutRef
from floe.store.catalog import Catalog
from floe.store.errors import AccessDeniedError, BadInputError, DamagedError, FloeError, NotFoundError
from floe.store.ids import ModelRef
from floe.store.index import open_index
from floe.store.objects import open_store
from floe.store.stub import ANNOTATION, MARKER, MODELS_AHEAD, Marker
from floe.upkeep.gc import Collector

REFS = [ModelRef.parse(text) for text in ("one:1", "one:2", "two")]
PLACES = ["/models/a", "/models/b", "/old"]
MODELS = list(zip(REFS, PLACES, strict=True))
LABELS = {"maintainer": "somebody"}
HISTORY = [
    {"created": "2024-01-01T00:00:00Z", "created_by": "first"},
    {"created": "2024-01-01T00:00:00Z", "created_by": "ENV", "empty_layer": True},
    {"created": "2024-01-01T00:00:00Z", "created_by": "second"},
]


def catalog_in(folder, *refs):
    catalog = Catalog(open_store("memory://"), open_index(None))
    for number, ref in enumerate(refs):
        directory = folder / f"model-{number}"
        directory.mkdir(exist_ok=True)
        (directory / "w.bin").write_bytes(str(ref).encode() * 1000)
        push_model(catalog, directory, ref, spool_dir=folder)
    return catalog


@pytest.fixture
def catalog(tmp_path):
    with contextlib.closing(catalog_in(tmp_path, *REFS)) as made:
        yield made


@pytest.fixture
def built(tmp_path):
    config = {"config": {"Cmd": ["/bin/sh"], "Labels": LABELS}, "history": HISTORY}
    layers = [images.files({"old/own": "the image's own"}), images.files({"etc/x": "x"})]
    return images.build_oci(tmp_path / "image", layers, config=config)


@pytest.fixture
def attached(catalog, built, tmp_path):
    return attach(catalog, built.source, f"oci:{tmp_path}/out:three", MODELS)


def image_of(name):
    with contextlib.closing(open_source(name)) as source:
        return sources.resolve(source)


def carried(name):
    with contextlib.closing(open_source(name)) as source:
        return [(found.marker.model, found.marker.path) for found in carried_models(sources.resolve(source))]


def test_the_image_says_what_it_carries(attached):
    config = image_of(attached.target).config.value["config"]
    text = "one:1=/models/a,one:2=/models/b,two:latest=/old"
    assert config["Labels"] == {**LABELS, "io.floe.models": text, "io.floe.requires": "floe >= 0.1.0"}
    assert config["Cmd"] == ["/bin/sh"]


def test_detaching_one(catalog, attached, tmp_path):
    result = detach(catalog, attached.target, f"oci:{tmp_path}/out:two", [REFS[1]])
    assert [(m.model, m.path) for m in result.detached] == [("one:2", "/models/b")]
    assert carried(result.target) == [("one:1", "/models/a"), ("two:latest", "/old")]
    before, after = image_of(attached.target), image_of(result.target)
    assert after.manifest.digest == result.digest
    assert after.config.diff_ids == (*before.config.diff_ids[:3], before.config.diff_ids[4])
    trees = [before.manifest.layers[number].annotations[ANNOTATION] for number in (2, 4)]
    assert [dict(layer.annotations) for layer in after.manifest.layers] == [
        *[{MODELS_AHEAD: ",".join(trees)}] * 2,
        *({ANNOTATION: tree} for tree in trees),
    ]
    assert json.loads(after.manifest.raw)["annotations"]["io.floe.models"] == "one:1=/models/a,two:latest=/old"
    told = [entry["created_by"] for entry in after.config.value["history"]]
    assert [text for text in told if "attach" in text] == [
        "floe image attach --model one:1=/models/a",
        "floe image attach --model two:latest=/old",
    ]
    assert len(told) == 5
    record = catalog.attachment(result.digest)
    assert [model["name"] for model in record.models] == ["one:1", "two:latest"]
    assert detach(catalog, attached.target, f"oci:{tmp_path}/out:again", ["/models/b"]).digest == result.digest
    # The order in which they went does not matter, nor in how many steps.
    last = detach(catalog, result.target, f"oci:{tmp_path}/out:one", ["/models/a/"])
    assert detach(catalog, attached.target, f"oci:{tmp_path}/out:x", REFS[:2]).digest == last.digest


def test_what_stays_is_kept_from_collectors(catalog, attached, tmp_path):
    result = detach(catalog, attached.target, f"oci:{tmp_path}/out:two", [REFS[1]])
    for ref in REFS:
        catalog.remove_model(ref)
    catalog.remove_image(attached.digest)
    Collector(catalog, None, grace=0).remove()
    manifests = [model["manifest"] for model in catalog.attachment(result.digest).models]
    assert all(catalog.get_manifest(digest) for digest in manifests)
    assert len(list(catalog.store.list("manifests"))) == 2


def test_detaching_all_gives_the_image_back(catalog, built, attached, tmp_path):
    result = detach(catalog, attached.target, f"oci:{tmp_path}/out:bare", None)
    source, bare = image_of(built.source), image_of(result.target)
    assert bare.config.value == source.config.value
    assert json.loads(bare.manifest.raw)["layers"] == json.loads(source.manifest.raw)["layers"]
    assert "annotations" not in json.loads(bare.manifest.raw)
    assert catalog.attachment(result.digest) is None
    # What was written by Floe comes back with its very digest.
    again = attach(catalog, result.target, f"oci:{tmp_path}/out:again", MODELS)
    assert detach(catalog, again.target, f"oci:{tmp_path}/out:bare2", None).digest == result.digest
    bundle = tmp_path / "bundle"
    subprocess.run(["umoci", "unpack", "--image", f"{tmp_path}/out:bare", bundle], check=True, capture_output=True)
    assert (bundle / "rootfs/old/own").read_text() == "the image's own"
    assert not (bundle / "rootfs/models").exists()


def test_in_a_registry(catalog, built, tmp_path):
    with running_registry(tmp_path / "registry") as registry:
        source = registry.push(built.source, "app:1")
        first = attach(catalog, source, f"{registry.host}/app:2", MODELS, plain_http=True)
        result = detach(catalog, first.target, f"{registry.host}/other:1", [REFS[2]], plain_http=True)
        assert result.copied_bytes < 5_000
        with contextlib.closing(open_source(result.target, plain_http=True)) as found:
            image = sources.resolve(found)
            assert all(b"".join(found.open_blob(layer)) for layer in image.manifest.layers)
        assert image.config.value["config"]["Labels"]["io.floe.models"] == "one:1=/models/a,one:2=/models/b"


def test_a_registry_that_refuses_is_named_and_has_no_image(catalog, attached, tmp_path):
    with running_registry(tmp_path / "registry") as registry, Front(registry, status=403) as front:
        with pytest.raises(AccessDeniedError, match=f"{front.host}/app") as caught:
            detach(catalog, attached.target, f"{front.host}/app:1", None, plain_http=True)
        assert caught.value.hint
        with (
            contextlib.closing(open_source(f"{registry.host}/app:1", plain_http=True)) as source,
            pytest.raises(NotFoundError),
        ):
            sources.resolve(source)
    assert carried(attached.target) == [("one:1", "/models/a"), ("one:2", "/models/b"), ("two:latest", "/old")]


@pytest.mark.parametrize(
    ("models", "error", "message", "hint"),
    [
        ([ModelRef.parse("three")], NotFoundError, "does not carry three:latest", "it carries one:1 at /models/a, "),
        ([ModelRef.parse("two:1")], NotFoundError, "does not carry two:1", "two:latest at /old"),
        ([ModelRef.parse("one")], BadInputError, "carries one:latest more than once", "give a path"),
        (["/models"], NotFoundError, "does not carry /models", "/models/a"),
        (["/models/a", "/nowhere"], NotFoundError, "does not carry /nowhere", "/models/a"),
        (["relative"], BadInputError, "no place for a model", ""),
        ([], BadInputError, "no model", "--all"),
    ],
)
def test_what_is_not_attached_is_refused_before_anything_changes(
    catalog, attached, tmp_path, models, error, message, hint
):
    before = {key.key for key in catalog.store.list("")}
    with pytest.raises(error, match=message) as caught:
        detach(catalog, attached.target, f"oci:{tmp_path}/bare:1", models)
    assert hint in caught.value.hint
    assert not (tmp_path / "bare").exists()
    assert {key.key for key in catalog.store.list("")} == before


def test_an_image_without_models(catalog, built, tmp_path):
    with pytest.raises(NotFoundError, match="carries no models"):
        detach(catalog, built.source, f"oci:{tmp_path}/bare:1", None)
    with pytest.raises(NotFoundError, match="does not carry two:latest") as caught:
        detach(catalog, built.source, f"oci:{tmp_path}/bare:1", [REFS[2]])
    assert caught.value.hint == "it carries no models"


def test_a_name_alone_means_the_only_model_of_that_name(catalog, built, tmp_path):
    first = attach(catalog, built.source, f"oci:{tmp_path}/out:1", [MODELS[0], MODELS[2]])
    result = detach(catalog, first.target, f"oci:{tmp_path}/out:2", [ModelRef.parse("one")])
    assert [marker.model for marker in result.detached] == ["one:1"]
    digest = catalog.resolve_model(REFS[2])[0]
    by_digest = detach(catalog, first.target, f"oci:{tmp_path}/out:3", [ModelRef.parse(f"two@{digest}")])
    assert [marker.model for marker in by_digest.detached] == ["two:latest"]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["/m", "/m"], "models at /m and /m would hide"),
        (["/m", "/m/n"], "models at /m and /m/n would hide"),
        (["/m/n/o", "/x", "/m/n"], "models at /m/n/o and /m/n would hide"),
        (["/m//n", "/m/n/"], "models at /m/n and /m/n would hide"),
    ],
)
def test_overlapping_paths_are_refused_before_anything_changes(catalog, tmp_path, paths, message):
    before = {key.key for key in catalog.store.list("")}
    models = list(zip(REFS, paths, strict=False))
    with pytest.raises(BadInputError, match=message):  # before the image is even looked for
        attach(catalog, f"oci:{tmp_path}/nowhere", f"oci:{tmp_path}/out:1", models)
    assert {key.key for key in catalog.store.list("")} == before


@pytest.mark.parametrize("path", ["/models/a", "/models/a/b", "/models"])
def test_a_path_of_a_carried_model_is_refused_by_whatever_store(built, attached, tmp_path, path):
    with contextlib.closing(catalog_in(tmp_path, REFS[0])) as other:  # knows nothing of the first attach
        before = {key.key for key in other.store.list("")}
        with pytest.raises(BadInputError, match="would hide one another"):
            attach(other, attached.target, f"oci:{tmp_path}/more:1", [(REFS[0], path)])
        assert {key.key for key in other.store.list("")} == before
    assert not (tmp_path / "more").exists()


def test_models_that_this_store_does_not_have_are_told_of_and_not_recorded(attached, tmp_path):
    new = ModelRef.parse("three")
    with contextlib.closing(catalog_in(tmp_path, new)) as other:
        result = attach(other, attached.target, f"oci:{tmp_path}/more:1", [(new, "/three")])
        assert len(result.warnings) == 3
        assert (
            "one:1 at /models/a, which the image carries already, cannot be had from this store" in result.warnings[0]
        )
        assert [model["name"] for model in other.attachment(result.digest).models] == ["three:latest"]
        assert len(carried(result.target)) == 4
        Collector(other, None, grace=0).remove()  # a record of what is missing would stop it
        less = detach(other, result.target, f"oci:{tmp_path}/more:2", REFS[1:])
        assert (len(less.warnings), len(less.left)) == (1, 2)
        cured = detach(other, result.target, f"oci:{tmp_path}/more:3", REFS)
        assert (cured.warnings, [m.model for m in cured.left]) == ((), ["three:latest"])


def strip_annotations(folder, tag):
    """What a builder that does not know of them does, when it builds on top of an image."""
    index = json.loads((folder / "index.json").read_text())
    (entry,) = [e for e in index["manifests"] if e["annotations"]["org.opencontainers.image.ref.name"] == tag]
    manifest = json.loads((folder / "blobs/sha256" / entry["digest"].removeprefix("sha256:")).read_text())
    manifest.pop("annotations", None)
    for layer in manifest["layers"]:
        layer.pop("annotations", None)
    LayoutTarget(LayoutRef(str(folder), "child")).put_manifest(json.dumps(manifest).encode(), entry["mediaType"])
    return f"oci:{folder}:child"


def test_a_child_image_whose_builder_lost_the_annotations(catalog, attached, tmp_path):
    subprocess.run(
        ["umoci", "insert", "--image", f"{tmp_path}/out:three", "--tag", "child", "/etc/hostname", "/child"],
        check=True,
        capture_output=True,
    )
    child = strip_annotations(tmp_path / "out", "child")
    assert [name for name, _ in carried(child)] == ["one:1", "one:2", "two:latest"]
    with pytest.raises(BadInputError, match="would hide"):
        attach(catalog, child, f"oci:{tmp_path}/out:x", [(REFS[0], "/old/inside")])
    result = detach(catalog, child, f"oci:{tmp_path}/out:less", [REFS[1]])
    layers = image_of(result.target).manifest.layers
    assert [ANNOTATION in layer.annotations for layer in layers] == [False, False, True, True, False]
    assert MODELS_AHEAD in layers[4].annotations
    indexed = index_image(catalog, result.target, spool_dir=tmp_path)
    assert [layer.stub for layer in indexed.layers] == [False, False, True, True, False]


def test_a_layer_that_says_so_and_is_no_stub(catalog, tmp_path):
    layers = [images.files({"a": "a"}), images.files({"b": "b"})]
    made = images.build_oci(tmp_path / "odd", layers, annotations={1: {ANNOTATION: "0" * 64}})
    for work in (lambda t: detach(catalog, made.source, t, None), lambda t: attach(catalog, made.source, t, MODELS)):
        with pytest.raises(DamagedError, match=r"says that it stands for a model, but holds no \.floe/model\.json"):
            work(f"oci:{tmp_path}/out:1")
    assert not (tmp_path / "out").exists()


def test_a_history_that_does_not_tell_the_layers_apart_is_left_alone(catalog, tmp_path):
    config = {"history": [{"created_by": "squashed"}]}
    made = images.build_oci(tmp_path / "image", [images.files({"a": "a"}), images.files({"b": "b"})], config=config)
    first = attach(catalog, made.source, f"oci:{tmp_path}/out:1", MODELS[:1])
    result = detach(catalog, first.target, f"oci:{tmp_path}/out:2", None)
    history = image_of(result.target).config.value["history"]
    assert [entry["created_by"] for entry in history] == ["squashed", "floe image attach --model one:1=/models/a"]
    assert carried(result.target) == []


@pytest.mark.parametrize(("more", "is_stub"), [({}, True), ({"app/main.py": "x"}, False), ({"one/x": "x"}, False)])
def test_a_layer_with_files_of_its_own_is_no_stub(tmp_path, more, is_stub):
    """As where a builder squashed a stub and an application into one small layer: it must not go with the model."""
    marker = Marker("ab" * 32, "/one", "one:latest", "cd" * 32)
    content = {MARKER: marker.encode(), "one/README": "it belongs here", "one/.wh..wh..opq": "", **more}
    built = images.build_oci(tmp_path / "squashed", [images.files(content)])
    with contextlib.closing(open_source(built.source)) as source:
        assert _marker(sources.resolve(source), 0) == (marker if is_stub else None)


def test_copies_that_fail_leave_no_record_of_what_stays(catalog, attached, tmp_path, monkeypatch):
    records = []

    def push_blob(*_):
        records.append(len(list(catalog.store.list("refs/attachments"))))
        raise FloeError("disk gone")

    monkeypatch.setattr(LayoutTarget, "push_blob", push_blob)
    monkeypatch.setattr(LayoutTarget, "mount_blob", lambda *_: False)
    with pytest.raises(FloeError, match="disk gone"):
        detach(catalog, attached.target, f"oci:{tmp_path}/bare:1", [REFS[0]])
    assert (records, len(list(catalog.store.list("refs/attachments")))) == ([1], 1)
    assert not (tmp_path / "bare/index.json").exists()
