"""python -m bench.write: what indexing an image and pushing a model cost, against zstd and against a plain upload.

In interleaved rounds of one run, each into a store that holds nothing:

- `floe image index` of one layer, some 500 MB of Python packages and other files of this machine, as a plain tar and as a
  gzip one, into a folder and into a bucket; against `zstd -3 -T2` of the same tar into a file on the same disk.
- `floe model push` of incompressible weights into a bucket; against obstore's upload of the same file in parallel parts.

Sources are in the page cache. Floe's seconds include the start of its command, and that what it stored is synced to disk;
zstd's do not.
"""

import argparse
import contextlib
import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import obstore

from bench import command, data, servers
from bench.floe_node import FloeNode
from bench.native import run
from bench.report import Results

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.images import BuiltImage, build_oci, make_tar
from support.pythonimage import app_layers
from support.seaweed import Seaweed

MIB = 1 << 20
ZSTD, GUNZIP, UPLOAD = "zstd -3 -T2", "gunzip, zstd -3 -T2", "raw upload"
FOLDER, BUCKET = "floe to a folder", "floe to a bucket"
PART = 8 * MIB  # what Floe's parts have
CONNECTIONS = (2, 4, 8, 16)  # tried for the raw upload; the best is kept


def main() -> int:
    """Make the layer and the weights, measure, print."""
    options = _options()
    return command.run(
        options, lambda stack, work: _Writing(work, stack.enter_context(servers.s3(work)), options).measure()
    )


def _options() -> argparse.Namespace:
    parser = command.parser("write", __doc__, rounds=5, free="20 GiB")
    parser.add_argument("--layer", type=int, default=500, help="least size of the layer in MB (default 500)")
    parser.add_argument("--files", type=int, default=20_000, help="least number of its files (default 20000)")
    parser.add_argument("--size", type=int, default=1024, help="size of the weights in MiB (default 1024)")
    parser.add_argument("--only", choices=("index", "push"), help="measure one of the two alone")
    options = parser.parse_args()
    if shutil.which("zstd") is None:
        parser.error("there is no zstd to compare with: apt install zstd")
    return options


class _Writing:
    """What is measured, in `work` and in buckets of `s3`."""

    def __init__(self, work: Path, s3: Seaweed, options: argparse.Namespace) -> None:
        self._work, self._s3, self._options = work, s3, options
        self._results = Results(
            facts={"kernel": platform.release(), "cores": os.cpu_count(), "machine": platform.machine()}
        )

    def measure(self) -> Results:
        if self._options.only != "push":
            self._index()
        if self._options.only != "index":
            self._push()
        return self._results

    def _index(self) -> None:
        command.say("making the layer")
        tar = self._work / "layer.tar"
        images = _images(self._work, tar, files=self._options.files, size=self._options.layer * 1_000_000)
        plain, packed = images[""], images["gzip"]
        blob = packed.directory / "blobs/sha256" / packed.layers[0]["digest"].partition(":")[2]
        self._results.facts |= {"layer bytes": tar.stat().st_size, "layer bytes, gzip": blob.stat().st_size}
        self._rounds(
            "index a plain layer",
            {ZSTD: lambda: _zstd(tar), **self._floe("image", "index", plain.source)},
            ZSTD,
        )
        self._rounds(
            "index a gzip layer",
            {
                ZSTD: lambda: _zstd(tar),
                GUNZIP: lambda: _gunzip_zstd(blob),
                **self._floe("image", "index", packed.source),
            },
            ZSTD,
        )
        for image in images.values():
            shutil.rmtree(image.directory)
        tar.unlink()

    def _push(self) -> None:
        weights = self._work / "weights"
        command.say("making the weights")
        data.make(weights, large=self._options.size * MIB, files=0)
        upload = _RawUpload(weights / "large.bin", self._s3)
        self._results.facts |= {"weights bytes": data.size(weights), "raw upload's connections": upload.choose()}
        to_bucket = self._floe("model", "push", weights, "bench")
        del to_bucket[FOLDER]
        self._rounds("push weights", {UPLOAD: upload.run, **to_bucket}, UPLOAD)

    def _rounds(self, title: str, runs: dict[str, Callable[[], float]], base: str) -> None:
        command.say(f"{title}: {', '.join(runs)}")
        for work in runs.values():  # what they read is in the page cache then, for all alike
            work()
        self._results.measure(
            title, self._options.rounds, lambda: {name: _quiet(work) for name, work in runs.items()}, base
        )

    def _floe(self, *arguments: str | Path) -> dict[str, Callable[[], float]]:
        return {
            FOLDER: partial(self._run, arguments, to_bucket=False),
            BUCKET: partial(self._run, arguments, to_bucket=True),
        }

    def _run(self, arguments: tuple[str | Path, ...], *, to_bucket: bool) -> float:
        """Seconds of a `floe` command with an empty store, an empty index, and its spool on the same disk."""
        name = f"node-{uuid.uuid4().hex[:8]}"
        folder = self._work / f"{name}-store"
        if to_bucket:
            bucket = self._s3.bucket()
            store = {**self._s3.environment(), "FLOE_STORE": self._s3.url(bucket, "bench")}
        else:
            store = {"FLOE_STORE": f"file://{folder}"}
        node = FloeNode(self._work, name, store)
        begun = time.perf_counter()
        node.floe(*arguments)
        taken = time.perf_counter() - begun
        shutil.rmtree(node.home)
        if to_bucket:
            _drop_bucket(self._s3, bucket)
        else:
            shutil.rmtree(folder)
        return taken


def _images(work: Path, tar: Path, *, files: int, size: int) -> dict[str, BuiltImage]:
    """The layer as the file `tar`, and as images by their compression."""
    layer = make_tar(app_layers("", bulk_files=files, bulk_bytes=size)[-1])
    tar.write_bytes(layer)
    return {kind: build_oci(work / f"image-{kind or 'plain'}", [layer], compression=kind) for kind in ("", "gzip")}


def _zstd(tar: Path) -> float:
    out = tar.with_suffix(".zst")
    begun = time.perf_counter()
    run("zstd", "-3", "-T2", "-q", "-f", tar, "-o", out)
    taken = time.perf_counter() - begun
    out.unlink()
    return taken


def _gunzip_zstd(blob: Path) -> float:
    out = blob.with_name("out.zst")
    begun = time.perf_counter()
    with subprocess.Popen(["gzip", "-dc", blob], stdout=subprocess.PIPE) as gunzip:
        subprocess.run(["zstd", "-3", "-T2", "-q", "-f", "-o", out], stdin=gunzip.stdout, check=True)
    taken = time.perf_counter() - begun
    out.unlink()
    return taken


class _RawUpload:
    """A file sent to a bucket by obstore, several parts at once: the limit for a push."""

    def __init__(self, source: Path, s3: Seaweed) -> None:
        self._source, self._s3 = source, s3
        self._connections = CONNECTIONS[0]

    def choose(self) -> int:
        """Try how many connections are best, and keep to that."""
        seconds = {}
        for self._connections in CONNECTIONS:
            seconds[self._connections] = min(_quiet(self.run) for _ in range(2))
        self._connections = min(seconds, key=seconds.__getitem__)
        return self._connections

    def run(self) -> float:
        """Seconds to send all of it."""
        bucket = self._s3.bucket()
        access, secret = servers.KEYS
        config: dict[str, Any] = {
            "endpoint": self._s3.endpoint,
            "region": "us-east-1",
            "access_key_id": access,
            "secret_access_key": secret,
            "virtual_hosted_style_request": False,
        }
        begun = time.perf_counter()
        store = obstore.store.S3Store(bucket, config=config, client_options={"allow_http": True})
        obstore.put(
            store, "large.bin", self._source, use_multipart=True, chunk_size=PART, max_concurrency=self._connections
        )
        taken = time.perf_counter() - begun
        _drop_bucket(self._s3, bucket)
        return taken


def _drop_bucket(s3: Seaweed, bucket: str) -> None:
    client = s3.client()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for item in page.get("Contents", ()):
            client.delete_object(Bucket=bucket, Key=item["Key"])
    with contextlib.suppress(client.exceptions.NoSuchBucket):  # SeaweedFS may drop one that became empty
        client.delete_bucket(Bucket=bucket)
    client.close()


def _quiet(work: Callable[[], float]) -> float:
    """`work` once what was written before it lies on the disk."""
    os.sync()
    return work()


if __name__ == "__main__":
    sys.exit(main())
