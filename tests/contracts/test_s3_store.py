"""What an S3 store says when the bucket, the credentials or the server are not right, against a real server."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import seaweed

from floe.store.errors import AccessDeniedError, BadInputError, NotFoundError, UnavailableError
from floe.store.objects import open_store
from floe.store.objects.s3_address import S3Address


@pytest.fixture(scope="module")
def weed():
    return seaweed.running()


@pytest.fixture(scope="module")
def bucket(weed):
    return seaweed.shared_bucket()


@pytest.fixture(autouse=True)
def credentials(weed, monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in weed.environment().items():
        monkeypatch.setenv(name, value)


def test_no_such_bucket_is_named(weed):
    store = open_store(weed.url("floe-no-such-bucket"))
    for use in (
        lambda: store.get("floe.json"),
        lambda: store.put_if("floe.json", b"{}", None),
        lambda: store.put("floe.json", b"{}"),
        lambda: list(store.list("refs")),
    ):
        with pytest.raises(NotFoundError, match="floe-no-such-bucket") as caught:
            use()
        assert "create the bucket" in caught.value.hint


@pytest.mark.parametrize(
    ("key", "secret", "reason"),
    [
        ("wrong", seaweed.SECRET_KEY, "InvalidAccessKeyId"),
        (seaweed.ACCESS_KEY, "s3cr3t-wrong", "SignatureDoesNotMatch"),
    ],
)
def test_wrong_credentials_are_denied_at_once_and_not_shown(weed, bucket, monkeypatch, key, secret, reason):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    store = open_store(weed.url(bucket))
    for use in (
        lambda: store.get("floe.json"),
        lambda: store.get("floe.json", 0, 1),
        lambda: store.put("floe.json", b"{}"),
        lambda: list(store.list("refs")),
        lambda: asyncio.run(store.get_async("floe.json", 0, 1)),
    ):
        with pytest.raises(AccessDeniedError, match=reason) as caught:
            use()
        assert secret not in f"{caught.value}{caught.value.hint}"
        assert "\n" not in str(caught.value)
        assert "check the access key" in caught.value.hint


def test_who_may_read_may_not_write(weed, bucket, monkeypatch):
    open_store(weed.url(bucket, "ro")).put("x", b"1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweed.READER_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweed.READER_SECRET)
    store = open_store(weed.url(bucket, "ro"))
    assert bytes(store.get("x")) == b"1"
    with pytest.raises(AccessDeniedError, match="write"):
        store.put("x", b"2")


def test_no_credentials_at_all(weed, bucket, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(AccessDeniedError, match="no credentials") as caught:
        open_store(weed.url(bucket)).get("x")
    assert "AWS_ACCESS_KEY_ID" in caught.value.hint


def test_a_profile_of_the_aws_tools_is_used(weed, bucket, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    profile = tmp_path / "credentials"
    profile.write_text(
        f"[default]\naws_access_key_id = {seaweed.ACCESS_KEY}\naws_secret_access_key = {seaweed.SECRET_KEY}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))
    store = open_store(weed.url(bucket, "profile"))
    store.put("x", b"1")
    assert bytes(store.get("x")) == b"1"


def test_nobody_listens(bucket):
    store = open_store(f"s3://{bucket}?endpoint=http://127.0.0.1:1&region=us-east-1", retry=False)
    for use in (
        lambda: store.get("x"),
        lambda: store.put("x", b""),
        lambda: list(store.list("x")),
        lambda: asyncio.run(store.get_async("x", 0, 1)),
    ):
        with pytest.raises(UnavailableError, match="connect") as caught:
            use()
        assert "127.0.0.1:1" in caught.value.hint
        assert "\n" not in str(caught.value)


def test_two_prefixes_of_a_bucket_do_not_see_each_other(weed, bucket):
    one, two = (open_store(weed.url(bucket, f"apart/{name}")) for name in ("a", "ab"))
    one.put("x", b"1")
    two.put("y", b"2")
    assert [i.key for i in one.list("")] == ["x"]
    assert [i.key for i in two.list("")] == ["y"]


def test_more_than_a_page_is_listed(weed, bucket):
    store = open_store(weed.url(bucket, "pages"))
    wanted = [f"refs/{n:04}" for n in range(1100)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: store.put(key, b"x"), wanted))
    assert sorted(i.key for i in store.list("refs")) == wanted


@pytest.mark.parametrize("url", ["s3://key:s3cr3t@bucket", "s3://bucket?endpoint=http://key:s3cr3t@host"])
def test_addresses_with_secrets_are_refused_without_repeating_them(url):
    with pytest.raises(BadInputError) as caught:
        open_store(url)
    assert "s3cr3t" not in f"{caught.value}{caught.value.hint}"


def test_addresses_of_buckets(monkeypatch):
    assert S3Address.parse("s3://bucket") == S3Address("bucket", "", None, None, path_style=False)
    address = S3Address.parse("s3://bucket/a/b/?endpoint=http%3A%2F%2Fh%3A1&region=eu-west-1")
    assert address == S3Address("bucket", "a/b", "http://h:1", "eu-west-1", path_style=True)
    assert address.request_endpoint == "http://h:1"
    virtual = S3Address.parse("s3://bucket?endpoint=https://h&path_style=false")
    assert virtual.request_endpoint == "https://bucket.h"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://env:2")
    assert S3Address.parse("s3://bucket").endpoint == "http://env:2"
