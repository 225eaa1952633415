"""Alarms that go off when something is wrong, at its first event too, and end when it is over."""

import contextlib
from types import SimpleNamespace

import pytest
from support.alerting import EVERY, Watched
from support.snapshots import DirectoryLayers

from floe.agent.daemon import agent_metrics
from floe.cli.packfs_metrics import packfs_metrics
from floe.csi import daemon as csi_daemon
from floe.csi.service import DriverService
from floe.csi.volumes import Volumes
from floe.protos.gen.csi import csi_pb2 as pb
from floe.snapshotter import daemon
from floe.snapshotter.breaker import Breaker
from floe.snapshotter.config import SnapshotterConfig
from floe.snapshotter.resolver import COOL_DOWN, Missed
from floe.snapshotter.snapshotter import Figures, Snapshotter
from floe.store.download import Downloader
from floe.store.errors import UnavailableError
from floe.store.index.measured import MeasuredIndex


def exposition(**figures):
    """What a snapshotter exports of these figures."""
    known = {"snapshots": {}, "fallbacks": {}, "breaker": "closed", "mounts": 0, "remount_failures": 0, "counters": {}}
    return daemon._exposition(SimpleNamespace(metrics=lambda: Figures(**{**known, **figures})))


def after(fired):
    """Seconds until an alarm went off, and how often it did."""
    return EVERY * (fired.index(True) + 1), sum(
        one and not before for before, one in zip([False, *fired], fired, strict=False)
    )


def test_a_store_that_failed_once_is_no_alarm_and_one_that_fails_on_is_until_it_is_left_in_peace():
    watched = Watched("FloeStoreLeftAlone", lambda: exposition(breaker=breaker.state))
    breaker = Breaker(COOL_DOWN, lambda: watched.now)

    def asks():
        if breaker.allow():
            breaker.failed()

    assert not any(watched.run(10))
    asks()  # a moment before the scrape, which is what it takes to be seen open
    watched.now -= EVERY - 1
    assert not any(watched.run(30))
    seconds, times = after(watched.run(20, asks))
    assert 5 * 60 <= seconds <= 7 * 60
    assert times == 1
    # Nobody asks any more, so nobody knows whether it is well again; nor is anybody held off.
    fired = watched.run(30)
    assert breaker.state == "probing"
    assert fired[0]
    assert not any(fired[3 * 60 // EVERY :])


def test_all_states_of_the_breaker_are_told():
    for state in ("closed", "open", "probing"):
        (found,) = (metric for metric in exposition(breaker=state) if metric.name == "floe_snapshotter_breaker")
        assert found.values == {(name,): float(name == state) for name in ("closed", "open", "probing")}


def test_trees_that_are_mounted_after_all_end_the_alarm():
    figures = {"remount_failures": 2, "unmounted": 2}
    watched = Watched("FloeRemountFailures", lambda: exposition(**figures))
    seconds, _ = after(watched.run(20))
    assert seconds == 5 * 60 + EVERY
    figures["unmounted"] = 0
    assert not any(watched.run(20))


def test_the_first_pull_that_is_refused_is_an_alarm(tmp_path):
    config = SnapshotterConfig(
        address=tmp_path / "s.sock",
        root=tmp_path / "root",
        run_dir=tmp_path / "run",
        cache_dir=tmp_path / "cache",
        store_url="memory://",
    )
    with contextlib.closing(Snapshotter(config, DirectoryLayers())) as made:
        watched = Watched("FloePullsRefused", lambda: daemon._exposition(made))
        assert not any(watched.run(5))
        with pytest.raises(UnavailableError):
            made._refuse("it cannot be had", Missed("timeout"), {})
        assert any(watched.run(1))
        assert not any(watched.run(40)[15 * 60 // EVERY :])


def test_the_first_volume_that_cannot_be_had_is_an_alarm_and_one_that_is_not_there_is_none():
    def publish(_wanted):
        raise UnavailableError("the pack filesystem does not run")

    driver = DriverService(SimpleNamespace(publish=publish), "node")
    volumes = SimpleNamespace(restored={}, published=list)
    watched = Watched("FloeVolumesFail", lambda: csi_daemon.exposition(driver, volumes))
    assert not any(watched.run(5))
    with pytest.raises(Exception, match="volume_id"):
        driver.publish(pb.NodePublishVolumeRequest())
    assert not any(watched.run(20))
    request = pb.NodePublishVolumeRequest(
        volume_id="csi-1", target_path="/var/lib/kubelet/pods/x/volumes/kubernetes.io~csi/m/mount", readonly=True
    )
    request.volume_capability.mount.SetInParent()
    request.volume_context.update({"model": "iris:1", "csi.storage.k8s.io/ephemeral": "true"})
    with pytest.raises(UnavailableError):
        driver.publish(request)
    assert any(watched.run(10))


def test_the_first_volume_that_is_lost_is_an_alarm():
    volumes = Volumes(None, None, None, (), parse=str, stop_packfs=lambda: None)
    told = SimpleNamespace(restored=volumes.restored, published=list)
    driver = SimpleNamespace(counted=dict)
    watched = Watched("FloeVolumesLost", lambda: csi_daemon.exposition(driver, told))
    assert not any(watched.run(5))
    record = SimpleNamespace(id="1", volume="csi-1", model="iris:1", mountpoint="/mnt")
    volumes._say(record, None)
    assert not any(watched.run(1))
    volumes._say(record, UnavailableError("no store"))
    assert any(watched.run(1))


def test_an_index_that_failed_once_is_no_alarm_and_one_that_fails_on_is():
    answers = {}

    def get_ref(key):
        if key not in answers:
            raise UnavailableError("no answer")

    index = MeasuredIndex(SimpleNamespace(url="redis://host:6379", get_ref=get_ref))

    def ask():
        with contextlib.suppress(UnavailableError):
            index.get_ref("key")

    watched = Watched("FloeIndexFails", lambda: exposition(index=index.status()))
    ask()  # before the first scrape
    assert not any(watched.run(60))
    ask()
    assert not any(watched.run(60))
    seconds, times = after(watched.run(30, ask))
    assert 10 * 60 <= seconds <= 11 * 60
    assert times == 1
    answers["key"] = None
    assert not any(watched.run(30, ask))


def test_failing_requests_are_told_by_causes_that_are_there_from_the_start():
    loader = Downloader(None, {})
    watched = Watched("FloeStoreErrors", lambda: packfs_metrics({"waits": {"store_errors": loader.errors}}))
    watched.run(1)
    assert len(watched._series) == len(loader.errors) > 5
    loader.close()


def test_a_slow_disk_and_a_stalled_order_are_no_alarm_at_the_first_scrape():
    disk = {"path": "/c", "state": "ok", "held_bytes": 1}
    disk["bypass"] = {"bypassed": True, "hit_seconds": {}, "miss_seconds": {}}
    slow = Watched("FloeCacheDiskSlow", lambda: packfs_metrics({"cache": [disk]}))
    assert after(slow.run(30)) == (15 * 60 + EVERY, 1)
    progress = SimpleNamespace(total_bytes=100, verified_bytes=10)
    warming = SimpleNamespace(active=[progress], counts=dict.fromkeys(("done", "failed", "refused"), 0))
    stalled = Watched("FloeWarmOrdersStall", lambda: agent_metrics(SimpleNamespace(failures={}), warming, 0.0))
    seconds, _ = after(stalled.run(60))
    assert 30 * 60 <= seconds <= 31 * 60
    progress.verified_bytes = 20
    assert not any(stalled.run(20))
