"""What a node shows of itself, with real daemons: every metric that rules and dashboard name is scraped."""

import os

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import promfiles
from support.floe_daemons import Daemons
from support.floe_node import wait_until

from floe.store.exposition import read_metrics
from floe.store.index.measured import STATES

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@pytest.fixture
def daemons(tmp_path):
    made = Daemons(tmp_path / "h")
    yield made
    made.close()


def scrape(daemons):
    """Families by name, of both daemons."""
    found = {}
    for daemon in ("packfs", "snapshotter"):
        text = read_metrics(f"unix:{daemons.run_dir}/{daemon}-metrics.sock")
        found |= {family.name: family for family in text_string_to_metric_families(text)}
    return found


def names(family):
    """The names of its samples: a histogram has three, a counter one."""
    suffixes = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",)}
    return {family.name + suffix for suffix in suffixes.get(family.type, ("",))}


def test_all_that_rules_and_the_dashboard_name_is_scraped(daemons, tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "weights").write_bytes(os.urandom(3 << 20))
    daemons.floe("model", "push", folder, "iris")
    daemons.floe("model", "mount", "iris", tmp_path / "mnt")
    assert (tmp_path / "mnt/weights").read_bytes() == (folder / "weights").read_bytes()

    families = scrape(daemons)
    scraped = set().union(*map(names, families.values()))
    for where, query in promfiles.queries():
        assert promfiles.metrics_of(query) <= scraped, where

    waits = families["floe_read_wait_seconds"]
    assert sum(sample.value for sample in waits.samples if sample.name.endswith("_count")) > 0
    (limit,) = families["floe_cache_limit_bytes"].samples
    assert limit.value > families["floe_cache_held_bytes"].samples[0].value > 0
    states = {sample.labels["state"]: sample.value for sample in families["floe_index_state"].samples}
    assert set(states) == set(STATES)
    assert sum(states.values()) == 1
    assert {sample.labels["outcome"] for sample in families["floe_snapshotter_prepare_seconds"].samples} == {
        *("lazy", "unpacked", "container", "refused")
    }
    # The mount was a start, which is told when nothing new has been read for some seconds.
    name = {"name": "iris:latest", "until": "first_read"}
    assert daemons.json("status")["packfs"]["starts"]["under_way"] == 1
    wait_until(lambda: [s for s in scrape(daemons)["floe_last_start_seconds"].samples if s.labels == name], 60)
    daemons.floe("umount", tmp_path / "mnt")
