"""Files of `docker save` that hold several images, none, or not what they say."""

import contextlib
import io
import json
import tarfile

import pytest
from support import dockersave, images

from floe.ingest.oci.opening import open_source, open_target
from floe.ingest.oci.source import resolve
from floe.store.errors import BadInputError, DamagedError, NotFoundError, UnsupportedError


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return images.build_oci(tmp_path_factory.mktemp("one"), [images.files({"a": b"a"})], compression="")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return images.build_oci(tmp_path_factory.mktemp("two"), [images.files({"b": b"b"})], compression="zstd")


def image_of(name):
    with contextlib.closing(open_source(name)) as source:
        return resolve(source)


def rewritten(path, change):
    """The tar again, with `change(members)` applied to its {name: bytes}."""
    with tarfile.open(path) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar if m.isreg()}
    change(members)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_one_of_several_is_chosen(built, other, tmp_path):
    path = dockersave.legacy(tmp_path / "a.tar", [(built, ["app:1", "ghcr.io/me/app:x"]), (other, None)])
    with pytest.raises(BadInputError, match=r"holds 2 images: app:1, ghcr\.io/me/app:x, @1$") as caught:
        image_of(f"docker-archive:{path}")
    assert "docker-archive:FILE:NAME:TAG" in caught.value.hint
    for name in ("app:1", "docker.io/library/app:1", "ghcr.io/me/app:x", "@0"):
        assert image_of(f"docker-archive:{path}:{name}").config.diff_ids == built.diff_ids
    assert image_of(f"docker-archive:{path}:@1").config.diff_ids == other.diff_ids
    with pytest.raises(NotFoundError, match=r"no image docker\.io/library/app:2") as caught:
        image_of(f"docker-archive:{path}:app:2")
    assert "app:1" in caught.value.hint
    with pytest.raises(NotFoundError, match="no image number 2"):
        image_of(f"docker-archive:{path}:@2")


def test_compressed_layers_are_known_by_their_content(other, tmp_path):
    path = dockersave.legacy(tmp_path / "a.tar", [(other, ["app:1"])])
    (layer,) = image_of(f"docker-archive:{path}").manifest.layers
    assert layer.media_type.endswith(".tar.zstd")
    assert layer.digest == other.layers[0]["digest"]


def test_a_hard_link_to_a_layer(built, tmp_path):
    path = dockersave.legacy(tmp_path / "a.tar", [(built, ["app:1"])])
    with tarfile.open(path) as tar:
        (layer,) = json.load(tar.extractfile("manifest.json"))[0]["Layers"]
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("./again.tar")
        link.type, link.linkname = tarfile.LNKTYPE, layer
        tar.addfile(link)
        listed = [{"Config": built.config_digest.removeprefix("sha256:") + ".json", "Layers": ["again.tar"]}]
        info = tarfile.TarInfo("manifest.json")  # of two members of one name the later counts
        data = json.dumps(listed).encode()
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    assert image_of(f"docker-archive:{path}").manifest.layers[0].digest == built.diff_ids[0]


def test_an_index_that_names_what_is_not_there_does_no_harm(built, tmp_path):
    """A platform's image out of an index for many: the index is saved whole, the other platforms' blobs are not."""
    path = dockersave.current(tmp_path / "a.tar", built, ["app:1"])

    def nest(members):
        absent = {"mediaType": images.MANIFEST, "digest": "sha256:" + "0" * 64, "size": 7}
        inner = json.loads(members["index.json"])
        inner["manifests"].insert(0, absent)
        raw = json.dumps(inner).encode()
        digest = images._digest(raw)
        members["blobs/sha256/" + digest.removeprefix("sha256:")] = raw
        outer = {"mediaType": images.INDEX, "digest": digest, "size": len(raw)}
        members["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [absent, outer]}).encode()

    assert image_of(f"docker-archive:{rewritten(path, nest)}").manifest.digest == built.manifest_digest


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda m: m.pop("manifest.json"), UnsupportedError, "it is no file of `docker save`"),
        (lambda m: m.update({"manifest.json": b"{"}), DamagedError, r"manifest\.json of .* is not JSON"),
        (lambda m: m.update({"manifest.json": b"[]"}), DamagedError, "lists no images"),
        (lambda m: m.update({"manifest.json": b"[3]"}), DamagedError, "malformed entry"),
        (lambda m: m.update({"manifest.json": b'[{"Config": "x", "Layers": [3]}]'}), DamagedError, "malformed entry"),
        (lambda m: m.update({"manifest.json": b'[{"Config": "x"}]'}), DamagedError, "does not hold x"),
        (
            lambda m: m.update({"manifest.json": m["manifest.json"].replace(b'/layer.tar"', b'/none.tar"')}),
            DamagedError,
            r"does not hold .*/none\.tar",
        ),
        (
            lambda m: m.update({"manifest.json": m["manifest.json"].replace(b'"Layers": [', b'"Layers": ["x", ')}),
            DamagedError,
            "has 2 layers, but its config names 1 diff ids",
        ),
    ],
)
def test_files_that_are_not_what_they_say(built, tmp_path, change, error, said):
    path = rewritten(dockersave.legacy(tmp_path / "a.tar", [(built, ["app:1"])]), change)
    with pytest.raises(error, match=said):
        image_of(f"docker-archive:{path}")


def test_a_layer_that_is_not_what_the_config_says(built, tmp_path):
    def spoil(members):
        name = next(name for name in members if name.endswith("layer.tar"))
        members[name] = b"\0" + members[name][1:]

    path = rewritten(dockersave.legacy(tmp_path / "a.tar", [(built, ["app:1"])]), spoil)
    with (
        contextlib.closing(open_source(f"docker-archive:{path}")) as source,
        pytest.raises(DamagedError, match="digest"),
    ):
        b"".join(source.open_blob(resolve(source).manifest.layers[0]))


def test_the_wrong_word_for_an_archive(built, tmp_path):
    legacy = dockersave.legacy(tmp_path / "a.tar", [(built, ["app:1"])])
    with pytest.raises(UnsupportedError) as caught:
        image_of(f"oci-archive:{legacy}")
    assert f"docker-archive:{legacy}" in caught.value.hint
    layout = images.oci_archive(built.directory, tmp_path / "b.tar")
    with pytest.raises(UnsupportedError) as caught:
        image_of(f"docker-archive:{layout}")
    assert f"oci-archive:{layout}" in caught.value.hint
    with pytest.raises(BadInputError) as caught:
        image_of(f"docker-archive:{built.directory}")
    assert "oci:" in caught.value.hint
    with pytest.raises(NotFoundError, match="there is no file"):
        image_of(f"docker-archive:{tmp_path}/none.tar")
    with pytest.raises(BadInputError, match="cannot write to docker-archive:"):
        open_target(f"docker-archive:{legacy}")
