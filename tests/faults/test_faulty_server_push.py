"""Pushes to a real S3 server behind a proxy with every fault that can meet a writer: done, or refused with nothing half-published."""

from __future__ import annotations

import random
import uuid

import pytest
from support import seaweed
from support.faultproxy import impatient_proxy
from support.floe_node import Node
from support.stored import tree_files

from floe.ingest.model import push_model
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.errors import CredentialsExpiredError, NotFoundError, ThrottledError, UnavailableError
from floe.store.ids import ModelRef
from floe.store.index import open_index
from floe.store.objects import open_store
from floe.store.objects.retry import RetryingStore

REF = ModelRef("m")
SILENCE = 1  # seconds
# Where a push may be hit: what it is, the request's method, what stands in its target.
PLACES = (
    ("an upload begins", "POST", "uploads"),
    ("a part", "PUT", "partNumber=2"),
    ("an upload ends", "POST", "uploadId"),
    ("a chunk table", "PUT", "/chunks/"),
    ("a pack index", "PUT", "/indexes/"),
    ("a tree", "PUT", "/trees/"),
    ("a manifest", "PUT", "/manifests/"),
    ("a ref", "PUT", "/refs/models/"),
    ("a list", "GET", "list-type"),
)
PASSING = ("http_500", "slow_down_503", "clock_skew", "reset_before_answer", "lost_answer", "stall_before_answer")
LASTING = {
    "http_500": (UnavailableError, "can be reached"),
    "slow_down_503": (ThrottledError, "try again later"),
    "clock_skew": (UnavailableError, "synchronise this machine's clock"),
    "expired_token": (CredentialsExpiredError, "renew them"),
    "reset_before_answer": (UnavailableError, "can be reached"),
}


def _some(faults, *quick):
    """All of them, but for `quick` ones only where tests may take their time."""
    return [fault if fault in quick else pytest.param(fault, marks=pytest.mark.slow) for fault in faults]


@pytest.fixture
def proxy(monkeypatch):
    with impatient_proxy(monkeypatch, SILENCE) as made:
        yield made


@pytest.fixture
def prefix():
    return f"faulty-push/{uuid.uuid4().hex}"


@pytest.fixture
def content():
    generator = random.Random(31)
    return {"weights": generator.randbytes(17 << 20), "config": b"{}"}


@pytest.fixture
def model(tmp_path, content):
    home = tmp_path / "model"
    home.mkdir()
    for name, data in content.items():
        (home / name).write_bytes(data)
    return home


def address(prefix, proxy=None):
    return seaweed.running().url(seaweed.shared_bucket(), prefix, endpoint=None if proxy is None else proxy.url)


def push(prefix, proxy, model, tmp_path, deadline=30.0):
    store = RetryingStore(open_store(address(prefix, proxy), retry=False), deadline=deadline)
    try:
        return push_model(Catalog(store, open_index(None)), model, REF, spool_dir=tmp_path / "spool")
    finally:
        store.close()


@pytest.mark.parametrize("fault", _some(PASSING, "http_500", "lost_answer"))
def test_a_fault_that_passes_is_not_seen_wherever_it_hits(proxy, prefix, model, tmp_path, content, fault):
    made = {place: proxy.fault(fault, method=method, matches=part, times=1) for place, method, part in PLACES}
    pushed = push(prefix, proxy, model, tmp_path)
    assert [place for place, one in made.items() if not one.hits] == []
    store = open_store(address(prefix))
    assert Catalog(store, open_index(None)).resolve_model(REF)[0] == pushed.digest
    assert tree_files(store, pushed.manifest.tree.digest) == content
    store.close()


@pytest.mark.parametrize("fault", _some(LASTING, "clock_skew", "expired_token"))
def test_a_fault_that_lasts_is_told_and_publishes_nothing(proxy, prefix, model, tmp_path, content, fault):
    for method in ("POST", "PUT"):
        proxy.fault(fault, method=method, matches="/packs/")
    expected, hint = LASTING[fault]
    store = open_store(address(prefix))
    with pytest.raises(expected) as told:
        push(prefix, proxy, model, tmp_path, deadline=0.5)
    assert hint in told.value.hint
    assert list(store.list(layout.PACK_INDEXES)) == list(store.list(layout.MODEL_REFS)) == []
    with pytest.raises(NotFoundError):
        Catalog(store, open_index(None)).resolve_model(REF)
    proxy.heal()
    pushed = push(prefix, proxy, model, tmp_path)
    assert tree_files(store, pushed.manifest.tree.digest) == content
    assert list((tmp_path / "spool").iterdir()) == []
    store.close()


def test_the_command_says_what_to_do(proxy, prefix, model, tmp_path):
    (tmp_path / "home").mkdir()
    node = Node(tmp_path / "home")
    node.environ |= {**seaweed.running().environment(), "FLOE_STORE": address(prefix, proxy)}
    proxy.fault("clock_skew", method="PUT", matches="/manifests/")
    told = node.floe("model", "push", model, "m", code=1).stderr
    assert "floe: hint: synchronise this machine's clock" in told
    assert node.json("model", "ls") == []
    proxy.heal()
    pushed = node.json("model", "push", model, "m")
    assert pushed["new_packs"] == 0  # what had arrived was found again
    assert [found["manifest"] for found in node.json("model", "ls")] == [pushed["manifest"]]
