"""Versions of the snapshotter that take over from each other under a container that reads, and while pods come and go."""

import pytest
from support.containerd import versions
from support.installed import Installed
from support.slow_node import SlowNode

from floe.snapshotter import schema

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
NEXT = schema.SCHEMA_VERSION + 1
# What makes a copy of Floe one with another form of the database.
CHANGED = {
    "snapshotter/schema.py": f"""
SCHEMA_VERSION = {NEXT}
MIGRATIONS = {{**MIGRATIONS, {NEXT}: "ALTER TABLE snapshots ADD COLUMN more INTEGER NOT NULL DEFAULT 0;"}}
"""
}


@pytest.fixture
def node(tmp_path):
    made = SlowNode(tmp_path, versions()[-1])
    yield made
    made.close()


def take_over(node, version):
    node.kill_snapshotter()
    assert node.daemons.json("status")["snapshotter"]["version"] == version


def start_another(node, name):
    """A pod with a container of the image: prepared, and mounted, by the snapshotter that is there now."""
    pod = node.cri.run_pod(name)
    container = node.cri.run_container(pod, node.reference, ["sh", "-c", "echo up; sleep 1000"])
    assert node.cri.execute(container, "ls", "/models/demo")[1] == b"weights.bin\n"
    return pod


def test_the_next_version_and_the_one_before_take_over(node, tmp_path):
    installed = Installed(tmp_path)
    installed.install("1.0")
    node.daemons.environ |= installed.environ
    container = node.read()
    take_over(node, "1.0")
    first = start_another(node, "of-the-first")
    installed.install("2.0")
    take_over(node, "2.0")
    second = start_another(node, "of-the-second")
    node.cri.remove_pod(first)
    installed.install("1.0.1")
    take_over(node, "1.0.1")
    node.cri.remove_pod(second)
    node.finish(container)


def test_a_database_in_a_newer_form_is_migrated_under_a_reader_and_the_version_before_refuses_it(node, tmp_path):
    installed = Installed(tmp_path)
    installed.install("1.0")
    node.daemons.environ |= installed.environ
    container = node.read()
    take_over(node, "1.0")
    pod = start_another(node, "of-the-first")
    installed.install("2.0", CHANGED)
    take_over(node, "2.0")
    node.cri.remove_pod(pod)
    pod = start_another(node, "of-the-second")
    installed.install("1.0.1")
    with pytest.raises(AssertionError, match="did not start") as refused:
        take_over(node, "1.0.1")
    assert f"schema version {NEXT}; this Floe knows version {schema.SCHEMA_VERSION}" in str(refused.value)
    node.wait_inflight()  # the container reads on
    assert node.cri.status(container).state == node.cri.pb.CONTAINER_RUNNING
    installed.install("2.0.1", CHANGED)
    node.daemons.snapshotter = node.daemons.start("snapshotter")
    node.cri.remove_pod(pod)
    node.cri.remove_pod(start_another(node, "of-the-third"))
    node.finish(container)
