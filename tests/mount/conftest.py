"""Shared by the tests of mounts."""

import pytest
from support import fleet
from support.bystander import World
from support.floe_node import wait_until
from support.mounts import mount_node


@pytest.fixture
def node(tmp_path):
    """A run directory and a cache of its own; everything is unmounted at the end."""
    with mount_node(tmp_path) as made:
        yield made


def pytest_generate_tests(metafunc):
    """Bad input is tried on a folder with SQLite and on a fleet's bucket and indexes; `one_store`: where it makes none."""
    if "shared_world" in metafunc.fixturenames:
        kinds = [pytest.param(None, id="local")]
        if not metafunc.definition.get_closest_marker("one_store"):
            kinds += [pytest.param(kind, id=kind, marks=pytest.mark.slow) for kind in fleet.INDEXES]
        metafunc.parametrize("shared_world", kinds, indirect=True, scope="module")


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory, request):
    made = World(tmp_path_factory.mktemp("world"), request.param)
    try:
        yield made
        made.floe("umount", made.other)
        wait_until(lambda: not made.processes())
    finally:
        made.clean_up()


@pytest.fixture
def world(shared_world):
    """A machine for bad input; after each test a model that is mounted there is read on."""
    yield shared_world
    shared_world.reads_on()
