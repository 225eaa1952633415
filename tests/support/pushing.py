"""Images out of a layout into a registry, without another program; and indexers in this process and in others."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading

from support.images import MANIFEST

from floe.indexer.worker import Indexer, IndexerConfig
from floe.ingest.oci.media import Descriptor
from floe.ingest.oci.opening import open_target
from floe.store.index import jobs


def push(built, host, name):
    """Write a BuiltImage to `host`/`name` (with a tag); returns the full name."""
    target = f"{host}/{name}"
    blobs = built.directory / "blobs" / "sha256"
    raw = (blobs / built.manifest_digest.partition(":")[2]).read_bytes()
    manifest = json.loads(raw)
    with contextlib.closing(open_target(target, plain_http=True)) as registry:
        for blob in (*manifest["layers"], manifest["config"]):
            data = (blobs / blob["digest"].partition(":")[2]).read_bytes()
            registry.push_blob(Descriptor(blob["mediaType"], blob["digest"], blob["size"]), lambda data=data: [data])
        registry.put_manifest(raw, MANIFEST)
    return target


def without_tls(folder, *hosts):
    """A registry_config by which these registries are spoken to without TLS."""
    for host in hosts:
        (folder / host).mkdir(parents=True, exist_ok=True)
        (folder / host / "hosts.toml").write_text(f'server = "http://{host}"\n')
    return (folder,)


def worker(catalog, queue, spool, **options):
    """An Indexer of this process; its `_stop` stops it."""
    return Indexer(catalog, queue, IndexerConfig(spool_dir=spool, workers=2, **options), threading.Event())


def open_jobs(catalog, url):
    """The queue beside a catalog's store."""
    return jobs.open_queue(url, catalog.ensure_store().uuid)


def start_indexer(environ, log, *flags, lease=60.0):
    """`floe indexer` as a process, whose jobs are others' after `lease` seconds of silence."""
    program = (
        "import sys; from floe.store.index.redis import queue; from floe.cli.main import main; "
        f"queue.LEASE_SECONDS = {lease}; sys.exit(main(['indexer', *sys.argv[1:]]))"
    )
    with log.open("ab") as output:
        return subprocess.Popen([sys.executable, "-c", program, *flags], env=environ, stdout=output, stderr=output)
