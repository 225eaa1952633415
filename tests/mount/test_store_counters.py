"""Floe's counters of the object store against the store's own."""

import os

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import seaweed
from support.floe_daemons import Daemons

from floe.store.exposition import read_metrics

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@pytest.fixture
def server():
    return seaweed.running()


@pytest.fixture
def bucket(server):
    return server.bucket()


@pytest.fixture
def daemons(server, bucket, tmp_path):
    # Nothing but reads asks the store for packs, so that all is counted when the last read is answered.
    quiet = {"FLOE_INDEX": "none", "FLOE_READAHEAD": "0", "FLOE_COMPLETION": "off", "FLOE_PROFILES": "off"}
    made = Daemons(tmp_path / "h", {**server.environment(), "FLOE_STORE": server.url(bucket, "fleet"), **quiet})
    yield made
    made.close()


def counted(daemons):
    """Requests to the object store and bytes of their answers, as the pack filesystem counts them."""
    families = {
        family.name: family
        for family in text_string_to_metric_families(read_metrics(f"unix:{daemons.run_dir}/packfs-metrics.sock"))
    }
    return tuple(
        int(sum(s.value for s in families[name].samples if s.labels.get("source") in ("store", "readahead")))
        for name in ("floe_requests", "floe_bytes")
    )


def test_requests_and_bytes_of_a_cold_read_are_the_servers_own_to_the_byte(daemons, server, bucket, tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    for name in ("config", "weights"):
        (folder / name).write_bytes(os.urandom((5 << 20) + 12345))
    daemons.floe("model", "push", folder, "iris")
    daemons.floe("model", "mount", "iris", daemons.home / "mnt")
    ours, theirs = counted(daemons), server.downloads(bucket)

    for name in ("config", "weights"):
        assert (daemons.home / "mnt" / name).read_bytes() == (folder / name).read_bytes()

    ours = tuple(after - before for before, after in zip(ours, counted(daemons), strict=True))
    theirs = tuple(after - before for before, after in zip(theirs, server.downloads(bucket), strict=True))
    daemons.floe("umount", daemons.home / "mnt")
    assert ours == theirs
    assert ours[0] > 1
    assert ours[1] > 10 << 20  # random bytes do not shrink
