"""The arithmetic of bench/scaling.py, which docs/SCALING.md prints; real nodes are `python -m bench.scaling --check`."""

import pytest

from bench.scaling import IMAGE, IMAGE_FIRST, MODEL, NODES, STARTS, Limits, Start, compare, saturates_from, simulate

ONE = Start("one", layers=2, reads=32, hot_reads=20, bytes=1_000_000, known=True)


def test_what_one_node_asks():
    assert ONE.asked() == {
        "floe.json": 2,
        "refs/models": 0,
        "manifests": 2,
        "trees": 2,
        "indexes": 2,
        "profiles/trees": 2,
        "profiles/sources": 0,
        "packs": 32,
    }
    assert (ONE.redis, ONE.registry) == (4, 3)
    assert (MODEL.redis, MODEL.registry, MODEL.asked()["refs/models"]) == (0, 0, 1)
    assert IMAGE_FIRST.asked()["profiles/sources"] == 3  # who finds none asks for that of the source


@pytest.mark.parametrize("nodes", NODES[:2])
@pytest.mark.parametrize("start", STARTS)
def test_nodes_multiply_and_time_grows(start, nodes):
    found = simulate(start, nodes, Limits())
    assert found == simulate(start, nodes, Limits())
    assert found.requests == nodes * sum(start.asked().values())
    assert found.bytes == nodes * start.bytes
    assert found.seconds >= max(found.busy.values())


def test_what_saturates_follows_from_the_limits():
    few = Limits(gets=1.0)
    assert simulate(ONE, 10, few).saturated == "GETs of one partition"
    assert simulate(ONE, 10, few).seconds == pytest.approx(10 * sum(ONE.asked().values()), rel=0.1)
    assert simulate(ONE, 10, Limits(bucket=1000.0)).saturated == "bucket bandwidth"
    assert simulate(ONE, 10, Limits(redis=1.0)).saturated == "redis"
    assert simulate(ONE, 10, Limits(registry=1.0)).saturated == "registry"
    assert simulate(ONE, 1, Limits()).saturated == "latency"
    split = simulate(ONE, 10, Limits(gets=1.0, partitions=True))
    assert split.busy["GETs of the hottest pack"] == 200
    assert split.seconds < simulate(ONE, 10, few).seconds
    assert saturates_from(ONE, few, 100.0) == ("GETs of one partition", 3)


def test_real_counts_are_compared():
    asked = {kind: 3 * count for kind, count in ONE.asked().items()}
    assert compare(ONE, 3, asked, 3_000_000, 12, 9) == []
    assert compare(ONE, 3, {**asked, "packs": 110}, 3_500_000, 12, 9) == []
    assert len(compare(ONE, 3, {**asked, "packs": 200, "trees": 7}, 5_000_000, 13, 8)) == 5
    assert compare(IMAGE, 1, {}, 0, 0, 0)
