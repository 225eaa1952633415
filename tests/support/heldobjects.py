"""What a store holds, seen past Floe: by key, to be compared, damaged and removed. A folder's, or a bucket's."""

import hashlib

from support import seaweed


class FolderObjects:
    def __init__(self, folder):
        self._folder = folder

    def fingerprints(self):
        """What each object is, by its key."""
        paths = {str(path.relative_to(self._folder)): path for path in self._folder.rglob("*") if path.is_file()}
        return {key: hashlib.md5(p.read_bytes()).hexdigest() for key, p in paths.items() if not key.startswith(".")}

    def read(self, key):
        return (self._folder / key).read_bytes()

    def write(self, key, data):
        path = self._folder / key
        if path.exists():
            path.chmod(0o600)
        path.write_bytes(data)

    def delete(self, key):
        (self._folder / key).unlink()


class BucketObjects:
    """Below `prefix` of a bucket of the shared SeaweedFS."""

    def __init__(self, bucket, prefix):
        self._bucket, self._prefix = bucket, f"{prefix}/"
        self._client = seaweed.running().client()

    def fingerprints(self):
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
        return {
            found["Key"].removeprefix(self._prefix): found["ETag"]
            for page in pages
            for found in page.get("Contents", ())
        }

    def read(self, key):
        with self._client.get_object(Bucket=self._bucket, Key=self._prefix + key)["Body"] as body:
            return body.read()

    def write(self, key, data):
        self._client.put_object(Bucket=self._bucket, Key=self._prefix + key, Body=data)

    def delete(self, key):
        self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)
