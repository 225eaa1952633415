"""Shared by the tests of the node cache."""

import contextlib

import pytest

from floe.store.cache import NodeCache


@pytest.fixture
def cache(tmp_path):
    return NodeCache(tmp_path / "cache")


@pytest.fixture
def stack():
    """Closes what is entered into it, last first."""
    with contextlib.ExitStack() as stack:
        yield stack
