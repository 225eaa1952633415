"""When reads go around a cache disk: by medians of enough samples, with hysteresis, and never to and fro."""

import logging
import random

import pytest

from floe.store.cache.bypass import Bypass, Costs
from floe.store.policy import ALWAYS, AUTO, NEVER

KIB = 1 << 10


class Machine:
    """Reads of `nbytes`, some of which wait for the disk and some for the store, as `bypass` says; time passes by hand."""

    def __init__(self, mode=AUTO, hit=0.040, miss=0.010):
        self.now = 1000.0
        self.hit, self.miss = hit, miss
        self.misses = Costs(lambda: self.now)
        self.bypass = Bypass(mode, "/cache", self.misses, lambda: self.now)
        self.from_disk = self.from_store = 0
        self.pause = 0.05  # seconds between reads

    def read(self, nbytes=128 * KIB, spread=1.0):
        if self.bypass.diverts:
            self.from_store += 1
            self.store(nbytes, self.miss * spread)
        else:
            self.from_disk += 1
            self.disk(nbytes, self.hit * spread)

    def disk(self, nbytes, seconds):
        self.now += self.pause
        self.bypass.hit(nbytes, seconds)

    def store(self, nbytes, seconds):
        self.now += self.pause
        self.misses.add(nbytes, seconds)
        self.bypass.look()

    def run(self, reads, **options):
        for _ in range(reads):
            self.read(**options)


def test_a_slow_disk_of_a_warm_cache_is_found_by_a_probe_and_gone_around(caplog):
    machine = Machine()
    machine.run(200)
    assert machine.bypass.status()["bypassed"]
    assert machine.from_disk < 40
    assert machine.bypass.changes == 1
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("A HIT COSTS MORE THAN A MISS on the cache disk of /cache: a read of 128 KiB takes 40.0 ms")
    assert caplog.records[0].levelno == logging.WARNING


def test_while_it_is_gone_around_the_disk_is_tried_now_and_then_and_comes_back(caplog):
    machine = Machine()
    machine.run(200)
    before = machine.from_disk
    machine.run(2400)  # two minutes
    assert 20 < machine.from_disk - before < 120
    assert machine.bypass.slow
    machine.hit = 0.002
    machine.run(1500)
    assert not machine.bypass.slow
    assert not machine.bypass.diverts
    assert "worth reading again" in caplog.records[-1].getMessage()


def test_few_samples_old_ones_and_single_slow_ones_say_nothing():
    machine = Machine(NEVER)
    for _ in range(7):
        machine.disk(4096, 1.0)
        machine.store(4096, 0.001)
    assert not machine.bypass.slow  # too few
    machine.now += 400
    machine.disk(4096, 1.0)
    machine.store(4096, 0.001)
    assert not machine.bypass.slow  # the others are old
    for _ in range(20):
        machine.disk(64 * KIB, 0.006)
        machine.store(64 * KIB, 0.010)
    for _ in range(9):
        machine.disk(64 * KIB, 60.0)
    assert not machine.bypass.slow  # the median is not moved by these


def test_sizes_are_told_apart():
    machine = Machine(NEVER)
    for _ in range(20):
        machine.disk(1 << 20, 0.050)  # a large read of the disk takes longer than a small one of the store
        machine.store(4096, 0.010)
    assert not machine.bypass.slow
    for _ in range(20):
        machine.store(1 << 20, 0.020)
    assert machine.bypass.slow


@pytest.mark.parametrize(("hit", "miss"), [(0.004, 0.0005), (0.015, 0.010), (0.010, 0.100)])
def test_a_disk_that_is_fast_or_not_clearly_slower_is_read(hit, miss):
    machine = Machine(hit=hit, miss=miss)
    machine.run(3000)
    assert machine.bypass.changes == 0
    assert machine.from_store < 120  # probes


def test_a_fast_disk_causes_no_request_at_all():
    machine = Machine(hit=0.001)
    machine.run(3000)
    assert machine.from_store == 0


def test_never_only_says_so_and_always_asks_nobody(caplog):
    never = Machine(NEVER)
    for _ in range(20):
        never.disk(4096, 0.04)
        never.store(4096, 0.01)
    assert never.bypass.slow
    assert not never.bypass.diverts
    assert not never.bypass.status()["bypassed"]
    assert "cache_bypass is 'never'" in caplog.text
    always = Machine(ALWAYS, hit=0.001)
    always.run(50)
    assert (always.from_disk, always.bypass.status()["bypassed"]) == (0, True)


def test_a_disk_whose_cost_is_about_a_misss_does_not_flap():
    draw = random.Random("flap")
    machine = Machine(hit=0.015, miss=0.010)
    for _ in range(72_000):  # an hour of reads
        machine.hit = 0.010 * draw.choice((0.5, 1.0, 1.5, 2.0, 3.0, 6.0))
        machine.read(spread=draw.uniform(0.5, 2.0))
    assert machine.bypass.changes <= 8  # each state lasts twice as long as the one before


def test_even_a_disk_that_changes_all_the_time_changes_it_ever_more_rarely():
    machine = Machine()
    machine.pause = 0.5
    for turn in range(720):  # ten hours, a minute each
        machine.hit = 0.5 if turn % 2 else 0.001
        machine.run(120)
    assert 2 <= machine.bypass.changes <= 24
