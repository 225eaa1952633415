"""The policies of install/identity/, enforced before a real S3 server: each role can do its work, and no more."""

import contextlib
import json
import os
import random
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from support import seaweed
from support.floe_node import Node
from support.images import build_oci, files
from support.pushing import open_jobs
from support.redis_server import standalone
from support.s3gate import S3Gate

from floe.indexer.retention import Retention
from floe.ingest.oci.image import index_resolved, open_source
from floe.ingest.oci.source import resolve
from floe.store.catalog import Catalog
from floe.store.errors import AccessDeniedError
from floe.store.index import open_index
from floe.store.objects import open_store, permissions
from floe.store.profiles import ProfileStore, model_source

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
IDENTITY = Path(__file__).parents[2] / "install" / "identity"
SIZE = 12 << 20  # two parts
PREFIX = "team/models"


def policy(name, bucket):
    """Whether IAM's rules of one file allow a request."""
    text = (IDENTITY / name).read_text().replace("BUCKET", bucket).replace("PREFIX", PREFIX)
    statements = json.loads(text)["Statement"]

    def allows(action, bucket, key):
        resource = f"arn:aws:s3:::{bucket}/{key}" if key else f"arn:aws:s3:::{bucket}"
        return any(
            action in one["Action"]
            and any(
                fnmatchcase(resource, p)
                for p in ([one["Resource"]] if isinstance(one["Resource"], str) else one["Resource"])
            )
            for one in statements
        )

    return allows


@pytest.fixture
def world(tmp_path, monkeypatch):
    """(node, become): `become(file)` gives the node the rights of that policy."""
    server = seaweed.running()
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    bucket = server.bucket()
    with S3Gate(server, {seaweed.ACCESS_KEY: None}) as gate:
        node = Node(tmp_path)
        node.environ |= {**server.environment(), "FLOE_STORE": gate.address(bucket, PREFIX), "FLOE_STORE_TIMEOUT": "10"}
        node.store = f"s3://{bucket}/{PREFIX}?endpoint={server.endpoint}&region=us-east-1"

        def become(name):
            gate.allowed = policy(name, bucket)
            gate.refusals.clear()
            return gate

        yield node, become
        node.clean_up()


def keys(node, prefix):
    store = open_store(node.store)
    try:
        return [info.key for info in store.list(prefix)]
    finally:
        store.close()


def starts(node):
    store = open_store(node.store)
    try:
        profile = ProfileStore(Catalog(store, open_index(None))).of_source(model_source("acme/m"))
        return profile.starts if profile else 0
    finally:
        store.close()


def push(node, seed, **how):
    folder = node.home / "m"
    folder.mkdir(exist_ok=True)
    (folder / "weights").write_bytes(content := random.Random(seed).randbytes(SIZE))
    node.floe("model", "push", folder, f"acme/m:{seed}", **how)
    return content


def read(node, tag, wanted):
    place = node.home / "mnt"
    node.floe("model", "mount", f"acme/m:{tag}", place)
    assert (place / "weights").read_bytes() == wanted
    node.floe("umount", place)


def test_each_role_can_do_its_work_and_no_more(world):
    node, become = world
    gate = become("s3-operator.json")
    node.floe("store", "init")
    become("s3-indexer.json")
    content = push(node, 1)
    second = push(node, 2)
    assert not gate.refusals
    assert keys(node, "gc/pushes/") == []  # it ended its records itself
    assert gate.actions["s3:DeleteObject"]
    node.floe("model", "tag", "acme/m:2", "acme/m:two")
    node.floe("model", "retention", "acme/*", "--keep-last", "9")
    assert not gate.refusals
    node.floe("store", "check", "--role", "writer")
    gate.refusals.clear()
    node.floe("model", "rm", "acme/m:1", code=1)
    assert gate.refusals["AccessDenied"]

    become("s3-node.json")
    read(node, 1, content)
    assert not gate.refusals
    assert starts(node) == 1
    assert "s3:PutObject" in push_refused(node)

    become("s3-node-read-only.json")
    read(node, 2, second)
    assert set(gate.refusals) <= {"AccessDenied"}  # of what it would have recorded
    assert starts(node) == 1
    gate.refusals.clear()
    for words in (
        ("model", "ls"), ("model", "verify", "acme/m:1"), ("model", "diff", "acme/m:1", "acme/m:2"), ("fsck",),
        ("rebuild-index",),
    ):  # fmt: skip
        node.floe(*words)
    node.floe("model", "export", "acme/m:2", node.home / "exported", "--profiles", "off")
    assert not gate.refusals
    assert "unfinished uploads are left" in node.floe("gc").stderr  # who may not list them is told
    node.floe("store", "check", "--role", "reader")

    become("s3-operator.json")
    node.floe("model", "profile", "acme/m:2", "--clear")
    node.floe("model", "rm", "acme/m:1")
    node.floe("gc", "--delete", "--grace", "0")
    node.floe("gc", "--delete", "--grace", "0")
    node.floe("fsck")
    assert not gate.refusals
    assert len(keys(node, "packs/")) == 1


def test_an_indexer_that_follows_registries_may_remove_records_of_images_and_nothing_more(world, tmp_path):
    node, become = world
    gate = become("s3-operator.json")
    node.floe("store", "init")
    become("s3-indexer.json")
    push(node, 1)
    built = build_oci(tmp_path / "image", [files({"a": b"a" * 9000})])
    with contextlib.ExitStack() as stack:
        catalog = Catalog(open_store(node.environ["FLOE_STORE"]), open_index(None))
        stack.callback(catalog.close)
        queue = stack.enter_context(contextlib.closing(open_jobs(catalog, standalone().url())))
        source = stack.enter_context(contextlib.closing(open_source(built.source)))
        source.name = "registry.example/app:1"
        index_resolved(catalog, resolve(source), spool_dir=tmp_path)
        assert not gate.refusals
        retention = Retention(catalog, queue, 0.0, asks=lambda *_: True)  # the registry has deleted it
        assert retention.sweep().missing == 1
        with pytest.raises(AccessDeniedError):  # who may only index keeps all records
            retention.sweep()
        assert catalog.image(built.manifest_digest)
        become("s3-indexer-retention.json")
        assert retention.sweep().records == 1
        assert not gate.refusals
        assert keys(node, "refs/images/") == []
        index_resolved(catalog, resolve(source), spool_dir=tmp_path)
        assert not gate.refusals
        assert catalog.image(built.manifest_digest)
    node.floe("model", "rm", "acme/m:1", code=1)
    assert gate.refusals["AccessDenied"]
    gate.refusals.clear()
    node.floe("gc", "--delete", "--grace", "0", code=1)
    assert keys(node, "packs/")


def push_refused(node):
    folder = node.home / "m"
    (folder / "weights").write_bytes(random.Random(3).randbytes(1000))
    return node.floe("model", "push", folder, "acme/m:3", code=1).stderr


def test_google_s_roles_hold_what_floe_asks_for():
    def listed(name):
        text = (IDENTITY / name).read_text()
        assert re.match(r"title: .+\ndescription: .+\nstage: GA\nincludedPermissions:\n(- [\w.]+\n)+\Z", text)
        return re.findall(r"^- (\S+)$", text, re.MULTILINE)

    def asked(*roles):
        return sorted(
            {
                p
                for op, role in permissions.ROLES.items()
                if role in roles
                for p in permissions.permissions("gs://b", op)
            }
        )

    assert sorted(listed("gcs-node.yaml")) == asked("reader")
    assert sorted(listed("gcs-indexer.yaml")) == asked("reader", "writer", "remover")
