"""S3's multipart uploads, through boto3.

On AWS, and wherever a KMS key is named, parts carry a SHA-256: an ETag of an encrypted part is no checksum. Elsewhere
they carry an MD5, which every S3 server knows, and which is the ETag; and a CRC-32, which alone is sent, at a tenth of the
CPU of a push, once the server has answered that it checks it.
"""

from __future__ import annotations

import base64
from typing import Any

from floe.store.errors import AccessDeniedError, CancelledError, FloeError, NotFoundError
from floe.store.objects.multipart import Body, StoredPart, Upload
from floe.store.objects.s3 import S3Store
from floe.store.objects.s3_client import S3Client


class S3Uploads:
    """See multipart.Uploads."""

    def __init__(self, store: S3Store) -> None:
        self._client = S3Client(store)
        self._kms_key = store.address.kms_key
        self._sha256 = store.address.endpoint is None or self._kms_key is not None
        self._crc32: bool | None = None  # whether the server checks it; None: no part was sent yet

    def find(self, prefix: str) -> list[Upload]:
        """See Uploads.find. MinIO tells only those of a whole key."""
        strip = len(self._client.full_key(""))
        found: list[Upload] = []
        more: dict[str, Any] = {}
        while True:
            page = self._call(prefix, "list_multipart_uploads", writing=False, Prefix=self._full(prefix), **more)
            found += [Upload(u["Key"][strip:], u["UploadId"], u["Initiated"]) for u in page.get("Uploads", ())]
            if not page.get("IsTruncated"):
                return found
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def create(self, key: str) -> str:
        """See Uploads.create."""
        options: dict[str, Any] = {}
        if self._kms_key is not None:
            options = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": self._kms_key}
        if self._sha256:
            options["ChecksumAlgorithm"] = "SHA256"
        return str(self._call(key, "create_multipart_upload", Key=self._full(key), **options)["UploadId"])

    def parts(self, key: str, upload: str) -> list[StoredPart]:
        """See Uploads.parts."""
        found: list[StoredPart] = []
        more: dict[str, int] = {}
        while True:
            page = self._call(key, "list_parts", writing=False, Key=self._full(key), UploadId=upload, **more)
            found += [
                StoredPart(p["PartNumber"], p["Size"], p["ETag"].strip('"'), p.get("ChecksumSHA256", ""))
                for p in page.get("Parts", ())
            ]
            if not page.get("IsTruncated"):
                return found
            more = {"PartNumberMarker": page["NextPartNumberMarker"]}

    def put(self, key: str, upload: str, number: int, body: Body) -> StoredPart:
        """See Uploads.put."""
        if self._sha256:
            sha256 = body.sha256()
            return self._put(key, upload, number, body, {"ChecksumSHA256": sha256})[0]
        md5 = {} if self._crc32 else _md5(body)
        if self._crc32 is not False:
            crc32 = body.crc32()
            try:
                part, answer = self._put(key, upload, number, body, {**md5, "ChecksumCRC32": crc32})
            except (AccessDeniedError, NotFoundError, CancelledError):
                raise
            except FloeError:  # there are servers that refuse what they do not know
                if self._crc32:
                    raise
                answer = {}
            self._crc32 = answer.get("ChecksumCRC32") == crc32
            if answer and (md5 or self._crc32):
                return part
        return self._put(key, upload, number, body, md5 or _md5(body))[0]

    def _put(
        self, key: str, upload: str, number: int, body: Body, checksums: dict[str, Any]
    ) -> tuple[StoredPart, dict[str, Any]]:
        answer = self._call(
            key,
            "upload_part",
            Key=self._full(key),
            UploadId=upload,
            PartNumber=number,
            Body=body,
            ContentLength=body.size,
            **checksums,
        )
        sha256 = checksums.get("ChecksumSHA256", "")
        return StoredPart(number, body.size, answer["ETag"].strip('"'), sha256), answer

    def complete(self, key: str, upload: str, parts: list[StoredPart]) -> None:
        """See Uploads.complete."""
        listed = [
            {
                "PartNumber": part.number,
                "ETag": f'"{part.etag}"',
                **({"ChecksumSHA256": part.sha256} if part.sha256 else {}),
            }
            for part in parts
        ]
        self._call(
            key, "complete_multipart_upload", Key=self._full(key), UploadId=upload, MultipartUpload={"Parts": listed}
        )

    def abort(self, key: str, upload: str) -> None:
        """See Uploads.abort."""
        self._call(key, "abort_multipart_upload", Key=self._full(key), UploadId=upload)

    def close(self) -> None:
        """See Uploads.close."""
        self._client.close()

    def _full(self, key: str) -> str:
        return self._client.full_key(key)

    def _call(self, what: str, operation: str, *, writing: bool = True, **arguments: Any) -> Any:
        def work(client: Any) -> Any:
            if isinstance(body := arguments.get("Body"), Body):
                body.seek(0)  # a refused attempt may have read it
            return getattr(client, operation)(Bucket=self._client.bucket, **arguments)

        return self._client.call(what, work, writing=writing)


def _md5(body: Body) -> dict[str, str]:
    return {"ContentMD5": base64.b64encode(body.md5()).decode()}
