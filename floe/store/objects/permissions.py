"""What readers and writers must be allowed to do with a bucket, in the words of its service, and how to allow it. Pure."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

LIST, GET, RANGE, PUT, CONDITIONAL, MULTIPART = (
    "list",
    "get",
    "ranged get",
    "put",
    "conditional put",
    "multipart upload",
)
ABORT, RESUME, DELETE = "abort an upload", "resume an upload", "delete"
READER, WRITER, REMOVER = "reader", "writer", "remover"

# Operation -> the role that needs it; without `ABORT` and `RESUME` a writer works, only an upload that was cut off
# begins anew, and what it left stays.
ROLES = {
    LIST: READER,
    GET: READER,
    RANGE: READER,
    PUT: WRITER,
    CONDITIONAL: WRITER,
    MULTIPART: WRITER,
    ABORT: WRITER,
    RESUME: WRITER,
    DELETE: REMOVER,
}
OPTIONAL = frozenset({ABORT, RESUME})

_S3 = {
    LIST: ("s3:ListBucket",),
    GET: ("s3:GetObject",),
    RANGE: ("s3:GetObject",),
    PUT: ("s3:PutObject",),
    CONDITIONAL: ("s3:PutObject",),
    MULTIPART: ("s3:PutObject",),
    ABORT: ("s3:AbortMultipartUpload",),
    RESUME: ("s3:ListBucketMultipartUploads", "s3:ListMultipartUploadParts"),
    DELETE: ("s3:DeleteObject",),
}
_KMS = ("kms:Decrypt", "kms:GenerateDataKey")
# Google counts the replacement of an object as its deletion and creation.
_GOOGLE = {
    LIST: ("storage.objects.list",),
    GET: ("storage.objects.get",),
    RANGE: ("storage.objects.get",),
    PUT: ("storage.objects.create", "storage.objects.delete"),
    CONDITIONAL: ("storage.objects.create", "storage.objects.delete"),
    MULTIPART: ("storage.multipartUploads.create", "storage.objects.create"),
    ABORT: ("storage.multipartUploads.abort",),
    RESUME: ("storage.multipartUploads.list", "storage.multipartUploads.listParts"),
    DELETE: ("storage.objects.delete",),
}
_BY_SCHEME = {"s3": _S3, "gs": _GOOGLE}


def permissions(url: str, operation: str) -> tuple[str, ...]:
    """What `operation` on the store at `url` asks for; nothing that has a name in a folder."""
    return _BY_SCHEME.get(url.partition("://")[0], {}).get(operation, ())


def missing_policy(
    url: str, denied: Collection[str], *, kms_key: str | None = None, kms_denied: bool = False
) -> dict[str, Any] | None:
    """What would allow the `denied` operations: an IAM policy for S3, a list of permissions for Google.

    None when nothing is denied, or the store is no bucket. `kms_denied`: the use of the key `kms_key` was, besides.
    """
    scheme, _, rest = url.partition("://")
    actions = sorted({action for operation in denied for action in permissions(url, operation)})
    if not (actions or kms_denied) or scheme not in _BY_SCHEME:
        return None
    bucket, _, prefix = rest.partition("/")
    if scheme == "gs":
        return {"bucket": bucket, "permissions": actions}
    of_bucket = [action for action in actions if action.startswith("s3:ListBucket")]
    of_objects = [action for action in actions if action not in of_bucket]
    statements = []
    if of_bucket:
        statements.append(_statement(of_bucket, f"arn:aws:s3:::{bucket}"))
    if of_objects:
        statements.append(
            _statement(of_objects, f"arn:aws:s3:::{bucket}/{prefix}/*" if prefix else f"arn:aws:s3:::{bucket}/*")
        )
    if kms_denied:
        statements.append(_statement(list(_KMS), kms_key if kms_key and kms_key.startswith("arn:") else "*"))
    return {"Version": "2012-10-17", "Statement": statements}


def _statement(actions: list[str], resource: str) -> dict[str, Any]:
    return {"Effect": "Allow", "Action": actions, "Resource": resource}
