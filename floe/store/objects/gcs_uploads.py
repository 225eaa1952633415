"""Google Cloud Storage's multipart uploads: the XML API, whose requests are S3's with Google's tokens.

https://cloud.google.com/storage/docs/multipart-uploads
"""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from datetime import datetime

from floe.store.errors import UnavailableError
from floe.store.objects.gcs_client import GCSClient
from floe.store.objects.multipart import Body, StoredPart, Upload

_NAMESPACE = re.compile(r"^\{[^}]*\}")


class GCSUploads:
    """See multipart.Uploads."""

    def __init__(self, client: GCSClient) -> None:
        self._client = client

    def find(self, prefix: str) -> list[Upload]:
        """See Uploads.find."""
        full = self._client.full_key
        strip = len(full(""))
        params = {"uploads": "", "prefix": full(prefix)}
        found: list[Upload] = []
        for page in self._pages(prefix, None, params, ("NextKeyMarker", "NextUploadIdMarker")):
            found += [
                Upload(_text(item, "Key")[strip:], _text(item, "UploadId"), _time(_text(item, "Initiated")))
                for item in _all(page, "Upload")
            ]
        return found

    def create(self, key: str) -> str:
        """See Uploads.create."""
        headers = {"Content-Length": "0", "Content-Type": "application/octet-stream"}
        return _text(_parse(self._send("POST", key, params={"uploads": ""}, headers=headers)), "UploadId")

    def parts(self, key: str, upload: str) -> list[StoredPart]:
        """See Uploads.parts."""
        found: list[StoredPart] = []
        for page in self._pages(key, self._client.full_key(key), {"uploadId": upload}, ("NextPartNumberMarker",)):
            found += [
                StoredPart(int(_text(p, "PartNumber")), int(_text(p, "Size")), _text(p, "ETag").strip('"'))
                for p in _all(page, "Part")
            ]
        return found

    def put(self, key: str, upload: str, number: int, body: Body) -> StoredPart:
        """See Uploads.put."""
        answer = self._client.xml(
            "PUT",
            key,
            self._client.full_key(key),
            params={"partNumber": str(number), "uploadId": upload},
            headers={"Content-MD5": base64.b64encode(body.md5()).decode()},
            data=body,
        )
        return StoredPart(number, body.size, answer.headers["ETag"].strip('"'))

    def complete(self, key: str, upload: str, parts: list[StoredPart]) -> None:
        """See Uploads.complete."""
        root = ET.Element("CompleteMultipartUpload")
        for part in parts:
            listed = ET.SubElement(root, "Part")
            ET.SubElement(listed, "PartNumber").text = str(part.number)
            ET.SubElement(listed, "ETag").text = f'"{part.etag}"'
        self._send("POST", key, params={"uploadId": upload}, data=ET.tostring(root))

    def abort(self, key: str, upload: str) -> None:
        """See Uploads.abort."""
        self._send("DELETE", key, params={"uploadId": upload})

    def close(self) -> None:
        """See Uploads.close; the client is the store's."""

    def _send(
        self,
        method: str,
        key: str,
        *,
        params: dict[str, str],
        headers: dict[str, str] | None = None,
        data: bytes | None = None,
    ) -> bytes:
        full = self._client.full_key(key)
        return self._client.xml(method, key, full, params=params, headers=headers, data=data).content

    def _pages(
        self, key: str, full_key: str | None, params: dict[str, str], markers: tuple[str, ...]
    ) -> Iterator[ET.Element]:
        while True:
            page = _parse(self._client.xml("GET", key, full_key, params=params).content)
            yield page
            if _text(page, "IsTruncated", "false").lower() != "true":
                return
            # NextKeyMarker is the next request's key-marker.
            names = {marker: re.sub(r"(?<!^)(?=[A-Z])", "-", marker.removeprefix("Next")).lower() for marker in markers}
            params = {**params, **{names[marker]: _text(page, marker) for marker in markers}}


def _parse(data: bytes) -> ET.Element:
    try:
        root = ET.fromstring(data)  # noqa: S314 - by the server that we trust with our data
    except ET.ParseError as error:
        raise UnavailableError(f"the server's answer is no XML: {error}") from error
    for element in root.iter():
        element.tag = _NAMESPACE.sub("", element.tag)
    return root


def _all(element: ET.Element, name: str) -> Iterator[ET.Element]:
    return element.iter(name)


def _text(element: ET.Element, name: str, otherwise: str | None = None) -> str:
    found = element.findtext(name, otherwise)
    if found is None:
        raise UnavailableError(f"the server's answer lacks {name}", hint="try again")
    return found


def _time(text: str) -> datetime:
    return datetime.fromisoformat(re.sub(r"\.\d+", "", text).replace("Z", "+00:00"))
