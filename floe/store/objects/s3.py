"""An object store in an S3 bucket: obstore for all requests but multipart uploads, which boto3 makes so that they resume.

Conditional puts are If-None-Match and If-Match on ETags. AWS honours both; SeaweedFS 4.48 does too, as the contract
suite shows. For a server that refuses these headers the store compares before it writes and looks again afterwards; a
server that ignores them lets the last writer win, and `floe store check` says so.
An ETag is a hash of the content, so a version that was replaced and put back counts as unchanged.
"""

from __future__ import annotations

import logging
import threading
from datetime import timedelta
from typing import Any

import obstore
from cachetools import TTLCache
from obstore.store import S3Store as Bucket

from floe.store.errors import ConflictError, NotFoundError, RangeError, StoreMissingError, UnsupportedError
from floe.store.ids import Buffer
from floe.store.objects.answers import Place
from floe.store.objects.bucket import BucketStore, check_threads
from floe.store.objects.http_ranges import Location
from floe.store.objects.multipart import Uploads
from floe.store.objects.s3_address import S3Address
from floe.store.objects.s3_credentials import CredentialProvider, default_region

_log = logging.getLogger(__name__)

_SIGNED, _SIGNED_FOR = 4096, timedelta(minutes=15)  # URLs kept, and how long one is valid


class S3Store(BucketStore):
    """Objects below `s3://bucket/prefix?endpoint=URL&region=R&path_style=true&ca=FILE&kms_key=KEY`.

    Credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, else boto3's chain. Nothing is sent before the first use.
    BadInputError for another address, or a CA file that cannot be read.
    """

    def __init__(self, url: str) -> None:
        address = S3Address.parse(url)
        shown = f"s3://{address.bucket}" + (f"/{address.prefix}" if address.prefix else "")
        self.address = address
        self.region = address.region or default_region()
        self.credentials = CredentialProvider(shown)
        self.refuses_conditions = False
        # One by one: a bulk request says "denied" in an answer that is a success, in words that differ.
        config: dict[str, Any] = {"virtual_hosted_style_request": not address.path_style, "disable_bulk_delete": True}
        endpoint = address.request_endpoint
        if endpoint is not None:
            config["endpoint"] = endpoint
        if self.region:
            config["region"] = self.region
        if address.kms_key is not None:
            config |= {"server_side_encryption": "aws:kms", "sse_kms_key_id": address.kms_key}
        place = Place(shown, address.bucket, address.endpoint or "AWS")
        self._signed: TTLCache[str, tuple[Any, str]] = TTLCache(_SIGNED, _SIGNED_FOR.total_seconds() / 3)
        self._signing = threading.Lock()
        super().__init__(place, self.credentials, Bucket, address.prefix, config, base=endpoint, ca=address.ca)

    def put_if(self, key: str, data: Buffer, version: str | None) -> str:
        """See ObjectStore.put_if; not atomic with a server that refuses conditions, see the module."""
        if not self.refuses_conditions:
            try:
                return super().put_if(key, data, version)
            except UnsupportedError as error:
                check_threads()  # that is no word of the server's
                self.refuses_conditions = True
                _log.warning("%s; of two writers of one ref at the same moment one may be lost unseen", error)
        return self._put_compared(key, data, version)

    def _put_compared(self, key: str, data: Buffer, version: str | None) -> str:
        """Compare, write, and look whether another writer came in between and won."""
        try:
            found: str | None = self.head(key).version
        except StoreMissingError:
            raise
        except NotFoundError:
            found = None
        if found != version:
            raise ConflictError(f"{key} in {self.url} was changed by somebody else")
        self.put(key, data)
        written, fresh = self.get_versioned(key)
        if written != bytes(data):
            raise ConflictError(f"{key} in {self.url} was changed by somebody else at the same moment")
        return fresh

    def _locate(self, key: str) -> Location:
        """A signed URL, the same one for some minutes, not one for each request."""
        opened = self._opened
        with self._signing:
            found = self._signed.get(key)
            if found is None or found[0] is not opened:
                try:
                    url = obstore.sign(opened.signer, "GET", key, expires_in=_SIGNED_FOR)
                except (obstore.exceptions.BaseError, ValueError) as error:
                    raise RangeError(f"{key} has no signed URL: {type(error).__name__}") from None
                found = self._signed[key] = (opened, str(url))
        return Location(found[1], {})

    def _version(self, meta: Any) -> str:
        return str(meta["e_tag"])

    def _condition(self, version: str) -> dict[str, str]:
        return {"e_tag": version}

    def _open_uploads(self) -> Uploads:
        from floe.store.objects.s3_uploads import S3Uploads  # noqa: PLC0415 - boto3 is slow, and for large files only

        return S3Uploads(self)
