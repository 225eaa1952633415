"""What a node shows of itself, with real daemons: every metric that rules and dashboard name is scraped."""

import contextlib
import os
import signal

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import promfiles, redis_server, seaweed
from support.faultproxy import LATE, FaultProxy
from support.floe_daemons import Daemons
from support.floe_node import Node, wait_until

from floe.store.exposition import read_metrics
from floe.store.index.measured import STATES

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@pytest.fixture
def daemons(tmp_path):
    made = Daemons(tmp_path / "h")
    yield made
    made.close()


def metrics_of(daemons, daemon):
    return f"unix:{daemons.run_dir}/{daemon}-metrics.sock"


def scrape(daemons, *others):
    """Families by name, of both daemons, and of others of that machine."""
    found = {}
    for daemon in ("packfs", "snapshotter", *others):
        text = read_metrics(metrics_of(daemons, daemon))
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
    daemons.floe("model", "mount", "iris", daemons.home / "mnt")
    assert (daemons.home / "mnt/weights").read_bytes() == (folder / "weights").read_bytes()

    others = {
        "agent": ("--heartbeat", "1"),
        "csi": ("--kubelet-dir", str(daemons.home / "kubelet")),
        "indexer": ("--index", redis_server.standalone().url(), "--metrics", metrics_of(daemons, "indexer")),
    }
    with contextlib.ExitStack() as stack:
        for name, flags in others.items():
            process = daemons.start(name, *flags)
            stack.callback(process.wait, 60)
            stack.callback(process.terminate)
        wait_until(lambda: scrape(daemons, "indexer")["floe_indexer_queue_jobs"].samples)  # Redis was asked
        families = scrape(daemons, *others)
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
    daemons.floe("umount", daemons.home / "mnt")


def test_daemons_log_more_for_a_while_and_a_new_worker_too(daemons):
    before = daemons.json("log-level")
    assert before == {"wished": None, "until": None, "daemons": {"packfs": "info", "snapshotter": "info"}}
    found = daemons.json("log-level", "debug", "--seconds", "500")
    assert (found["wished"], found["daemons"]) == ("debug", {"packfs": "debug", "snapshotter": "debug"})
    for name in ("packfs", "snapshotter"):
        assert "logs are of level debug and above from now on, before info" in daemons.log(name).read_text()
    worker = int((daemons.run_dir / "worker.pid").read_text())
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: daemons.json("status")["packfs"].get("pid") not in (None, worker))
    assert daemons.json("log-level")["daemons"]["packfs"] == "debug"
    assert "debug for " in daemons.floe("log-level").stdout
    assert daemons.json("log-level", "default") == before
    assert "choose from" in daemons.floe("log-level", "loud", code=2).stderr
    assert "is no time" in daemons.floe("log-level", "debug", "--seconds", "0", code=2).stderr
    other = daemons.floe("log-level", "debug", "--run-dir", daemons.home / "none", code=1)
    assert "no daemon that could follow" in other.stderr
    assert not (daemons.home / "none").exists()


@pytest.fixture
def far_node(tmp_path):
    """A machine with an S3 store behind a proxy, its `proxy`, that reads nothing ahead."""
    server = seaweed.running()
    with FaultProxy(server.endpoint) as proxy:
        (tmp_path / "far").mkdir()
        node = Node(tmp_path / "far")
        node.proxy = proxy
        url = server.url(server.bucket(), "fleet", endpoint=proxy.url)
        node.environ |= {**server.environment(), "FLOE_STORE": url, "FLOE_INDEX": "none", "FLOE_READAHEAD": "0"}
        yield node
        node.clean_up()


def test_a_stall_of_300_ms_is_named_with_its_file_and_cause(far_node, tmp_path):
    folder = tmp_path / "m"
    (folder / "sub").mkdir(parents=True)
    for name in ("config.json", "sub/weights", "tokenizer"):
        (folder / name).write_bytes(os.urandom(2 << 20))
    far_node.floe("model", "push", folder, "iris:1")
    mountpoint = far_node.home / "mnt"
    far_node.floe("model", "mount", "iris:1", mountpoint)
    fault = far_node.proxy.fault(LATE, matches="/packs/", times=1, seconds=0.3)
    for name in ("sub/weights", "tokenizer"):
        assert (mountpoint / name).read_bytes() == (folder / name).read_bytes()
    assert fault.hits == 1

    def stalls(found):
        return [event for event in found["events"] if event["kind"] == "stall"]

    wait_until(lambda: stalls(far_node.json("trace", "iris:1")))  # the worker notes it behind the reader's back
    for what in ("iris:1", str(mountpoint)):
        found = far_node.json("trace", what)
        worst = max(stalls(found), key=lambda event: event["seconds"])
        assert (worst["file"], worst["cause"]) == ("sub/weights", "store")
        assert worst["seconds"] >= 0.3
        assert worst["bytes"] <= 2 << 20
        assert (found["key"], found["name"]) == (str(mountpoint), "iris:1")
        assert "mount" in {event["kind"] for event in found["events"]}
    people = far_node.floe("trace", "iris:1", "--html", tmp_path / "start.html").stdout
    lines = [line for line in people.splitlines() if "STALL: sub/weights" in line and " store, " in line]
    assert any("#" in line for line in lines)
    assert "s: sub/weights, store" in people.splitlines()[-1] + people.splitlines()[-2]
    page = (tmp_path / "start.html").read_text()
    assert "sub/weights" in page
    assert "iris:1" in far_node.floe("trace").stdout
    assert "no start of" in far_node.floe("trace", "nobody", code=1).stderr

    def longest():
        text = read_metrics(f"unix:{far_node.run_dir}/packfs-metrics.sock")
        families = {family.name: family for family in text_string_to_metric_families(text)}
        return {
            (sample.labels["file"], sample.labels["cause"]): sample.value
            for sample in families["floe_longest_stall_seconds"].samples
        }

    wait_until(lambda: longest().get(("sub/weights", "store"), 0) >= 0.3)
    far_node.floe("umount", mountpoint)
