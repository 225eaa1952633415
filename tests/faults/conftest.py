"""Shared by the tests of the node cache, and by those of indexers."""

import contextlib

import pytest
from support import pushing
from support.registry import Registry

from floe.store.cache import NodeCache


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
