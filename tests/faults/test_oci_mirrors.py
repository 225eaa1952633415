"""hosts.toml, as containerd reads it: mirrors, their capabilities, TLS and headers, against real servers."""

import contextlib
import socket

import pytest
import requests
from support import images
from support.certificates import Authority
from support.registry import PASSWORD, USER, Front, running_registry

from floe.ingest.oci import registry as registry_module
from floe.ingest.oci import source, transport
from floe.ingest.oci.credentialsource import CredentialSource
from floe.ingest.oci.hosts import Endpoint
from floe.ingest.oci.opening import open_source, open_target
from floe.store.errors import AccessDeniedError, BadInputError, DamagedError, NotFoundError, UnavailableError

NAME = "registry.example:5000"  # leads nowhere


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr(transport, "_BACKOFF", 0.001)
    monkeypatch.setattr(registry_module, "_BACKOFF", 0.001)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    directory = tmp_path_factory.mktemp("image")
    layers = [images.files({"a": b"a" * 500_000}), images.files({"b": bytes(range(256)) * 2000})]
    return images.build_oci(directory, layers, compression="")


@pytest.fixture(scope="module")
def upstream(tmp_path_factory, built):
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        running.push(built.source, "team/app:1")
        yield running


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


def write(tmp_path, text, directory="registry.example_5000_"):
    folder = tmp_path / "certs.d" / directory
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hosts.toml").write_text(text)
    return folder


def opened(tmp_path, name=f"{NAME}/team/app:1", way=open_source):
    return contextlib.closing(way(name, registry_config=(tmp_path / "certs.d",)))


def read(tmp_path, name=f"{NAME}/team/app:1"):
    with opened(tmp_path, name) as found:
        image = source.resolve(found)
        return image.manifest.digest, [b"".join(found.open_blob(layer)) for layer in image.manifest.layers]


def asked(front, what):
    return [path for _, path, _ in front.seen if what in path]


def test_mirrors_are_asked_in_order_and_told_whose_images(tmp_path, upstream, built):
    with Front(upstream, fail=10**6) as first, Front(upstream) as second, Front(upstream) as server:
        write(tmp_path, f'server = "{server.address}"\n[host."{first.address}"]\n[host."{second.address}"]\n')
        assert read(tmp_path)[0] == built.manifest_digest
        assert len(first.seen) == 1  # a mirror that failed is left out for the rest of the image
        assert asked(second, "/manifests/1") == ["/v2/team/app/manifests/1?ns=registry.example%3A5000"]
        assert all("ns=registry.example%3A5000" in path for _, path, _ in second.seen)
        assert not server.seen


def test_a_mirror_that_may_not_resolve_is_not_asked_for_tags(tmp_path, upstream, built):
    with Front(upstream) as mirror, Front(upstream) as server:
        write(tmp_path, f'server = "{server.address}"\n[host."{mirror.address}"]\ncapabilities = ["pull"]\n')
        read(tmp_path)
        assert not asked(mirror, "/manifests/1")
        assert len(asked(mirror, "/blobs/")) == 3
        assert len(asked(server, "/manifests/1")) == 1
        assert len(server.seen) == 1
        read(tmp_path, f"{NAME}/team/app@{built.manifest_digest}")
        assert len(asked(mirror, f"/manifests/{built.manifest_digest}")) == 1


def test_what_a_mirror_lacks_comes_from_the_registry(tmp_path, upstream, built, tmp_path_factory):
    with running_registry(tmp_path / "empty") as empty, Front(empty) as mirror, Front(upstream) as server:
        write(tmp_path, f'server = "{server.address}"\n[host."{mirror.address}"]\n')
        assert read(tmp_path)[0] == built.manifest_digest
        assert len(asked(mirror, "/blobs/")) == 3
        with pytest.raises(
            NotFoundError, match=r"registry.example:5000 has no such thing.*tried before: .*mirror"
        ) as e:
            read(tmp_path, f"{NAME}/team/app:none")
        assert mirror.host in str(e.value)


def test_a_mirror_that_is_not_there(tmp_path, upstream, built):
    with socket.socket() as taken, Front(upstream) as server:
        taken.bind(("127.0.0.1", 0))  # not listening
        port = taken.getsockname()[1]
        write(tmp_path, f'server = "{server.address}"\n[host."http://127.0.0.1:{port}"]\ndial_timeout = "500ms"\n')
        assert read(tmp_path)[0] == built.manifest_digest


def test_a_download_goes_on_at_the_next_server(tmp_path, upstream, built):
    with Front(upstream) as mirror, Front(upstream) as server:
        write(tmp_path, f'server = "{server.address}"\n[host."{mirror.address}"]\n')
        with opened(tmp_path) as found:
            image = source.resolve(found)
            mirror.cut, mirror.breaks = 200_000, 1
            pieces = found.open_blob(image.manifest.layers[0])
            begin = next(pieces)
            mirror.cut, mirror.breaks = 0, 10**6  # from now on it breaks off before the first byte
            assert len(begin) + sum(map(len, pieces)) == built.layers[0]["size"]
        went_on = [headers.get("Range") for _, path, headers in server.seen if built.layers[0]["digest"] in path]
        assert went_on == ["bytes=200000-"]


def test_a_mirror_that_spoils_is_named(tmp_path, upstream):
    with Front(upstream, spoil=True) as mirror, Front(upstream) as server:
        write(tmp_path, f'server = "{server.address}"\n[host."{mirror.address}"]\n')
        with pytest.raises(DamagedError, match=rf"does not match its digest.*from mirror {mirror.host}"):
            read(tmp_path)


def test_credentials_are_those_of_the_server_that_asks(tmp_path, upstream, built):
    (tmp_path / "docker").mkdir()
    with Front(upstream, bearer=True) as mirror, Front(upstream) as server:
        write(tmp_path, f'server = "{server.address}"\n[host."{mirror.address}"]\n')
        config = tmp_path / "docker" / "config.json"
        config.write_text(f'{{"auths": {{"{NAME}": {{"username": "{USER}", "password": "{PASSWORD}"}}}}}}')
        assert read(tmp_path)[0] == built.manifest_digest
        assert mirror.tokens
        assert not any("account" in query for query in mirror.tokens)  # the registry's login is not for a mirror
        assert len(server.seen) > 0
        config.write_text(f'{{"auths": {{"{mirror.host}": {{"username": "{USER}", "password": "{PASSWORD}"}}}}}}')
        before = len(server.seen)
        assert read(tmp_path)[0] == built.manifest_digest
        assert len(server.seen) == before


def test_writes_go_to_the_server_that_may_take_them(tmp_path, upstream, built):
    with Front(upstream) as mirror, Front(upstream) as server:
        write(tmp_path, f'server = "{server.address}"\n[host."{mirror.address}"]\ncapabilities = ["pull", "resolve"]\n')
        with opened(tmp_path) as found, opened(tmp_path, f"{NAME}/copy:1", open_target) as target:
            image = source.resolve(found)
            for descriptor in (*image.manifest.layers, image.manifest.config):
                assert target.mount_blob(descriptor, found)
            target.put_manifest(image.manifest.raw, image.manifest.media_type)
        assert {method for method, _, _ in mirror.seen} == {"GET"}
        assert {method for method, _, _ in server.seen} == {"POST", "PUT"}
        write(tmp_path, f'server = "{server.address}"\ncapabilities = ["pull", "resolve"]\n')
        with (
            opened(tmp_path, f"{NAME}/copy:1", open_target) as target,
            pytest.raises(BadInputError, match=r"no server for registry\.example:5000/copy:1 may push"),
        ):
            target.put_manifest(b"{}", "x")


def test_an_api_elsewhere_and_headers(tmp_path, upstream, built):
    with Front(upstream) as storage, Front(upstream, api="/proxy/hub", redirect=storage) as mirror:
        write(
            tmp_path,
            f'[host."{mirror.address}/proxy/hub/"]\noverride_path = true\n'
            f'[host."{mirror.address}/proxy/hub/".header]\nx-meta = ["a", "b"]\n',
            "_default",
        )
        assert read(tmp_path)[0] == built.manifest_digest
        assert all(path.startswith("/proxy/hub/team/app/") for _, path, _ in mirror.seen)
        assert all(headers["x-meta"] == "a, b" for _, _, headers in mirror.seen)
        assert storage.seen
        assert not any("x-meta" in headers for _, _, headers in storage.seen)


def test_a_path_before_v2(tmp_path, upstream, built):
    with Front(upstream, api="/us/v2") as mirror:
        write(tmp_path, f'server = "{mirror.address}/us"\n')
        assert read(tmp_path)[0] == built.manifest_digest


# TLS


def test_a_ca_of_one_s_own(tmp_path, upstream, built, authority):
    with Front(upstream, tls=authority.server("127.0.0.1")) as front:
        folder = write(tmp_path, f'server = "{front.address}"\n')
        with pytest.raises(UnavailableError, match="no TLS connection to mirror") as caught:
            read(tmp_path)
        assert "hosts.toml" in caught.value.hint
        (folder / "ca.pem").write_bytes(authority.ca.read_bytes())
        write(tmp_path, f'server = "{front.address}"\nca = "ca.pem"\n')  # relative to hosts.toml
        assert read(tmp_path)[0] == built.manifest_digest
        other = Authority(tmp_path / "other", "another CA")
        write(tmp_path, f'server = "{front.address}"\nca = ["{other.ca}", "ca.pem"]\n')
        assert read(tmp_path)[0] == built.manifest_digest
        write(tmp_path, f'server = "{front.address}"\nca = "{other.ca}"\n')
        with pytest.raises(UnavailableError, match="no TLS connection"):
            read(tmp_path)


def test_the_system_s_cas_count(tmp_path, upstream, built, authority, monkeypatch):
    with Front(upstream, tls=authority.server("127.0.0.1")) as front:
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
        with contextlib.closing(open_source(f"{front.host}/team/app:1")) as found:
            assert source.resolve(found).manifest.digest == built.manifest_digest


def test_a_certificate_for_another_name(tmp_path, upstream, built, authority):
    with Front(upstream, tls=authority.server("elsewhere.example")) as front:
        write(tmp_path, f'server = "{front.address}"\nca = "{authority.ca}"\n')
        with pytest.raises(UnavailableError, match="IP address mismatch"):
            read(tmp_path)
        write(tmp_path, f'server = "{front.address}"\nskip_verify = true\n')
        assert read(tmp_path)[0] == built.manifest_digest


def test_client_certificates(tmp_path, upstream, built, authority):
    clients = Authority(tmp_path / "clients", "clients")
    certificate, key = clients.issue("node")
    with Front(upstream, tls=authority.server("127.0.0.1", clients=clients)) as front:
        begin = f'server = "{front.address}"\nca = "{authority.ca}"\n'
        write(tmp_path, begin)
        with pytest.raises(UnavailableError):
            read(tmp_path)
        write(tmp_path, f'{begin}client = [["{certificate}", "{key}"]]\n')
        assert read(tmp_path)[0] == built.manifest_digest
        both = tmp_path / "both.pem"
        both.write_bytes(certificate.read_bytes() + key.read_bytes())
        for client in (f'"{both}"', f'["{both}"]', f'[["{both}", ""]]'):
            write(tmp_path, f"{begin}client = {client}\n")
            assert read(tmp_path)[0] == built.manifest_digest


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 alert certificate required", "name one in hosts.toml"),
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed", "name that CA in hosts.toml"),
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number", "use --plain-http"),
    ],
)
def test_what_tls_failures_mean(said, hint):
    server = transport.Transport(Endpoint("r", "https://r"), CredentialSource("r"))
    assert hint in server.unreachable(requests.exceptions.SSLError(said), "cannot read").hint


def test_docker_s_certificate_files(tmp_path, upstream, built, authority):
    clients = Authority(tmp_path / "clients", "clients")
    certificate, key = clients.issue("node")
    with Front(upstream, tls=authority.server("127.0.0.1", clients=clients)) as front:
        folder = tmp_path / "certs.d" / front.host
        folder.mkdir(parents=True)
        for name, path in (("ca.crt", authority.ca), ("node.cert", certificate), ("node.key", key)):
            (folder / name).write_bytes(path.read_bytes())
        assert read(tmp_path, f"{front.host}/team/app:1")[0] == built.manifest_digest


@pytest.mark.parametrize("wrong", ["ca", "client"])
def test_certificates_that_cannot_be_used(tmp_path, wrong):
    folder = write(tmp_path, f'{wrong} = "bad.pem"\n')
    with pytest.raises(BadInputError, match=r"cannot use .*bad\.pem: No such file"):
        read(tmp_path)
    (folder / "bad.pem").write_text("nothing")
    with pytest.raises(BadInputError, match=r"cannot use .*bad\.pem: not "):
        read(tmp_path)


@pytest.mark.parametrize("with_tls", [False, True])
def test_http_with_tls_settings_is_tried_with_tls_first(tmp_path, upstream, built, authority, with_tls):
    with Front(upstream, tls=authority.server("127.0.0.1") if with_tls else None) as front:
        write(tmp_path, f'server = "http://{front.host}"\nskip_verify = true\n')
        assert read(tmp_path)[0] == built.manifest_digest


def test_a_mirror_with_tls_does_not_redirect_without(tmp_path, upstream, authority):
    with (
        Front(upstream) as storage,
        Front(upstream, tls=authority.server("127.0.0.1"), redirect=storage) as front,
    ):
        write(tmp_path, f'server = "{front.address}"\nca = "{authority.ca}"\n')
        with pytest.raises(AccessDeniedError, match=r"redirects to http://127\.0\.0\.1, without TLS"):
            read(tmp_path)
        assert not storage.seen
