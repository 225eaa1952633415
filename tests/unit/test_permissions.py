"""The policies that `floe store check` proposes, and the addresses they are for."""

import pytest

from floe.store.objects.answers import Answer, Place, error_of, from_http, from_text
from floe.store.objects.gcs_address import GCSAddress
from floe.store.objects.permissions import DELETE, GET, LIST, PUT, RANGE, RESUME, missing_policy, permissions

ARN = "arn:aws:kms:eu-west-1:1:key/k"


def statements(url, denied, **options):
    found = missing_policy(url, denied, **options)
    return [(s["Effect"], s["Action"], s["Resource"]) for s in found["Statement"]]


def test_nothing_denied_needs_no_policy():
    assert missing_policy("s3://b/p", []) is None
    assert missing_policy("file:///a", [PUT]) is None
    assert permissions("file:///a", PUT) == ()


def test_bucket_and_objects_are_separate_statements():
    assert statements("s3://b/p/q", [LIST, GET, RANGE, DELETE]) == [
        ("Allow", ["s3:ListBucket"], "arn:aws:s3:::b"),
        ("Allow", ["s3:DeleteObject", "s3:GetObject"], "arn:aws:s3:::b/p/q/*"),
    ]
    assert statements("s3://b", [RESUME]) == [
        ("Allow", ["s3:ListBucketMultipartUploads"], "arn:aws:s3:::b"),
        ("Allow", ["s3:ListMultipartUploadParts"], "arn:aws:s3:::b/*"),
    ]


def test_a_key_that_is_refused_is_what_is_missing():
    allowed = ["kms:Decrypt", "kms:GenerateDataKey"]
    assert statements("s3://b", [], kms_key=ARN, kms_denied=True) == [("Allow", allowed, ARN)]
    assert statements("s3://b", [LIST], kms_key="alias/k", kms_denied=True) == [
        ("Allow", ["s3:ListBucket"], "arn:aws:s3:::b"),
        ("Allow", allowed, "*"),
    ]


def test_google_gets_a_list_of_permissions():
    assert missing_policy("gs://b/p", [LIST, PUT]) == {
        "bucket": "b",
        "permissions": ["storage.objects.create", "storage.objects.delete", "storage.objects.list"],
    }


def test_addresses_of_google_s_buckets():
    assert GCSAddress.parse("gs://bucket") == GCSAddress("bucket", "")
    assert GCSAddress.parse("gs://my_bucket.example.com/a/b/").prefix == "a/b"
    full = GCSAddress.parse("gs://bucket/a?endpoint=http%3A%2F%2Fh%3A1%2F&service_account=%2Fk.json&ca=%2Fca.pem")
    assert (full.base, str(full.service_account), str(full.ca)) == ("http://h:1", "/k.json", "/ca.pem")
    assert GCSAddress.parse("gs://bucket").base == "https://storage.googleapis.com"


@pytest.mark.parametrize(
    ("url", "anonymous"),
    [
        ("gs://bucket", False),
        ("gs://bucket?endpoint=https://h", False),
        ("gs://bucket?endpoint=http://h", True),
        ("gs://bucket?endpoint=http://h&service_account=/k", False),
    ],
)
def test_only_an_emulator_gets_no_credentials(url, anonymous):
    assert GCSAddress.parse(url).is_emulator == anonymous


def test_the_same_refusal_in_three_tongues():
    xml = "<Error><Code>AccessDenied</Code><Message>No way.</Message></Error>"
    rust = f"Generic S3 error: Server returned non-2xx status code: 403 Forbidden: {xml}\n\nDebug source:\n..."
    assert from_text(rust) == from_http(403, xml) == Answer(403, "AccessDenied", "AccessDenied: No way")


def test_a_key_that_worked_and_is_unknown_now_was_replaced():
    place = Place("s3://b", "b", "AWS")
    answer = Answer(403, "InvalidAccessKeyId", "InvalidAccessKeyId")
    before = error_of(answer, "x", place, writing=False)
    after = error_of(answer, "x", place, writing=False, proven=True)
    assert (before.retryable, after.retryable) == (False, True)
