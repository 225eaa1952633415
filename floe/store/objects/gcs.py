"""An object store in a bucket of Google Cloud Storage: obstore for objects, plain requests for lists and parts.

Conditional puts go by the object's generation, so a version that was put back counts as changed. It has been run
against the emulator of the tests (tests/support/fakegcs.py), not against Google.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any
from urllib.parse import quote

from obstore.store import GCSStore as Bucket

from floe.store.objects.address import read_file
from floe.store.objects.answers import Place
from floe.store.objects.base import ObjectInfo
from floe.store.objects.bucket import BucketStore
from floe.store.objects.gcs_address import GCSAddress
from floe.store.objects.gcs_client import GCSClient
from floe.store.objects.gcs_credentials import TokenProvider
from floe.store.objects.http_ranges import Location
from floe.store.objects.keys import check_prefix
from floe.store.objects.multipart import Uploads

_PAGE = 1000  # objects listed in one request, the most there are


class GCSStore(BucketStore):
    """Objects below `gs://bucket/prefix?service_account=FILE&endpoint=URL&ca=FILE`; BadInputError for other addresses.

    Credentials: the key file, else application default credentials. An `http://` endpoint is taken for an emulator: it
    gets none, unless a key file is named. Nothing is sent before the first use.
    """

    def __init__(self, url: str) -> None:
        address = GCSAddress.parse(url)
        shown = f"gs://{address.bucket}" + (f"/{address.prefix}" if address.prefix else "")
        self.address = address
        self.tokens = TokenProvider(address, shown)
        config: dict[str, Any] = {} if address.endpoint is None else {"base_url": address.endpoint}
        if address.service_account is not None:
            read_file("service_account", address.service_account)  # so that a wrong path is told at once
        place = Place(shown, address.bucket, address.endpoint or "Google")
        super().__init__(place, self.tokens, Bucket, address.prefix, config, base=address.endpoint, ca=address.ca)
        self.client = GCSClient(self, address, self.tokens)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See ObjectStore.list. Not through obstore, whose lists lack the generations."""
        folder = check_prefix(prefix)
        strip = len(self.client.full_key(""))
        start = self.client.full_key(f"{folder}/" if folder else "")
        fields = "nextPageToken,items(name,size,generation,timeCreated)"
        params = {"prefix": start, "maxResults": str(_PAGE), "fields": fields}
        while True:
            path = f"b/{quote(self.address.bucket, safe='')}/o"
            page = self.client.json("GET", path, prefix or "the store", params=params)
            for item in page.get("items", ()):
                if item["name"].endswith("/"):  # a folder, as consoles make them
                    continue
                created = datetime.fromisoformat(item["timeCreated"].replace("Z", "+00:00"))
                yield ObjectInfo(item["name"][strip:], int(item["size"]), str(item["generation"]), created.timestamp())
            if not (token := page.get("nextPageToken")):
                return
            params["pageToken"] = token

    def close(self) -> None:
        """See ObjectStore.close."""
        super().close()
        self.client.close()

    def _locate(self, key: str) -> Location:
        return Location(*self.client.located(self.client.full_key(key)))

    def _version(self, meta: Any) -> str:
        return str(meta["version"])

    def _condition(self, version: str) -> dict[str, str]:
        return {"version": version}

    def _open_uploads(self) -> Uploads:
        from floe.store.objects.gcs_uploads import GCSUploads  # noqa: PLC0415 - for large files only

        return GCSUploads(self.client)
