"""Shared by the tests of the node cache, and by those of indexers and of who asks them."""

import contextlib

import pytest
from support import pushing, redis_server
from support.registry import Registry

from floe.store.cache import NodeCache
from floe.store.catalog import Catalog
from floe.store.index import open_index
from floe.store.objects.memory import MemoryStore


@pytest.fixture
def cache(tmp_path):
    return NodeCache(tmp_path / "cache")


@pytest.fixture
def stack():
    """Closes what is entered into it, last first."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A registry without TLS, and the `config` with which indexers may ask it."""
    made = Registry(tmp_path_factory.mktemp("registry"))
    made.config = pushing.without_tls(made.storage.parent / "hosts", made.host)
    yield made
    made.stop()


@pytest.fixture
def catalog():
    """Of a store in memory, without an index."""
    with contextlib.closing(Catalog(MemoryStore(), open_index(None))) as made:
        yield made


@pytest.fixture
def queue(catalog):
    """The queue of that store's jobs, in Redis: new, as the store is."""
    with contextlib.closing(pushing.open_jobs(catalog, redis_server.standalone().url())) as made:
        yield made
