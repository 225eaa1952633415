"""Buckets themselves: whether one is there, and making one that is not."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from floe.store.errors import AlreadyExistsError, BadInputError, ConflictError, FloeError, NotFoundError
from floe.store.objects.gcs import GCSStore
from floe.store.objects.s3 import S3Store

_DAYS = 7  # after which the bucket's own rule drops an upload that nobody went on with


def ensure_s3_bucket(store: S3Store) -> bool:
    """Make the bucket unless it is there; whether it was made. A new one gets a rule against abandoned uploads.

    AlreadyExistsError: its name is taken. AccessDeniedError and UnavailableError as for objects.
    """
    from botocore.exceptions import ClientError  # noqa: PLC0415 - boto3 is slow, and for administration only

    from floe.store.objects.s3_client import S3Client, answer_of  # noqa: PLC0415 - likewise

    client = S3Client(store)
    name = store.address.bucket

    def create(boto: Any) -> bool:
        place = {} if store.region in (None, "us-east-1") else {"LocationConstraint": store.region}
        try:
            boto.create_bucket(Bucket=name, **({"CreateBucketConfiguration": place} if place else {}))
        except ClientError as error:
            code = answer_of(error).code
            if code == "BucketAlreadyOwnedByYou":  # since we looked
                return False
            if code == "BucketAlreadyExists":
                raise AlreadyExistsError(
                    f"the bucket name {name} is taken by somebody else", hint="choose another name"
                ) from None
            raise
        return True

    def add_rule(boto: Any) -> None:
        rule = {
            "ID": "floe-uploads",
            "Status": "Enabled",
            "Filter": {"Prefix": ""},
            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": _DAYS},
        }
        boto.put_bucket_lifecycle_configuration(Bucket=name, LifecycleConfiguration={"Rules": [rule]})

    what = f"the bucket {name}"
    try:
        try:
            client.call(what, lambda boto: boto.head_bucket(Bucket=name), writing=False)
        except NotFoundError:
            made = client.call(what, create)
            if made:
                with suppress(FloeError):  # a convenience that not every server offers
                    client.call(what, add_rule)
            return made
    finally:
        client.close()
    return False


def ensure_gcs_bucket(store: GCSStore, project: str | None) -> bool:
    """The same for Google; a new bucket belongs to `project`, which must be given for it."""
    name = store.address.bucket
    what = f"the bucket {name}"
    try:
        store.client.json("GET", f"b/{name}", what)
    except NotFoundError as error:
        if project is None:
            raise BadInputError(
                f"there is no bucket {name}, and a new one must belong to a project", hint="give --project NAME"
            ) from error
    else:
        return False
    try:
        store.client.json("POST", "b", what, params={"project": project}, json={"name": name})
    except ConflictError as error:
        raise AlreadyExistsError(f"the bucket name {name} is taken", hint="choose another name") from error
    return True
