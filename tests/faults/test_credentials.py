"""Credentials of every source, expired, withdrawn and replaced while data is read: no read fails.

SeaweedFS behind the gate of tests/support/s3gate.py holds the data; the sources are tests/support/credentialsources.py.
"""

import asyncio
import hashlib
import os
import uuid

import pytest
from botocore import credentials as botocore_credentials
from support import seaweed
from support.credentialsources import ContainerEndpoint, InstanceMetadata, Issuer, LoginPortal, TokenService
from support.fakegcs import FakeGCS
from support.s3gate import S3Gate

from floe.store.errors import AccessDeniedError, CredentialsExpiredError, NotFoundError, UnavailableError
from floe.store.objects import credentials, gcs_credentials, open_store
from floe.store.objects.multipart import PART
from floe.store.objects.retry import RetryingStore

SOURCES = ("instance", "container", "web identity", "sso")
DATA = os.urandom(4 << 20)


@pytest.fixture
def gate():
    with S3Gate(seaweed.running(), {}) as made:
        yield made


@pytest.fixture(autouse=True)
def _nothing_of_the_machine_s(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setattr(credentials, "_LOOK_AGAIN", 0.02)
    monkeypatch.setattr(credentials, "_LOOK_AGAIN_MOST", 0.02)


@pytest.fixture
def source(request, gate, monkeypatch, tmp_path):
    """The issuer behind a source of credentials, which the environment names; the gate accepts what it issues."""
    issuer = Issuer(gate)
    kind = request.param
    if kind == "sso":
        made = LoginPortal(issuer, tmp_path)
        monkeypatch.setenv("AWS_CONFIG_FILE", str(made.config))
        monkeypatch.setattr(botocore_credentials.SSOProvider, "_SSO_TOKEN_CACHE_DIR", str(made.cache))
        made.login(hashlib.sha1(made.start.encode()).hexdigest())
    else:
        make = {"instance": InstanceMetadata, "container": ContainerEndpoint, "web identity": TokenService}[kind]
        made = make(issuer, tmp_path / "token") if kind == "web identity" else make(issuer)
        for name, value in made.environment().items():
            monkeypatch.setenv(name, value)
    with made:
        yield issuer


@pytest.fixture
def store(gate):
    """A store through the gate, not used yet; its object `pack` holds DATA."""
    prefix = uuid.uuid4().hex
    bucket = seaweed.shared_bucket()
    gate.accepted["first"] = "hand"
    own = {"AWS_ACCESS_KEY_ID": "first", "AWS_SECRET_ACCESS_KEY": "x", "AWS_SESSION_TOKEN": "hand"}
    os.environ.update(own)
    writer = open_store(gate.address(bucket, prefix), retry=False)
    writer.put("pack", DATA)
    for name in own:
        del os.environ[name]
    del gate.accepted["first"]
    made = open_store(gate.address(bucket, prefix), retry=False)
    yield made
    made.close()


async def read_long(store, change, requests=120, every=30):
    """Read DATA in pieces, eight at a time, with `change()` after each `every`."""
    step = len(DATA) // requests
    at_once = asyncio.Semaphore(8)

    async def read(number):
        async with at_once:
            if number and number % every == 0:
                await asyncio.to_thread(change)
            return number, bytes(await store.get_async("pack", number * step, step))

    found = dict(await asyncio.gather(*(read(number) for number in range(requests))))
    assert all(found[number] == DATA[number * step : (number + 1) * step] for number in range(requests))


@pytest.mark.parametrize("source", SOURCES, indirect=True)
def test_credentials_withdrawn_and_replaced_during_a_long_read_fail_no_read(source, store, gate):
    """Their expiry was an hour away: without any look at the server's refusals they would be used on."""
    asyncio.run(read_long(store, source.rotate))
    assert gate.refusals["ExpiredToken"] >= 3
    assert source.issued >= 4
    assert bytes(store.get("pack")) == DATA
    assert store.head("pack").size == len(DATA)


@pytest.mark.parametrize("source", SOURCES, indirect=True)
def test_every_kind_of_request_survives_a_rotation(source, store, tmp_path):
    file = tmp_path / "pack-file"
    file.write_bytes(os.urandom(2 * PART + 1000))
    for use in (
        lambda: store.get("pack", 5, 5),
        lambda: store.get_versioned("pack"),
        lambda: store.head("pack"),
        lambda: store.put("small", b"1"),
        lambda: store.put_if("new", b"1", None),
        lambda: list(store.list("")),
        lambda: store.delete("small"),
        lambda: store.put_file("large", file),
        lambda: store.put_file("large", file, lambda _: source.rotate()),
    ):
        source.rotate()
        use()
    source.rotate()
    assert bytes(store.get("large")) == file.read_bytes()


@pytest.mark.parametrize("source", ["container"], indirect=True)
def test_who_was_not_there_when_others_renewed_gets_the_new_ones_too(source, store, tmp_path):
    """boto3's client and obstore's store hold credentials each for itself."""
    file = tmp_path / "pack-file"
    file.write_bytes(os.urandom(PART + 1000))
    store.put_file("large", file)  # both are in use
    source.rotate()
    store.get("pack", 0, 1)
    store.put_file("large", file)
    source.rotate()
    store.put_file("large", file)
    store.get("pack", 0, 1)
    source.rotate()
    store.credentials.renew(store.credentials.current())
    store.put_file("large", file)
    store.get("pack", 0, 1)


@pytest.mark.parametrize("source", ["container", "web identity"], indirect=True)
def test_credentials_that_are_about_to_expire_are_renewed_before(source, store, gate):
    """Nine minutes are left, one less than botocore lets pass: each time it is asked it gets new ones."""
    source.lifetime = 540
    assert bytes(store.get("pack", 0, 10)) == DATA[:10]
    before = source.issued
    assert store.credentials.current()[2] == source.token
    assert source.issued > before
    assert not gate.refusals


def test_a_profile_that_is_rewritten_is_read_again(gate, store, monkeypatch, tmp_path):
    """Keys without a token, as a person's; the old ones are deleted once the new ones are written."""
    profile = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))

    def write():
        key = f"AKIA{uuid.uuid4().hex}"
        profile.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = s3cr3t\n")
        gate.accepted = {key: None}

    write()
    asyncio.run(read_long(store, write))
    assert gate.refusals["InvalidAccessKeyId"] >= 3


@pytest.mark.parametrize("source", ["container"], indirect=True)
def test_a_read_waits_until_expired_credentials_are_replaced(source, store, gate):
    """The source gives out the expired ones for a while."""
    assert bytes(store.get("pack", 0, 10)) == DATA[:10]
    gate.expired.add(source.token)
    retrying = RetryingStore(store, first_pause=0.01, longest_pause=0.02, deadline=60)
    seen = []
    gate_refusal = gate._refusal

    def refuse(*request):
        code = gate_refusal(*request)
        if code:
            seen.append(code)
            if len(seen) == 5:
                source.rotate()
        return code

    gate._refusal = refuse
    assert bytes(retrying.get("pack", 0, 10)) == DATA[:10]
    assert len(seen) >= 5


def test_expired_credentials_of_the_environment_are_named_as_such(gate, store, monkeypatch):
    for name, value in {"ACCESS_KEY_ID": "A", "SECRET_ACCESS_KEY": "s3cr3t", "SESSION_TOKEN": "t0ken"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    gate.expired.add("t0ken")
    with pytest.raises(CredentialsExpiredError, match="no longer accepted: ExpiredToken") as caught:
        store.get("pack")
    assert "aws sso login" in caught.value.hint
    assert "s3cr3t" not in f"{caught.value}{caught.value.hint}"
    assert "t0ken" not in f"{caught.value}{caught.value.hint}"


@pytest.mark.parametrize("source", ["container"], indirect=True)
def test_a_source_that_fails_hides_nothing_else_while_the_credentials_are_good(source, store, gate, monkeypatch):
    """A refusal had the source asked anew, in vain; what the server says of other requests is still told."""
    assert bytes(store.get("pack", 0, 1)) == DATA[:1]
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1:1/credentials")
    monkeypatch.setattr("botocore.utils.ContainerMetadataFetcher.SLEEP_TIME", 0)
    gate.denied = {"s3:GetObject"}
    with pytest.raises(AccessDeniedError, match="does not let us read"):
        store.head("pack")
    gate.denied = set()
    with pytest.raises(NotFoundError, match="no object none"):
        store.get("none", 0, 1)
    assert bytes(store.get("pack", 0, 1)) == DATA[:1]
    assert store.credentials.current()[2] == source.token  # nor are they thrown away


@pytest.mark.parametrize("source", ["sso"], indirect=True)
def test_a_login_that_ended_asks_for_a_new_one(source, store, tmp_path):
    for login in (tmp_path / "cache").iterdir():
        login.unlink()
    with pytest.raises(AccessDeniedError, match="no credentials") as caught:
        store.get("pack")
    assert "aws sso login" in caught.value.hint


def test_a_source_that_does_not_answer_is_asked_again(gate, store, monkeypatch):
    """The container's endpoint is named, and nobody listens: that may pass."""
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1:1/credentials")
    monkeypatch.setattr("botocore.utils.ContainerMetadataFetcher.SLEEP_TIME", 0)
    with pytest.raises(UnavailableError, match="no credentials"):
        store.get("pack")


def test_google_s_tokens_are_taken_from_a_key_file_and_renewed(tmp_path):
    with FakeGCS() as google:
        bucket = google.bucket()
        key = google.key_file(tmp_path / "key.json")
        store = open_store(google.address(bucket, "p", service_account=key), retry=False)
        store.put("pack", DATA)
        file = tmp_path / "pack-file"
        file.write_bytes(os.urandom(PART + 1000))
        asyncio.run(read_long(store, google.withdraw))
        assert len(google.given) >= 4
        for use in (
            lambda: list(store.list("")),
            lambda: store.head("pack"),
            lambda: store.put_if("new", b"1", None),
            lambda: store.multipart.uploads.create("large"),
            lambda: store.put_file("large", file),
            lambda: store.put_file("large", file, lambda _: google.withdraw()),
        ):
            google.withdraw()
            use()
        assert bytes(store.get("large")) == file.read_bytes()
        google.lifetime = 60  # less than google-auth keeps for good
        google.withdraw()
        store.get("pack", 0, 1)
        before = len(google.given)
        store.tokens.current()
        assert len(google.given) == before + 1
        store.close()


def test_google_s_application_default_credentials_are_used(tmp_path, monkeypatch):
    with FakeGCS() as google:
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(google.key_file(tmp_path / "key.json")))
        provider = gcs_credentials.TokenProvider(gcs_credentials.GCSAddress("bucket", ""), "gs://bucket")
        assert provider.current() in google.tokens
        assert provider.renew(provider.current()), "the key file gives another token"
        assert not provider.renew("an older token") or provider.current() != "an older token"
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(AccessDeniedError, match=r"no credentials for gs://bucket.*none\.json") as caught:
        gcs_credentials.TokenProvider(gcs_credentials.GCSAddress("bucket", ""), "gs://bucket").current()
    assert "service_account=FILE" in caught.value.hint
