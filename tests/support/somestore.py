"""Stores of every kind for one suite, and something to look after in them."""

from __future__ import annotations

import contextlib
import random
import uuid

import pytest
from support import seaweed
from support.fakegcs import FakeGCS

from floe.ingest.model import push_model
from floe.store.catalog import Catalog
from floe.store.ids import ModelRef
from floe.store.index import open_index
from floe.store.objects import open_store

KINDS = ["memory", "file", "s3", "gs"]


@pytest.fixture(scope="module")
def google():
    with FakeGCS() as server:
        yield server


@pytest.fixture(params=KINDS)
def url(request, tmp_path, monkeypatch, google):
    """The address of an empty store; `google` has no part in it but for gs://."""
    if request.param == "s3":
        weed = seaweed.running()
        for name, value in weed.environment().items():
            monkeypatch.setenv(name, value)
        return weed.url(seaweed.shared_bucket(), f"upkeep/{uuid.uuid4().hex}")
    if request.param == "gs":
        google.denied = set()
        return google.address(google.bucket(), "upkeep")
    return {"memory": "memory://", "file": f"file://{tmp_path}/store"}[request.param]


@pytest.fixture
def catalog(url):
    made = Catalog(open_store(url), open_index(None))
    yield made
    made.close()


def make_model(folder, name, *contents, seed=5):
    """A directory of random files, of `contents` bytes each; equal sizes and seeds give equal content."""
    home = folder / name
    home.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(contents):
        (home / f"f{number}").write_bytes(random.Random(f"{seed} {size}").randbytes(size))
    return home


def push(catalog, directory, name):
    ref = ModelRef.parse(name)
    return push_model(catalog, directory, ref, spool_dir=directory.parent / "spool", workers=2)


def everything(store):
    """Key -> content, but for times that change by looking."""
    return {info.key: bytes(store.get(info.key)) for info in store.list("")}


@contextlib.contextmanager
def memory_catalog(models, folder):
    """A catalog in memory with these models, ref -> the content of their one file."""
    with contextlib.closing(Catalog(open_store("memory://"), open_index(None))) as made:
        for ref, content in models.items():
            directory = folder / ref.name.replace("/", "-")
            directory.mkdir()
            (directory / "w.bin").write_bytes(content)
            push_model(made, directory, ref, spool_dir=folder)
        yield made
