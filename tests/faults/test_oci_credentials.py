"""Whom Floe is to a registry: helpers, identity tokens, and the ways of Google, Amazon and GitHub, over real TLS.

The registries' own host names lead to servers of the tests' own, by a proxy that hosts.toml names.
"""

import base64
import contextlib
import json
import threading
import time
from pathlib import Path

import pytest
from support import images
from support.certificates import Authority
from support.connectproxy import ConnectProxy
from support.ecrapi import EcrApi
from support.registry import PASSWORD, USER, Front, running_registry

from floe.ingest.oci import credentialsource, helper, source, transport
from floe.ingest.oci import registry as registry_module
from floe.ingest.oci.opening import open_source, open_target
from floe.store.errors import AccessDeniedError, BadInputError, UnavailableError

GAR, GHCR, ECR = "europe-docker.pkg.dev", "ghcr.io", "123456789012.dkr.ecr.eu-central-1.amazonaws.com"


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr(transport, "_BACKOFF", 0.001)
    monkeypatch.setattr(registry_module, "_BACKOFF", 0.001)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    directory = tmp_path_factory.mktemp("image")
    layers = [images.files({"a": b"a" * 500_000}), images.files({"b": bytes(range(256)) * 2000})]
    return images.build_oci(directory, layers, compression="")


@pytest.fixture(scope="module")
def upstream(tmp_path_factory, built):
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        running.push(built.source, "app:1")
        yield running


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


def config(tmp_path, **value):
    (tmp_path / "docker").mkdir(exist_ok=True)
    (tmp_path / "docker" / "config.json").write_text(json.dumps(value))


def install_helper(tmp_path, name, script):
    """docker-credential-NAME: `script` in sh, which sees what it was asked in $asked."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    program = tmp_path / "bin" / f"docker-credential-{name}"
    program.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/{name}.calls\nread -r asked || true\n{script}\n')
    program.chmod(0o755)


def calls(tmp_path, name):
    path = tmp_path / f"{name}.calls"
    return path.read_text().splitlines() if path.exists() else []


def secret(username, value):
    return f"""printf '{{"ServerURL":"%s","Username":"{username}","Secret":"%s"}}' "$asked" {value}"""


@contextlib.contextmanager
def known_as(host, tmp_path, authority, upstream, **options):
    """A Front that the host name `host` leads to: (front, the open_source that finds it)."""
    with (
        Front(upstream, name=host, tls=authority.server(host), **options) as front,
        ConnectProxy({f"{host}:443": front.port}) as proxy,
    ):
        folder = tmp_path / "certs.d" / host
        folder.mkdir(parents=True)
        (folder / "hosts.toml").write_text(f'ca = "{authority.ca}"\nproxy = "{proxy.address}"\n')

        def opened(name="app:1", way=open_source):
            return contextlib.closing(way(f"{host}/{name}", registry_config=(tmp_path / "certs.d",)))

        yield front, opened
        assert set(proxy.asked) <= {f"{host}:443"}


def read_all(opened):
    with opened() as found:
        image = source.resolve(found)
        return image.manifest.digest, [b"".join(found.open_blob(layer)) for layer in image.manifest.layers]


# Helpers


def test_a_helper_is_asked_as_docker_asks(tmp_path):
    install_helper(tmp_path, "one", secret("me", "s3cret"))
    config(tmp_path, credHelpers={"r:5000": "one"}, credsStore="two")
    install_helper(tmp_path, "two", secret("<token>", "identity"))
    found = credentialsource.CredentialSource("r:5000").get()
    assert (found.username, found.password, found.origin) == ("me", "s3cret", "credential helper docker-credential-one")
    assert "s3cret" not in repr(found)
    assert calls(tmp_path, "one") == ["get"]
    hub = credentialsource.CredentialSource("registry-1.docker.io").get()
    assert hub.identity_token == "identity"
    assert hub.username == ""
    install_helper(tmp_path, "two", 'test "$asked" = https://index.docker.io/v1/ && ' + secret("hub", "x"))
    assert credentialsource.CredentialSource("registry-1.docker.io").get().username == "hub"


def test_a_helper_that_has_nothing_leaves_it_to_the_file(tmp_path):
    install_helper(tmp_path, "empty", "echo 'credentials not found in native keychain'; exit 1")
    config(tmp_path, credsStore="empty", auths={"r": {"username": "me", "password": "p"}})
    assert credentialsource.CredentialSource("r").get().username == "me"
    assert credentialsource.CredentialSource("other").get() is None
    install_helper(tmp_path, "empty", secret("", ""))
    assert credentialsource.CredentialSource("other").get() is None


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo the vault is sealed; echo more >&2; exit 3", r"exit code 3\): the vault is sealed$"),
        ("echo on stderr >&2; exit 1", r"exit code 1\): on stderr$"),
        ("echo hunter2", "something else than credentials"),
        (None, "is not installed"),
    ],
)
def test_a_helper_that_fails(tmp_path, script, said):
    if script is not None:
        install_helper(tmp_path, "bad", script)
    config(tmp_path, credHelpers={"r": "bad"})
    with pytest.raises(AccessDeniedError, match=said) as caught:
        credentialsource.CredentialSource("r").get()
    assert "docker-credential-bad" in str(caught.value)
    assert "hunter2" not in str(caught.value) + caught.value.hint


def test_a_helper_that_hangs_is_ended_with_what_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(helper, "_TIMEOUT", 2.0)  # time enough to start a shell
    install_helper(tmp_path, "slow", f"sleep 300 & echo $! >{tmp_path}/child; wait")
    config(tmp_path, credHelpers={"r": "slow"})
    with pytest.raises(AccessDeniedError, match=r"did not answer for r within"):
        credentialsource.CredentialSource("r").get()
    child = (tmp_path / "child").read_text().strip()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _runs(child):
        time.sleep(0.01)
    assert not _runs(child)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_helper_s_name_is_no_path(tmp_path):
    config(tmp_path, credHelpers={"r": "../../evil"})
    with pytest.raises(BadInputError, match="no name of a credential helper"):
        credentialsource.CredentialSource("r").get()


def test_the_variable_comes_before_the_file(tmp_path, monkeypatch):
    config(tmp_path, auths={"r": {"username": "file", "password": "p"}, "s": {"username": "file", "password": "p"}})
    monkeypatch.setenv("DOCKER_AUTH_CONFIG", json.dumps({"auths": {"r": {"username": "variable", "password": "p"}}}))
    assert credentialsource.CredentialSource("r").get().username == "variable"
    assert credentialsource.CredentialSource("s").get().username == "file"


def test_a_login_for_a_part_of_a_registry_counts_where_there_is_none_for_all_of_it(tmp_path):
    """As podman and Kubernetes write them."""
    names = ["r/one", "https://r/v2/", "r/two", "s/one", "s/two"]
    config(tmp_path, auths={name: {"username": name, "password": "p"} for name in names})
    assert credentialsource.CredentialSource("r").get().username == "https://r/v2/"
    assert credentialsource.CredentialSource("s").get().username == "s/one"


def test_a_password_that_changed_in_the_file_is_found(tmp_path, upstream):
    with Front(upstream, basic=True) as front:
        config(tmp_path, auths={front.host: {"username": USER, "password": PASSWORD}})
        with contextlib.closing(open_source(f"{front.host}/app:1", plain_http=True)) as found:
            found.manifest()
            front.logins[USER] = "rotated"
            with pytest.raises(AccessDeniedError, match="denied access as 'floe'"):
                found.manifest()
            config(tmp_path, auths={front.host: {"username": USER, "password": "rotated"}})
            found.manifest()


# Identity tokens


@pytest.mark.parametrize("rotate", [False, True])
def test_identity_tokens(tmp_path, upstream, built, rotate):
    with Front(upstream, bearer=True, rotate=rotate, uses=2) as front:
        config(tmp_path, auths={front.host: {"identitytoken": "refresh-me"}})
        with contextlib.closing(open_source(f"{front.host}/app:1", plain_http=True)) as found:
            image = source.resolve(found)
            assert [b"".join(found.open_blob(layer)) for layer in image.manifest.layers]
        assert image.manifest.digest == built.manifest_digest
        assert len(front.tokens) > 1
        first = {key: values[0] for key, values in front.tokens[0].items()}
        assert first == {
            "grant_type": "refresh_token",
            "service": "floe test",
            "client_id": "floe",
            "scope": "repository:app:pull",
            "refresh_token": "refresh-me",
        }
        assert (front.tokens[1]["refresh_token"] != ["refresh-me"]) == rotate


def test_an_identity_token_that_ended(tmp_path, upstream):
    with Front(upstream, bearer=True) as front:
        config(tmp_path, auths={front.host: {"auth": base64.b64encode(b"<token>:0ld").decode()}})
        with (
            contextlib.closing(open_source(f"{front.host}/app:1", plain_http=True)) as found,
            pytest.raises(AccessDeniedError, match=r"token server http://.*/token answered 401") as caught,
        ):
            found.manifest()
        assert "0ld" not in str(caught.value)
        assert "config.json" in caught.value.hint


# Tokens


def test_a_token_is_renewed_in_the_middle_of_a_pull(upstream, built):
    with Front(upstream, bearer=True, anonymous=True, breaks=6, cut=150_000, expire=True) as front:
        with contextlib.closing(open_source(f"{front.host}/app:1", plain_http=True)) as found:
            image = source.resolve(found)
            blobs = [b"".join(found.open_blob(layer)) for layer in image.manifest.layers]
        assert [len(blob) for blob in blobs] == [layer["size"] for layer in built.layers]
        assert front.breaks == 0
        assert len(front.tokens) == 7


def test_a_token_is_renewed_before_its_end(upstream):
    with Front(upstream, bearer=True, anonymous=True, lifetime=0.001) as front:
        with contextlib.closing(open_source(f"{front.host}/app:1", plain_http=True)) as found:
            found.manifest()
            found.manifest()
        assert len(front.tokens) == 2
        # Only the first request went without a token.
        assert ["Authorization" in headers for _, path, headers in front.seen if "/manifests/" in path] == [
            False,
            True,
            True,
        ]


def test_a_token_that_cannot_be_renewed_yet_is_used_to_its_end(upstream):
    with (
        Front(upstream, bearer=True, anonymous=True, lifetime=0.001) as front,
        contextlib.closing(open_source(f"{front.host}/app:1", plain_http=True)) as found,
    ):
        found.manifest()
        front.anonymous = False
        found.manifest()
        assert len(front.tokens) == 2
        front.valid.clear()
        with pytest.raises(AccessDeniedError, match="token server"):
            found.manifest()


def test_many_threads_share_one_token(upstream):
    with (
        Front(upstream, bearer=True, anonymous=True) as front,
        contextlib.closing(open_source(f"{front.host}/app:1", plain_http=True)) as found,
    ):
        threads = [threading.Thread(target=found.manifest) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(front.tokens) == 1


def test_a_token_server_that_recovers(upstream, monkeypatch):
    from support.registry import _Handler  # noqa: PLC0415 - what is disturbed

    answers = iter([503, 503])
    real = _Handler._token

    def failing(handler, body):
        status = next(answers, None)
        if status is None:
            real(handler, body)
        else:
            handler._answer(status, {}, b"")

    monkeypatch.setattr(_Handler, "_token", failing)
    with (
        Front(upstream, bearer=True, anonymous=True) as front,
        contextlib.closing(open_source(f"{front.host}/app:1", plain_http=True)) as found,
    ):
        found.manifest()


# Google Artifact Registry


def test_gar_with_an_access_token(tmp_path, upstream, built, authority):
    with known_as(GAR, tmp_path, authority, upstream, bearer=True, logins={"oauth2accesstoken": "ya29.a"}) as (
        front,
        opened,
    ):
        with pytest.raises(AccessDeniedError, match=r"token server https://europe-docker\.pkg\.dev/token answered 401"):
            read_all(opened)
        config(tmp_path, auths={GAR: {"username": "oauth2accesstoken", "password": "ya29.a"}})
        assert read_all(opened)[0] == built.manifest_digest
        assert front.tokens[-1]["account"] == ["oauth2accesstoken"]


def test_gar_s_helper_is_asked_again_when_its_access_token_ended(tmp_path, upstream, built, authority):
    with known_as(GAR, tmp_path, authority, upstream, bearer=True, uses=2) as (front, opened):
        install_helper(tmp_path, "gcloud", secret("oauth2accesstoken", f'"$(cat {tmp_path}/access)"'))
        config(tmp_path, credHelpers={GAR: "gcloud"})
        (tmp_path / "access").write_text("ya29.a")
        front.logins = {"oauth2accesstoken": "ya29.a"}
        with opened() as found:
            image = source.resolve(found)
            # An hour later.
            (tmp_path / "access").write_text("ya29.b")
            front.logins = {"oauth2accesstoken": "ya29.b"}
            assert [b"".join(found.open_blob(layer)) for layer in image.manifest.layers]
        assert image.manifest.digest == built.manifest_digest
        assert len(calls(tmp_path, "gcloud")) == 2


# GitHub


def test_ghcr_without_and_with_a_personal_access_token(tmp_path, upstream, built, authority):
    with known_as(GHCR, tmp_path, authority, upstream, bearer=True, anonymous=True, logins={"me": "ghp_x"}) as (
        front,
        opened,
    ):
        assert read_all(opened)[0] == built.manifest_digest
        assert front.tokens[-1] == {"service": ["floe test"], "scope": ["repository:app:pull"]}
        config(tmp_path, auths={GHCR: {"auth": base64.b64encode(b"me:ghp_x").decode()}})
        assert read_all(opened)[0] == built.manifest_digest
        assert front.tokens[-1]["account"] == ["me"]
        config(tmp_path, auths={GHCR: {"username": "me", "password": "ghp_gone"}})
        with pytest.raises(AccessDeniedError, match=r"registry ghcr\.io denied access as 'me'") as caught:
            read_all(opened)
        assert "ghp_gone" not in str(caught.value)


# Amazon


@pytest.fixture
def _aws(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "aws-secret")


def log_in_to(api, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_ECR", api.address)


@pytest.mark.usefixtures("_aws")
def test_ecr_without_a_helper(tmp_path, upstream, built, authority, monkeypatch):
    with known_as(ECR, tmp_path, authority, upstream, basic=True) as (front, opened), EcrApi(front.logins) as api:
        log_in_to(api, monkeypatch)
        assert read_all(opened)[0] == built.manifest_digest
        assert len(api.asked) == 1
        assert "Credential=AKIDEXAMPLE/" in api.asked[0]
        assert "/eu-central-1/ecr/" in api.asked[0]
        with opened("other:1", open_target) as target, opened() as found:
            image = source.resolve(found)
            for descriptor in (*image.manifest.layers, image.manifest.config):
                data = b"".join(found.open_blob(descriptor))  # here each password ends with the next; Amazon's do not
                target.push_blob(descriptor, lambda data=data: [data])
            target.put_manifest(image.manifest.raw, image.manifest.media_type)


@pytest.mark.usefixtures("_aws")
def test_an_ecr_password_is_renewed_before_its_end(tmp_path, upstream, authority, monkeypatch):
    with known_as(ECR, tmp_path, authority, upstream, basic=True) as (front, opened), EcrApi(front.logins) as api:
        log_in_to(api, monkeypatch)
        before = time.time()
        known = credentialsource.CredentialSource(ECR)
        found = known.get()
        assert before + 11 * 3600 - 60 < found.renew_at < time.time() + 11 * 3600 + 60
        assert known.get() is found
        with opened() as image:
            image.manifest()
            passed = time.time() + 11.5 * 3600 - before
            real, clock = time.time, time.monotonic
            monkeypatch.setattr(time, "time", lambda: real() + passed)
            monkeypatch.setattr(time, "monotonic", lambda: clock() + passed)
            asked = len(api.asked)
            image.manifest()
            monkeypatch.undo()
        assert len(api.asked) == asked + 1
        # No request was refused after the first, which asks how to log in.
        assert [status for status in front.answered if status == 401] == [401]


@pytest.mark.usefixtures("_aws")
@pytest.mark.parametrize("status", [401, 403])
def test_an_ecr_password_that_ended_early_is_replaced(tmp_path, upstream, authority, monkeypatch, status):
    with (
        known_as(ECR, tmp_path, authority, upstream, basic=True, ended=status) as (front, opened),
        EcrApi(front.logins) as api,
    ):
        log_in_to(api, monkeypatch)
        with opened() as found:
            found.manifest()
            front.logins["AWS"] = "another"
            found.manifest()
        assert len(api.asked) == 2


@pytest.mark.usefixtures("_aws")
def test_an_ecr_password_that_cannot_be_renewed_yet_is_used_to_its_end(tmp_path, upstream, authority, monkeypatch):
    with (
        known_as(ECR, tmp_path, authority, upstream, basic=True) as (front, opened),
        EcrApi(front.logins, lifetime=0.001) as api,
    ):
        log_in_to(api, monkeypatch)
        with opened() as found:
            found.manifest()
            api.refuse = "ServerException"
            found.manifest()
        assert len(api.asked) > 1


@pytest.mark.usefixtures("_aws")
def test_ecr_that_refuses(tmp_path, upstream, authority, monkeypatch):
    with known_as(ECR, tmp_path, authority, upstream, basic=True) as (front, opened), EcrApi(front.logins) as api:
        log_in_to(api, monkeypatch)
        api.refuse = "AccessDeniedException"
        with pytest.raises(AccessDeniedError, match="cannot get a password for 123456789012") as caught:
            read_all(opened)
        assert "ecr:GetAuthorizationToken" in caught.value.hint
        api.refuse = "ServerException"
        with pytest.raises(UnavailableError, match="Amazon ECR of region eu-central-1"):
            read_all(opened)


def test_ecr_without_aws_credentials(tmp_path, upstream, authority):
    with (
        known_as(ECR, tmp_path, authority, upstream, basic=True) as (_, opened),
        pytest.raises(AccessDeniedError, match="asks for a user name and password"),
    ):
        read_all(opened)


def test_ecr_with_its_helper(tmp_path, upstream, built, authority):
    with known_as(ECR, tmp_path, authority, upstream, basic=True, logins={"AWS": "by-helper"}) as (_, opened):
        install_helper(tmp_path, "ecr-login", secret("AWS", "by-helper"))
        config(tmp_path, credHelpers={ECR: "ecr-login"})
        assert read_all(opened)[0] == built.manifest_digest
