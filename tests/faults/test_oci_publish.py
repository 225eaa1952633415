"""A model as an image of its own: what the image holds, what is refused, and what a failure leaves."""

import contextlib
import json
import subprocess
import tarfile

import pytest
from support import images
from support.registry import Front, running_registry
from support.somestore import memory_catalog

from floe.ingest.model import push_model
from floe.ingest.oci import source as sources
from floe.ingest.oci.attach import attach
from floe.ingest.oci.carried import carried_models
from floe.ingest.oci.detach import detach
from floe.ingest.oci.image import index_image
from floe.ingest.oci.layout import LayoutTarget
from floe.ingest.oci.media import OCI_INDEX, Descriptor, sha256_digest
from floe.ingest.oci.modelimage import publish_model
from floe.ingest.oci.opening import open_source
from floe.ingest.oci.platforms import Platform
from floe.ingest.oci.references import LayoutRef
from floe.store.errors import AccessDeniedError, BadInputError, FloeError, NotFoundError
from floe.store.ids import ModelRef
from floe.store.stub import ANNOTATION
from floe.upkeep.gc import Collector

MODEL, OTHER = ModelRef.parse("org/model:1"), ModelRef.parse("other")


@pytest.fixture
def catalog(tmp_path):
    with memory_catalog({MODEL: b"weights" * 1000, OTHER: b"others"}, tmp_path) as made:
        yield made


def read(target, platform="linux/amd64"):
    """The image as it was written: its manifest, its config, its models."""
    with contextlib.closing(open_source(target)) as source:
        image = sources.resolve(source, Platform.parse(platform))
        return json.loads(image.manifest.raw), image.config.value, carried_models(image)


def test_the_image_is_pinned_to_the_model_s_own_tree(catalog, tmp_path):
    result = publish_model(catalog, MODEL, f"oci:{tmp_path}/out:1")
    digest, stored = catalog.resolve_model(MODEL)
    assert (result.model, [platform for platform, _ in result.manifests]) == (digest, ["linux/amd64", "linux/arm64"])
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert [entry["digest"] for entry in index["manifests"]] == [result.digest]
    for platform, manifest_digest in result.manifests:
        manifest, config, (model,) = read(result.target, platform)
        assert [layer["annotations"] for layer in manifest["layers"]] == [{ANNOTATION: stored.tree.digest}]
        labels = {"io.floe.models": "org/model:1=/", "io.floe.requires": "floe >= 0.1.0"}
        assert config["config"] == {"Labels": labels}
        assert f"{config['os']}/{config['architecture']}" == platform
        assert (model.marker.tree, model.marker.manifest, model.marker.path) == (stored.tree.digest, digest, "/")
        record = catalog.attachment(manifest_digest)
        assert [(m["name"], m["manifest"], m["path"]) for m in record.models] == [("org/model:1", digest, "/")]


def test_the_same_again_is_the_same_and_a_tag_that_moves_changes_nothing(catalog, tmp_path):
    first = publish_model(catalog, MODEL, f"oci:{tmp_path}/out:1")
    again = publish_model(catalog, MODEL, f"oci:{tmp_path}/out:1")
    assert (again.digest, again.manifests, again.copied_bytes) == (first.digest, first.manifests, 0)
    assert publish_model(catalog, MODEL, f"oci:{tmp_path}/elsewhere").digest == first.digest
    (tmp_path / "org-model/w.bin").write_bytes(b"newer")
    push_model(catalog, tmp_path / "org-model", MODEL, spool_dir=tmp_path)
    assert read(f"oci:{tmp_path}/out:1")[2][0].marker.manifest == first.model
    assert publish_model(catalog, MODEL, f"oci:{tmp_path}/out:2").digest != first.digest


def test_the_model_stays_while_its_image_is_known(catalog, tmp_path):
    result = publish_model(catalog, MODEL, f"oci:{tmp_path}/out:1", platforms=["linux/arm64"])
    catalog.remove_model(MODEL)
    Collector(catalog, None, grace=0).remove()
    assert catalog.get_manifest(result.model)
    ((_, digest),) = result.manifests
    catalog.remove_image(digest)
    Collector(catalog, None, grace=0).remove()
    with pytest.raises(NotFoundError):
        catalog.get_manifest(result.model)


def test_without_floe_a_readme_is_found(catalog, tmp_path):
    publish_model(catalog, MODEL, f"oci:{tmp_path}/out:1", platforms=["linux/amd64"])
    (layer,) = read(f"oci:{tmp_path}/out:1")[0]["layers"]
    with tarfile.open(tmp_path / "out/blobs/sha256" / layer["digest"].removeprefix("sha256:")) as tar:
        assert tar.getnames() == ["README", ".floe", ".floe/model.json"]
    unpack = ["umoci", "unpack", "--image", f"{tmp_path}/out:1", tmp_path / "bundle"]
    subprocess.run(unpack, check=True, capture_output=True)
    root = tmp_path / "bundle/rootfs"
    assert sorted(path.name for path in root.iterdir()) == [".floe", "README"]
    text = (root / "README").read_text()
    assert "This image is the model org/model:1" in text
    assert "floe model export org/model:1 DIR" in text


def test_in_a_registry_both_manifests_are_there(catalog, tmp_path):
    with running_registry(tmp_path / "registry") as registry:
        result = publish_model(catalog, MODEL, f"{registry.host}/models/m:1", plain_http=True)
        for platform, digest in result.manifests:
            for name in (result.target, f"{registry.host}/models/m@{digest}"):
                with contextlib.closing(open_source(name, plain_http=True)) as source:
                    image = sources.resolve(source, Platform.parse(platform))
                    assert image.manifest.digest == digest
                    assert len(carried_models(image)) == 1
        again = publish_model(catalog, MODEL, f"{registry.host}/models/m:1", plain_http=True)
    assert (again.digest, again.copied_bytes) == (result.digest, 0)


@pytest.mark.parametrize(
    ("ref", "target", "platforms", "error", "text"),
    [
        ("nobody", "oci:{}/out:1", ["linux/amd64"], NotFoundError, "nobody"),
        ("org/model:2", "oci:{}/out:1", ["linux/amd64"], NotFoundError, "org/model:2"),
        ("org/model:1", "oci-archive:{}/out.tar:1", ["linux/amd64"], BadInputError, "archives are only read"),
        ("org/model:1", "docker-archive:{}/out.tar", ["linux/amd64"], BadInputError, "archives are only read"),
        ("org/model:1", "host/name@sha256:" + "a" * 64, ["linux/amd64"], BadInputError, "a digest is no name"),
        ("org/model:1", "oci:{}/out@sha256:" + "a" * 64, ["linux/amd64"], BadInputError, "a digest is no name"),
        ("org/model:1", "Host/UPPER:1", ["linux/amd64"], BadInputError, "is not valid"),
        ("org/model:1", "oci:{}/out:1", ["amd64"], BadInputError, "platform 'amd64'"),
        ("org/model:1", "oci:{}/out:1", [], BadInputError, "no platform"),
    ],
)
def test_what_is_refused_changes_nothing(catalog, tmp_path, ref, target, platforms, error, text):
    before, files = sorted(map(str, catalog.store.list(""))), sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=text) as caught:
        publish_model(catalog, ModelRef.parse(ref), target.format(tmp_path), platforms=platforms)
    assert caught.value.hint
    assert sorted(map(str, catalog.store.list(""))) == before
    assert sorted(tmp_path.rglob("*")) == files


def test_a_registry_that_refuses_leaves_the_store_as_it_was(catalog, tmp_path):
    with running_registry(tmp_path / "registry") as registry, Front(registry, status=403) as front:
        with pytest.raises(AccessDeniedError, match="/models/m:1"):
            publish_model(catalog, MODEL, f"{front.host}/models/m:1", plain_http=True)
        assert list(catalog.store.list("refs/attachments")) == []


def test_a_manifest_that_fails_has_its_record_first(catalog, tmp_path, monkeypatch):
    def failing(*_, **__):
        raise FloeError("disk gone")

    monkeypatch.setattr(LayoutTarget, "put_manifest", failing)
    with pytest.raises(FloeError, match="disk gone"):
        publish_model(catalog, MODEL, f"oci:{tmp_path}/out:1")
    assert len(list(catalog.store.list("refs/attachments"))) == 2
    assert not (tmp_path / "out/index.json").exists()


def test_the_tag_moves_last_and_at_once(catalog, tmp_path, monkeypatch):
    before = publish_model(catalog, OTHER, f"oci:{tmp_path}/out:1")
    put = LayoutTarget.put_manifest

    def failing(self, raw, media_type, **settings):
        if media_type == OCI_INDEX:
            raise FloeError("disk gone")
        put(self, raw, media_type, **settings)

    monkeypatch.setattr(LayoutTarget, "put_manifest", failing)
    with pytest.raises(FloeError, match="disk gone"):
        publish_model(catalog, MODEL, f"oci:{tmp_path}/out:1")
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert [entry["digest"] for entry in index["manifests"]] == [before.digest]


def test_nothing_is_attached_to_it_and_nothing_taken_out_of_it(catalog, tmp_path):
    target = publish_model(catalog, MODEL, f"oci:{tmp_path}/out:1").target
    options = {"platform": "linux/amd64"}
    with pytest.raises(BadInputError, match="models at / and /m would hide one another"):
        attach(catalog, target, f"oci:{tmp_path}/made:1", [(OTHER, "/m")], **options)
    for models in (None, [MODEL]):
        with pytest.raises(BadInputError, match="nothing is left"):
            detach(catalog, target, f"oci:{tmp_path}/made:1", models, **options)
    assert not (tmp_path / "made").exists()
    indexed = index_image(catalog, target, spool_dir=tmp_path, platform="linux/amd64")
    assert [layer.stub for layer in indexed.layers] == [True]


@pytest.mark.parametrize("kept", ["config", "history"])
def test_a_child_image_whose_builder_lost_the_annotations(catalog, tmp_path, kept):
    """What a builder makes of `FROM` such an image: labels and history tell of the model, each by itself."""
    publish_model(catalog, MODEL, f"oci:{tmp_path}/out:1", platforms=["linux/amd64"])
    manifest, config, _ = read(f"oci:{tmp_path}/out:1")
    raw = json.dumps({key: value for key, value in config.items() if key not in ("config", "history") or key == kept})
    described = Descriptor(manifest["config"]["mediaType"], sha256_digest(raw.encode()), len(raw))
    (layer,) = manifest["layers"]
    bare = {key: value for key, value in layer.items() if key != "annotations"}
    target = LayoutTarget(LayoutRef(str(tmp_path / "out"), "child"))
    target.push_blob(described, lambda: [raw.encode()])
    child = {"schemaVersion": 2, "config": described.to_json(), "layers": [bare]}
    target.put_manifest(json.dumps(child).encode(), manifest["mediaType"])
    (found,) = read(f"oci:{tmp_path}/out:child")[2]
    assert (found.marker.model, found.marker.path) == ("org/model:1", "/")


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_archives_are_read_and_never_written(catalog, tmp_path, kind):
    built = images.build_oci(tmp_path / "image", [images.files({"etc/one": "one"})])
    archive = f"oci-archive:{images.oci_archive(built.directory, tmp_path / 'image.tar')}"
    made = attach(catalog, archive, f"oci:{tmp_path}/out:1", [(MODEL, "/m")])
    carrying = f"oci-archive:{images.oci_archive(tmp_path / 'out', tmp_path / 'out.tar')}"
    assert [marker.path for marker in detach(catalog, carrying, f"oci:{tmp_path}/bare:1", None).detached] == ["/m"]
    target, before = f"{kind}:{tmp_path}/new.tar", sorted(tmp_path.glob("*"))
    for write in (
        lambda: attach(catalog, built.source, target, [(MODEL, "/m")]),
        lambda: detach(catalog, made.target, target, None),
        lambda: publish_model(catalog, MODEL, target),
    ):
        with pytest.raises(BadInputError, match="archives are only read") as caught:
            write()
        assert "skopeo copy" in caught.value.hint
    assert sorted(tmp_path.glob("*")) == before
