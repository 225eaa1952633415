"""What leaves a node holds no secrets, whatever writes them and wherever they stand."""

import json

import pytest

from floe.cli.redact import MARK, Redactor, is_secret_name, secrets_in_address, secrets_of
from floe.cli.settings import KEYS

SECRET = 'p@ss/w"ord+1'


@pytest.mark.parametrize(
    "text",
    [
        SECRET,
        f"redis://u:{SECRET}@host:6379",
        "connecting to rediss://u:p%40ss%2Fw%22ord%2B1@host:6379",
        json.dumps({"x": SECRET}),
        "cEBzcy93Im9yZCsx in base64",
        f"{ {'x': SECRET}!r}",
    ],
)
def test_known_secrets_go_in_every_form(text):
    clean = Redactor([SECRET]).text(text)
    assert MARK in clean
    for form in (SECRET, "p%40ss", "p@ss", "cEBzcy93Im9yZCsx"):
        assert form not in clean


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("GET https://user:hunter22@host/path", "hunter22"),
        ("GET https://ghp_abcdefgh12345678@host/path", "ghp_abcdefgh12345678"),
        ("redis://:hunter/22@host:6379 failed", "hunter"),
        ("Authorization: Bearer abc.def-ghi", "abc.def-ghi"),
        ("authorization: Basic dXNlcjpwdw==", "dXNlcjpwdw"),
        ("https://b.s3/k?X-Amz-Signature=0123abcd&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F2026", "0123abcd"),
        ("https://b.s3/k?X-Amz-Signature=0123abcd&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F2026", "AKIAIOSFODNN7EXAMPLE"),
        ("x-amz-security-token: FwoGZXIvYXdzEBYaD", "FwoGZXIvYXdzEBYaD"),
        ("the key AKIAIOSFODNN7EXAMPLE was refused", "AKIAIOSFODNN7EXAMPLE"),
        ('{"password": "hunter22", "a": 1}', "hunter22"),
        ("password='hunter 22' next", "hunter 22"),
        ("db_password = hunter22", "hunter22"),
        ("api-key=hunter22&x=1", "hunter22"),
        ("token eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc-DEF", "eyJzdWIiOiIxIn0"),
        ("-----BEGIN PRIVATE KEY-----\nMC4CAQAw\n-----END PRIVATE KEY-----", "MC4CAQAw"),
        ("-----BEGIN EC PRIVATE KEY-----\nMC4CAQAw cut off", "MC4CAQAw"),
        ("HF hf_abcdefghijkl", "hf_abcdefghijkl"),
        ("dbpass=hunter22", "hunter22"),
        ("token=true22", "true22"),
        ('passphrase: "on the hill"', "hill"),
        ("passphrase='off you go'", "go"),
        ("token: auto-hunter22", "auto-hunter22"),
    ],
)  # fmt: skip
def test_what_looks_like_a_secret_goes(text, secret):
    clean = Redactor([]).text(text)
    assert secret not in clean
    assert MARK in clean


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/prefix?endpoint=http://127.0.0.1:9000&region=eu",
        "image registry.example/app@sha256:0123456789abcdef",
        "rediss://host:6379?ca=/etc/ca.pem",
        "layer sha256:abc is unpacked the ordinary way, reason timeout",
        "cache_bypass = auto, FLOE_CACHE_BYPASS=slow, bypass: hunter22",
        'TOKENIZERS_PARALLELISM=false; {"token_cache": "off", "use_token": true}',
        "?token=none&a=b",
        "is_token: never",
    ],
)
def test_what_is_none_stays(text):
    assert Redactor([]).text(text) == text


def test_values_go_by_their_names_and_keys_by_their_text():
    found = Redactor(["hunter22"]).value(
        {"api_token": "x1", "list": [{"secret": "y1"}, 7, None], "of hunter22": "a", "key": "k8s.io/1/abc"}
    )
    assert found == {"api_token": MARK, "list": [{"secret": MARK}, 7, None], f"of {MARK}": "a", "key": "k8s.io/1/abc"}


def test_no_setting_is_taken_for_a_secret_by_its_name():
    assert [key for key in KEYS if is_secret_name(key) or is_secret_name(f"FLOE_{key.upper()}")] == []
    assert secrets_of({"PWD": "/work", "OLDPWD": "/home", "DB_PWD": "hunter22"}) == {"hunter22"}
    assert Redactor([]).value({"google-auth": "2.40.3", "pwd": "hunter22"}) == {"google-auth": "2.40.3", "pwd": MARK}
    assert is_secret_name("DB_PASS")
    assert is_secret_name("STANDBYPASSWORD")


def test_values_that_many_a_setting_has_are_no_secrets():
    known = secrets_of({"TOKENIZERS_PARALLELISM": "false", "USE_AUTH": "Auto", "FLOE_CACHE_BYPASS": "slow disk"})
    text = "completion false, cache_bypass auto: a slow disk"
    clean = Redactor(known)
    assert clean.text(text) == text
    assert clean.value({"tokenizer": "false", "token": "falsehood"}) == {"tokenizer": "false", "token": MARK}


def test_secrets_are_found_in_an_environment():
    environ = {
        "AWS_SECRET_ACCESS_KEY": "one",
        "GITHUB_TOKEN": "two",
        "FLOE_INDEX": "rediss://u:th%72ee@host:6379",
        "FLOE_SIGNING_KEY": "/etc/floe/key",
        "HOME": "/root",
    }
    assert secrets_of(environ) == {"one", "two", "th%72ee", "three"}
    assert secrets_in_address("https://host/path") == set()
    assert is_secret_name("AWS_SESSION_TOKEN")
    assert not is_secret_name("FLOE_SIGNING_KEY")
