"""What every place that an image is read from does alike: layouts, archives of three kinds, a registry, a mirror."""

import contextlib
import dataclasses
import hashlib
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import dockersave, images
from support.registry import Front, running_registry

from floe.ingest.oci.media import OCI_LAYER, Descriptor
from floe.ingest.oci.opening import open_source
from floe.ingest.oci.platforms import Platform
from floe.ingest.oci.source import resolve
from floe.store.errors import DamagedError, FloeError, NotFoundError

# Kinds that hold the image's own manifest, and those that make one up.
OWN = ["oci", "oci-archive", "docker-current", "registry", "mirror"]
MADE_UP = ["docker-legacy", "docker-skopeo", "docker-compressed"]
ALL = [*OWN, *MADE_UP]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    layers = [images.files({"a": b"a" * 400_000}), images.files({"b/c": bytes(range(256)) * 3000})]
    return images.build_oci(tmp_path_factory.mktemp("image"), [*layers, layers[0]], compression="")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    layers = [images.files({"a": b"a" * 400_000}), images.files({"b/c": bytes(range(256)) * 3000})]
    return images.build_oci(tmp_path_factory.mktemp("packed"), layers, compression="gzip")


@pytest.fixture(scope="module")
def places(built, packed, tmp_path_factory):
    """Every kind by its name: (image, how it is opened)."""
    folder = tmp_path_factory.mktemp("places")
    archive = images.oci_archive(built.directory, folder / "oci.tar")
    current = dockersave.current(folder / "current.tar", built, ["app:1"])
    legacy = dockersave.legacy(folder / "legacy.tar", [(built, ["app:1", "h:5/other:2"]), (packed, None)])
    compressed = dockersave.legacy(folder / "compressed.tar", [(packed, ["app:1"])])
    skopeo = folder / "skopeo.tar"
    command = ["skopeo", "--insecure-policy", "copy", "-q", built.source, f"docker-archive:{skopeo}:app:1"]
    subprocess.run(command, check=True, timeout=60)
    with running_registry(folder / "registry") as registry, Front(registry) as mirror:
        registry.push(built.source, "app:1")
        (folder / "certs.d" / "r.example").mkdir(parents=True)
        (folder / "certs.d" / "r.example" / "hosts.toml").write_text(f'server = "{mirror.address}"\n')
        names = {
            "oci": (built, built.source),
            "oci-archive": (built, f"oci-archive:{archive}"),
            "docker-current": (built, f"docker-archive:{current}"),
            "docker-legacy": (built, f"docker-archive:{legacy}:other.example/x:1"),
            "docker-skopeo": (built, f"docker-archive:{skopeo}"),
            "docker-compressed": (packed, f"docker-archive:{compressed}:app:1"),
            "registry": (built, f"{registry.host}/app:1"),
            "mirror": (built, "r.example/app:1"),
        }
        names["docker-legacy"] = (built, f"docker-archive:{legacy}:h:5/other:2")
        config = (folder / "certs.d",)

        def opener(name, *, plain_http):
            return lambda: contextlib.closing(open_source(name, plain_http=plain_http, registry_config=config))

        yield {kind: (image, opener(name, plain_http=kind == "registry")) for kind, (image, name) in names.items()}


@pytest.fixture
def place(request, places):
    return places[request.param]


def every(kinds=ALL):
    return pytest.mark.parametrize("place", kinds, indirect=True)


@every()
def test_an_image_is_read_whole(place):
    built, opened = place
    with opened() as source:
        image = resolve(source)
        assert image.name == source.name
        assert image.config.diff_ids == built.diff_ids
        assert hashlib.sha256(image.config.raw).hexdigest() == built.config_digest.removeprefix("sha256:")
        assert [layer.digest for layer in image.manifest.layers] == [layer["digest"] for layer in built.layers]
        for layer, wanted in zip(image.manifest.layers, built.layers, strict=True):
            assert b"".join(source.open_blob(layer)) == dockersave.blob(built, wanted["digest"])
        assert hashlib.sha256(image.manifest.raw).hexdigest() == image.manifest.digest.removeprefix("sha256:")


@every(OWN)
def test_the_manifest_is_the_image_s_own(place):
    built, opened = place
    with opened() as source:
        assert resolve(source).manifest.digest == built.manifest_digest


@every(MADE_UP)
def test_a_manifest_made_up_is_the_same_each_time(place):
    _, opened = place
    with opened() as one, opened() as other:
        assert one.manifest() == other.manifest()


@every()
def test_many_threads_read_at_once(place):
    built, opened = place
    with opened() as source, ThreadPoolExecutor(6) as pool:
        image = resolve(source)
        read = list(pool.map(lambda layer: b"".join(source.open_blob(layer)), list(image.manifest.layers) * 3))
        assert read == [dockersave.blob(built, layer["digest"]) for layer in built.layers] * 3


@every()
def test_a_blob_that_is_not_there(place):
    _, opened = place
    with opened() as source, pytest.raises(NotFoundError):
        b"".join(source.open_blob(Descriptor(OCI_LAYER, "sha256:" + "0" * 64, 5)))


@every()
def test_a_blob_of_another_size_is_damaged(place):
    _, opened = place
    with opened() as source:
        layer = resolve(source).manifest.layers[0]
        for size in (layer.size - 1, layer.size + 1):
            with pytest.raises(DamagedError):
                b"".join(source.open_blob(dataclasses.replace(layer, size=size)))


@every()
def test_a_platform_that_is_not_there(place):
    _, opened = place
    with opened() as source, pytest.raises(NotFoundError, match="linux/s390x"):
        resolve(source, Platform.parse("linux/s390x"))


@every()
def test_it_can_be_left_in_the_middle(place):
    _, opened = place
    with opened() as source:
        pieces = source.open_blob(resolve(source).manifest.layers[0])
        assert next(pieces)
        pieces.close()
        assert resolve(source)


@every()
def test_its_name_finds_it_again(place):
    _, opened = place
    with opened() as source:
        name = source.name
    if not name.startswith(("127.", "r.example")):
        with contextlib.closing(open_source(name)) as again:
            assert again.manifest()


def read_whole(name):
    with contextlib.closing(open_source(name)) as source:
        for layer in resolve(source).manifest.layers:
            b"".join(source.open_blob(layer))


@every(["docker-current", "docker-legacy", "docker-skopeo", "oci-archive"])
def test_an_archive_that_is_cut_short(place, tmp_path):
    _, opened = place
    with opened() as source:
        path, scheme = source.ref.path, source.name.partition(":")[0]
        whole = Path(path).read_bytes()
    short = tmp_path / "short.tar"
    for size in (0, 700, len(whole) // 3, len(whole) // 2):
        short.write_bytes(whole[:size])
        with pytest.raises(FloeError) as caught:
            read_whole(f"{scheme}:{short}")
        assert str(short) in str(caught.value)
