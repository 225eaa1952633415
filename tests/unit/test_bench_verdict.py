"""What `floe bench` plans, and what it says of figures: no I/O."""

from dataclasses import replace

import pytest

from floe.selfbench import verdict
from floe.selfbench.figures import (
    BOUNDED,
    GREW_NO_MORE,
    MOST,
    Cpu,
    Disk,
    Mount,
    Network,
    Step,
    Store,
    percentile,
)
from floe.selfbench.plan import CONNECTIONS, PARTS, Plan, parse_parts
from floe.selfbench.store import Source, cut, enough, grew_no_more, saturates_at
from floe.selfbench.verdict import Measured, judge
from floe.store.errors import BadInputError

MB = 1e6


def store(rates, *, ended=GREW_NO_MORE, median=0.02, share=0.2, repeated=False):
    """Rates in MB/s of 1, 2, 4 ... connections."""
    steps = tuple(Step(count, int(rate * MB), 1.0, rate * MB) for count, rate in zip(CONNECTIONS, rates, strict=False))
    return Store(
        url="s3://bucket/fleet",
        objects=3,
        objects_bytes=1 << 32,
        repeated=repeated,
        get_bytes=4096,
        gets=100,
        get_median_seconds=median,
        get_p99_seconds=3 * median,
        range_bytes=8 << 20,
        steps=steps,
        ended=ended,
        saturates_at=saturates_at(steps),
        single_connection_bytes_per_second=rates[0] * MB,
        best_bytes_per_second=max(rates) * MB,
        client_cpu_share=share,
    )


def cpu(rate=2000, *, cores=4, stored=1.0):
    return Cpu(cores, 32, 32 << 20, True, stored, rate * MB)


def disk(write=2000, read=3000, *, small=0.0001, frame=0.0002, direct=True):
    return Disk("/cache", direct, 1 << 29, write * MB, read * MB, small, 2 * small, frame, 2 * frame)


def network(link=None, rtt=0.001):
    return Network("https://s3.example", rtt, "eth0", None if link is None else link * MB)


def mount(first, *, from_store=True, busy=0.3, size=1 << 28):
    return Mount("llama:8b", from_store, 0.5, size, first * MB, busy, 900 * MB, 0, None, None, None)


def test_the_cache_disk_binds_and_what_that_means_is_said():
    found = judge(Measured(store([85, 170, 340, 660, 900, 910]), network(), cpu(), disk(write=180)))
    assert (found.limit, found.bytes_per_second) == (verdict.CACHE_DISK, 180 * MB)
    assert found.sentence == (
        "Reading 1 GiB for the first time here is bound by the cache disk: it writes 180 MB/s, while the store gives "
        "910 MB/s over 16 connections, and no more over 32 (85.0 MB/s over one) and 4 cores decompress and verify 8.00 GB/s. "
        "Readers are not held up by that, but some 80% of what they read at full rate is not kept, and is fetched again "
        "next time."
    )


def test_the_store_binds_where_more_connections_give_no_more():
    found = judge(Measured(store([85, 170, 340, 660, 900, 910]), network(), cpu(), disk()))
    assert (found.limit, found.bytes_per_second) == (verdict.STORE, 910 * MB)
    assert "the store, or the link to it: the store gives 910 MB/s over 16 connections" in found.sentence
    assert "1 GiB takes about 1.2 s." in found.sentence


def test_one_connection_may_be_all_there_is():
    found = judge(Measured(store([110, 111, 112]), None, cpu(), disk()))
    assert found.limit == verdict.STORE
    assert "bound by the store: the store gives 112 MB/s over 1 connection, as one does alone" in found.sentence


@pytest.mark.parametrize("ended", [BOUNDED, MOST])
def test_connections_bind_while_each_one_more_gives_more(ended):
    found = judge(Measured(store([40, 80, 160, 320], ended=ended), network(), cpu(), disk()))
    assert found.limit == verdict.PER_CONNECTION
    assert "over 8 connections, still more with each one (40.0 MB/s over one)" in found.sentence


def test_the_link_binds_where_the_interface_says_how_fast_it_is():
    limited = Measured(store([100, 115, 116]), network(link=125), cpu(), disk())
    found = judge(limited)
    assert found.limit == verdict.LINK
    assert "the link, eth0 of 125 MB/s" in found.sentence
    assert judge(replace(limited, network=network(link=1250))).limit == verdict.STORE


def test_the_processor_binds_by_verifying_or_by_receiving():
    fast = store([1000, 2000, 3000, 3000, 3000])
    assert judge(Measured(fast, network(), cpu(500, cores=1), disk(5000))).limit == verdict.CPU
    assert "1 core decompresses and verifies 500 MB/s" in judge(Measured(fast, None, cpu(500, cores=1))).sentence
    received = judge(Measured(replace(fast, client_cpu_share=0.95), network(), cpu(), disk(5000)))
    assert received.limit == verdict.CPU
    assert "receiving that takes all cores" in received.sentence


def test_compressed_content_comes_faster_than_its_bytes():
    found = judge(Measured(store([100, 200, 200, 200]), network(), cpu(stored=0.5), disk(write=390)))
    assert found.limit == verdict.CACHE_DISK  # 400 MB/s of content arrive
    assert "which is 400 MB/s of content" in found.sentence


def test_a_mount_that_gives_much_less_than_its_parts_binds_itself():
    parts = Measured(store([300, 600, 900, 900, 900]), network(), cpu(), disk())
    assert judge(replace(parts, mount=mount(800))).limit == verdict.STORE
    assert "1 GiB takes about 1.3 s." in judge(replace(parts, mount=mount(800))).sentence  # as the mount gave it
    slow = judge(replace(parts, mount=mount(300)))
    assert (slow.limit, slow.bytes_per_second) == (verdict.MOUNT, 300 * MB)
    assert "a mount gives 300 MB/s with all cores 30% busy" in slow.sentence
    assert judge(replace(parts, mount=mount(300, busy=0.97))).limit == verdict.CPU
    # One that was made in the cache directory says nothing of the store.
    assert judge(replace(parts, mount=mount(300, from_store=False))).limit == verdict.STORE


def test_a_mount_whose_processor_time_was_too_little_to_tell_says_nothing_of_it():
    parts = Measured(store([300, 600, 900, 900, 900]), network(), cpu(), disk(), mount(300, busy=None))
    assert judge(parts).limit == verdict.MOUNT
    assert "a mount gives 300 MB/s, while" in judge(parts).sentence


@pytest.mark.parametrize("size", [0, 60_000, 8 << 20])
def test_a_mount_of_which_too_little_was_read_binds_nothing(size):
    small = mount(10.9 if size == 60_000 else 300 if size else 0, busy=1.0, size=size)
    parts = Measured(store([300, 600, 900, 900, 900]), network(), cpu(), disk())
    found = judge(replace(parts, mount=small))
    assert (found.limit, found.sentence) == (verdict.STORE, judge(parts).sentence)
    assert any("llama:8b is too small to tell" in line for line in found.remarks)
    # Nothing was to be told of the store by a model that was made.
    assert judge(replace(parts, mount=replace(small, from_store=False))).remarks == judge(parts).remarks


def test_a_slow_mount_is_believed_after_a_while():
    parts = Measured(store([300, 600, 900, 900, 900]), network(), cpu(), disk())
    assert judge(replace(parts, mount=mount(5, size=8 << 20))).limit == verdict.MOUNT
    assert judge(replace(parts, mount=mount(0.2, size=60_000))).limit == verdict.STORE  # a round trip or two


def test_a_store_of_which_too_little_was_read_binds_nothing():
    """A few bytes; a small object, again and again; many small objects; and a plan of few bytes."""
    whole = store([300, 600, 900, 900, 900], median=0.001)
    brief = tuple(replace(step, bytes=1_300_000, seconds=0.0014) for step in whole.steps)
    slow = disk(read=150, small=0.01)
    parts = Measured(whole, network(), cpu(), slow)
    assert any("WARNING" in line for line in judge(parts).remarks)
    for few in (
        replace(whole, objects=1, objects_bytes=60_000, range_bytes=60_000),
        replace(whole, objects=1000, range_bytes=60_000),
        replace(whole, objects=1, objects_bytes=60_000),
        replace(whole, steps=brief),
    ):
        found = judge(replace(parts, store=few))
        assert (found.limit, found.bytes_per_second) == (verdict.UNKNOWN, None)
        assert "is not known: too little was read of the store. Whatever it gives, 4 cores" in found.sentence
        assert any("too small to tell" in line and "--write" in line for line in found.remarks)
        assert not any("WARNING" in line for line in found.remarks)


def test_what_is_close_behind_is_named():
    found = judge(Measured(store([500, 800, 800, 800]), network(), cpu(), disk(write=900)))
    assert "The cache disk is close behind." in found.sentence


def test_nothing_is_concluded_without_the_store():
    assert judge(Measured()).limit == verdict.UNKNOWN
    found = judge(Measured(cpu=cpu(), disk=disk()))
    assert found.limit == verdict.UNKNOWN
    assert (
        "Whatever it gives, 4 cores decompress and verify 8.00 GB/s and the cache disk writes 2.00 GB/s."
        in found.sentence
    )


def test_a_cache_that_is_slower_than_the_store_is_said_loudly():
    fast = store([500, 900, 900, 900], median=0.004)
    assert not any("WARNING" in line for line in judge(Measured(fast, None, cpu(), disk())).remarks)
    dear = judge(Measured(fast, None, cpu(), disk(small=0.009, frame=0.01))).remarks
    assert any(
        line.startswith(
            "WARNING: a hit costs more than a miss. The cache disk takes 9.0 ms for a small read, the store 4.0 ms."
        )
        for line in dear
    )
    # A large read of the disk is not to be measured by a small one of the store.
    assert not any("WARNING" in line for line in judge(Measured(fast, None, cpu(), disk(frame=0.009))).remarks)
    slow = judge(Measured(fast, None, cpu(), disk(read=150))).remarks
    assert any("reading again is slower than reading first" in line for line in slow)


def test_what_the_figures_hide_is_said():
    remarks = judge(Measured(store([1, 1, 1], repeated=True), None, None, disk(direct=False))).remarks
    assert any("memory's" in line for line in remarks)
    assert any("read more than once" in line for line in remarks)


def test_growth_and_saturation():
    assert not grew_no_more([100])
    assert not grew_no_more([100, 90])  # once may be chance
    assert grew_no_more([100, 90, 105])
    assert not grew_no_more([100, 90, 150])
    steps = [Step(count, 1, 1.0, rate) for count, rate in ((1, 50.0), (2, 95.0), (4, 100.0), (8, 99.0))]
    assert saturates_at(steps) == 2


def test_percentiles_by_nearest_rank():
    assert percentile([3.0], 0.99) == 3.0
    assert [percentile([float(n) for n in range(1, 101)], share) for share in (0.5, 0.99, 1.0)] == [50.0, 99.0, 100.0]


def test_objects_and_ranges():
    objects = [Source("small", 100), Source("b", 20 << 20), Source("a", 30 << 20)]
    assert [one.key for one in enough(objects, 1 << 20)] == ["a"]
    assert [one.key for one in enough(objects, 1 << 30)] == ["a", "b"]  # what is smaller than a GET is left out
    assert cut([Source("a", (16 << 20) + 5)], 8 << 20) == [("a", 0, 8 << 20), ("a", 8 << 20, 8 << 20)]
    assert cut([Source("a", 9000)], 8 << 20) == [("a", 0, 9000)]


@pytest.mark.parametrize("size", [4 << 20, 64 << 20, 2 << 30, 1 << 40])
def test_a_plan_keeps_within_what_it_says(size):
    plan = Plan(25.0, size, PARTS, write=False)
    assert plan.step_bytes * len(CONNECTIONS) <= size
    assert 0 < plan.range_bytes <= min(8 << 20, plan.step_bytes)
    assert plan.disk_bytes % (1 << 20) == 0
    assert 1 << 20 <= plan.disk_bytes <= plan.space
    assert plan.mount_bytes + size <= plan.downloaded
    times = (
        plan.latency_seconds + 6 * plan.step_seconds + plan.cpu_seconds + 4 * plan.disk_seconds + 3 * plan.mount_seconds
    )
    assert times <= 25.0


def test_parts():
    assert parse_parts(None) == PARTS
    assert parse_parts("disk, store") == ("store", "disk")
    assert Plan(1.0, 4 << 20, ("cpu",), write=False).space == 0
    for bad in ("", "disc", "store,"):
        with pytest.raises(BadInputError, match="no part"):
            parse_parts(bad)
    for seconds, size in ((0.5, 1 << 30), (float("nan"), 1 << 30), (25.0, 1 << 20)):
        with pytest.raises(BadInputError, match="too few"):
            Plan(seconds, size, PARTS, write=False)
