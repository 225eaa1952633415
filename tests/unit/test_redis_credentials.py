"""IAM tokens and password files, by a signer and a clock of our own. No AWS: what is signed is checked by its form."""

from urllib.parse import parse_qs, urlsplit

import botocore.exceptions
import pytest
import redis

from floe.store.errors import AccessDeniedError, DeadlineError, UnavailableError
from floe.store.index.redis import credentials, faults
from floe.store.index.redis.address import RedisAddress
from floe.store.index.redis.credentials import FileCredentials, IamCredentials

ADDRESS = "rediss://app@host?iam={}&name=my-cluster&region=eu-west-1"


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def aws(monkeypatch):
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "hidden",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("service", "signed_for", "more"),
    [
        ("memorydb", "memorydb", {}),
        ("elasticache", "elasticache", {}),
        ("elasticache-serverless", "elasticache", {"ResourceType": ["ServerlessCache"]}),
    ],
)
def test_a_token_is_a_presigned_request_without_its_scheme(aws, service, signed_for, more):
    user, token = IamCredentials(RedisAddress.parse(ADDRESS.format(service))).get_credentials()
    assert user == "app"
    assert token.startswith("my-cluster/?")
    query = parse_qs(urlsplit(f"https://{token}").query)
    assert {"Action": ["connect"], "User": ["app"], "X-Amz-Expires": ["900"], **more}.items() <= query.items()
    assert query["X-Amz-Credential"][0].endswith(f"/eu-west-1/{signed_for}/aws4_request")
    assert len(query["X-Amz-Signature"][0]) == 64
    assert "hidden" not in token


def test_a_token_is_used_for_ten_of_its_fifteen_minutes():
    clock, signed = Clock(), []

    def sign(url, service, region):
        signed.append((url, service, region))
        return f"https://token-{len(signed)}"

    made = IamCredentials(RedisAddress.parse(ADDRESS.format("memorydb")), sign, clock)
    assert made.get_credentials() == ("app", "token-1")
    clock.now += 599
    assert made.get_credentials() == ("app", "token-1")
    clock.now += 1
    assert made.get_credentials() == ("app", "token-2")
    assert signed[0] == ("https://my-cluster/?Action=connect&User=app", "memorydb", "eu-west-1")
    assert credentials.TOKEN_SECONDS - credentials._RENEW >= 300


def test_no_aws_credentials_or_region_is_said(aws, monkeypatch):
    with pytest.raises(UnavailableError, match="region"):
        credentials.presign("https://x/", "memorydb", None)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UnavailableError, match="AWS credentials"):
        credentials.presign("https://x/", "memorydb", "eu-west-1")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UnavailableError, match="nobody") as caught:
        credentials.presign("https://x/", "memorydb", "eu-west-1")
    assert isinstance(caught.value.__cause__, botocore.exceptions.BotoCoreError)


def test_a_password_file_is_read_each_time(tmp_path):
    path = tmp_path / "password"
    path.write_text("one\nnot this\n")
    assert FileCredentials("app", path).get_credentials() == ("app", "one")
    made = FileCredentials(None, path)
    assert made.get_credentials() == ("one",)
    path.write_text("two\n")
    assert made.get_credentials() == ("two",)
    for spoil in (path.unlink, lambda: path.write_text(""), lambda: path.write_bytes(b"\xff\xfe")):
        spoil()
        with pytest.raises(UnavailableError, match="password"):
            made.get_credentials()


PASSES, STAYS, REFUSED, REFUSED_FOR_NOW = (True, False), (False, False), (False, True), (True, True)


@pytest.mark.parametrize(
    ("error", "outlook"),
    [
        (redis.AuthenticationError("invalid username-password pair"), STAYS),
        (redis.ResponseError("NOAUTH Authentication required."), STAYS),
        (redis.ConnectionError("certificate verify failed"), STAYS),
        (redis.exceptions.NoPermissionError("this user has no permissions"), REFUSED),
        (redis.ResponseError("NOPERM from within a script"), REFUSED),
        (redis.exceptions.OutOfMemoryError("command not allowed"), REFUSED),
        (redis.ReadOnlyError("You can't write against a read only replica."), REFUSED_FOR_NOW),
        (redis.TimeoutError("Timeout reading from socket"), PASSES),
        (redis.ConnectionError("Connection refused"), PASSES),
        (redis.exceptions.BusyLoadingError("Redis is loading"), PASSES),
        (redis.exceptions.ClusterDownError("The cluster is down"), PASSES),
        (redis.exceptions.RedisClusterException("no reachable node"), PASSES),
        (ConnectionResetError(104, "reset"), PASSES),
        (IndexError("a fault of the library"), PASSES),
    ],
)
def test_every_error_is_an_unavailable_index_with_a_next_step(error, outlook):
    with pytest.raises(UnavailableError, match="redis://host") as caught:
        raise faults.translate(error, "redis://host") from error
    assert caught.value.hint
    assert (caught.value.retryable, faults.refuses_to_write(caught.value)) == outlook
    assert isinstance(caught.value, DeadlineError) == isinstance(error, redis.TimeoutError)


def test_the_cause_is_told_and_commands_are_not():
    inner = UnavailableError("no AWS credentials")
    outer = redis.AuthenticationError("x")
    outer.__cause__ = inner
    assert faults.translate(outer, "redis://host") is inner
    told = faults.translate(redis.ResponseError("Command # 3 (EVAL secret...) of pipeline caused error: ERR bad"), "u")
    assert "secret" not in str(told)
    assert "ERR bad" in str(told)
    assert not isinstance(told, AccessDeniedError)
