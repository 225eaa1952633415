"""Registries that refuse, redirect, break off and lie, over real HTTP."""

import base64
import contextlib
import json
import os
import socket

import pytest
from support import images
from support.registry import PASSWORD, USER, Front, running_registry

from floe.ingest.oci import registry as registry_module
from floe.ingest.oci import source as sources
from floe.ingest.oci import transport
from floe.ingest.oci.media import OCI_LAYER, Descriptor
from floe.ingest.oci.opening import open_source, open_target
from floe.ingest.oci.platforms import Platform
from floe.store.errors import AccessDeniedError, DamagedError, NotFoundError, UnavailableError


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr(transport, "_BACKOFF", 0.001)
    monkeypatch.setattr(registry_module, "_BACKOFF", 0.001)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    directory = tmp_path_factory.mktemp("image")
    return images.build_oci(
        directory, [images.files({"a": b"a" * 500_000, "b/c": bytes(range(256)) * 4000})], compression=""
    )


@pytest.fixture(scope="module")
def registry(tmp_path_factory, built):
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        running.push(built.source, "app:1")
        yield running


def log_in(tmp_path, host, **entry):
    (tmp_path / "docker").mkdir(exist_ok=True)
    auth = {"auth": base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()}
    (tmp_path / "docker" / "config.json").write_text(json.dumps({"auths": {host: entry or auth}}))


def read_all(name):
    with contextlib.closing(open_source(name, plain_http=True)) as source:
        image = sources.resolve(source)
        return image, [b"".join(source.open_blob(layer)) for layer in image.manifest.layers]


def test_an_image_is_read(registry, built):
    image, blobs = read_all(f"{registry.host}/app:1")
    assert image.manifest.digest == built.manifest_digest
    assert image.config.diff_ids == built.diff_ids
    assert [len(blob) for blob in blobs] == [layer["size"] for layer in built.layers]
    by_digest, _ = read_all(f"{registry.host}/app@{built.manifest_digest}")
    assert by_digest.manifest == image.manifest


@pytest.mark.parametrize("name", ["app:none", "nobody:1"])
def test_an_image_that_is_not_there(registry, name):
    with pytest.raises(NotFoundError, match=name):
        read_all(f"{registry.host}/{name}")


def test_a_registry_that_is_not_there():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening
        with pytest.raises(UnavailableError, match=r"cannot be reached.*refused"):
            read_all(f"127.0.0.1:{taken.getsockname()[1]}/app:1")


def test_a_registry_without_tls_says_what_to_do(registry):
    with contextlib.closing(open_source(f"{registry.host}/app:1")) as source, pytest.raises(UnavailableError) as caught:
        source.manifest()
    assert "--plain-http" in caught.value.hint


def test_basic_credentials(tmp_path, built):
    with running_registry(tmp_path / "registry", htpasswd=True) as registry:
        name = f"{registry.host}/app:1"
        with pytest.raises(AccessDeniedError, match="asks for a user name"):
            read_all(name)
        log_in(tmp_path, registry.host, username=USER, password="wrong")
        with pytest.raises(AccessDeniedError, match="denied access as 'floe'") as caught:
            read_all(name)
        assert "wrong" not in str(caught.value)
        log_in(tmp_path, registry.host)
        with contextlib.closing(open_target(name, plain_http=True)) as target:
            copy_image(built, target)
        assert read_all(name)[0].manifest.digest == built.manifest_digest


def copy_image(built, target):
    with contextlib.closing(open_source(built.source)) as source:
        image = sources.resolve(source)
        for descriptor in (*image.manifest.layers, image.manifest.config):
            assert not target.has_blob(descriptor)
            target.push_blob(descriptor, lambda wanted=descriptor: source.open_blob(wanted))
            assert target.has_blob(descriptor)
        target.put_manifest(image.manifest.raw, image.manifest.media_type)


def test_tokens(registry, tmp_path, built):
    with Front(registry, bearer=True) as front:
        name = f"{front.host}/app:1"
        with pytest.raises(AccessDeniedError, match="token server"):
            read_all(name)
        log_in(tmp_path, front.host)
        assert read_all(name)[0].manifest.digest == built.manifest_digest
        assert front.tokens[-1] == {"service": ["floe test"], "scope": ["repository:app:pull"], "account": [USER]}
        asked = len(front.tokens)
        with contextlib.closing(open_source(name, plain_http=True)) as source:
            source.manifest()
            front.valid.clear()  # expired
            source.manifest()
        assert len(front.tokens) == asked + 2
        log_in(tmp_path, front.host, identitytoken="refresh-me")
        assert read_all(name)[0].manifest.digest == built.manifest_digest
        assert front.tokens[-1]["grant_type"] == ["refresh_token"]


def test_anonymous_tokens(registry):
    with Front(registry, bearer=True, anonymous=True) as front:
        read_all(f"{front.host}/app:1")
        assert len(front.tokens) == 1


def test_a_redirect_takes_no_credentials_along(registry, tmp_path):
    with Front(registry) as storage, Front(registry, bearer=True, redirect=storage) as front:
        log_in(tmp_path, front.host)
        _, blobs = read_all(f"{front.host}/app:1")
        assert blobs
        assert storage.seen
        assert not any("Authorization" in headers for _, _, headers in storage.seen)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on(registry, built, ranges):
    with Front(registry, breaks=4, cut=200_000, ranges=ranges) as front:
        _, blobs = read_all(f"{front.host}/app:1")
        assert len(blobs[0]) == built.layers[0]["size"]
        asked = [h.get("Range") for m, p, h in front.seen if built.layers[0]["digest"] in p]
        assert asked[:2] == [None, "bytes=200000-"]


def test_a_registry_that_recovers(registry):
    with Front(registry, fail=3) as front:
        read_all(f"{front.host}/app:1")


def test_a_registry_that_does_not_recover(registry):
    with Front(registry, fail=10**6) as front, pytest.raises(UnavailableError, match="answered 503"):
        read_all(f"{front.host}/app:1")


def test_spoiled_bytes_are_found(registry):
    with Front(registry, spoil=True) as front, pytest.raises(DamagedError, match="does not match its digest"):
        read_all(f"{front.host}/app:1")


def test_a_blob_is_mounted_from_another_repository(registry, built):
    with (
        contextlib.closing(open_source(f"{registry.host}/app:1", plain_http=True)) as source,
        contextlib.closing(open_target(f"{registry.host}/other/app:2", plain_http=True)) as target,
    ):
        image = sources.resolve(source)
        for descriptor in (*image.manifest.layers, image.manifest.config):
            assert target.mount_blob(descriptor, source)
        missing = Descriptor(OCI_LAYER, "sha256:" + "0" * 64, 5)
        assert not target.mount_blob(missing, source)
        target.put_manifest(image.manifest.raw, image.manifest.media_type)
    assert read_all(f"{registry.host}/other/app:2")[0].manifest.digest == built.manifest_digest


@pytest.mark.parametrize("how", ["fails", "loses"])
@pytest.mark.parametrize("method", ["POST", "PATCH", "PUT"])
def test_an_upload_survives_errors_that_pass(registry, tmp_path, method, how):
    built = images.build_oci(tmp_path / "new", [images.files({"a": os.urandom(300_000)})])
    with Front(registry, **{how: {method: 2}}) as front:
        with contextlib.closing(open_target(f"{front.host}/{how}{method.lower()}:1", plain_http=True)) as target:
            copy_image(built, target)
        assert front.answered.count(503) == 2
        assert read_all(f"{front.host}/{how}{method.lower()}:1")[0].manifest.digest == built.manifest_digest
    uploads = [headers for word, _, headers in front.seen if word == "PATCH"]
    # In one part each: Google's Artifact Registry takes no others.
    assert not any("Content-Range" in headers for headers in uploads)
    assert not any("Transfer-Encoding" in headers for headers in uploads)


def test_an_upload_that_goes_on_failing_says_so(registry, built):
    with (
        Front(registry, fails={"PATCH": 99}) as front,
        contextlib.closing(open_target(f"{front.host}/never:1", plain_http=True)) as target,
        pytest.raises(UnavailableError, match="cannot write blob"),
    ):
        copy_image(built, target)
    assert front.answered.count(503) == 4


def test_a_platform_that_is_not_there(registry):
    wanted = Platform.parse("linux/s390x")
    with (
        contextlib.closing(open_source(f"{registry.host}/app:1", plain_http=True)) as source,
        pytest.raises(NotFoundError, match="linux/s390x; it has: linux/"),
    ):
        sources.resolve(source, wanted)


def test_requests_are_counted(registry, built):
    read_all(f"{registry.host}/app:1")
    assert built.layers[0]["digest"] in registry.blob_requests()
