"""Who is tried for workers' ends: a worker is played by what ends it."""

import random

import pytest

from floe.fuse import suspects
from floe.fuse.marks import ENDED, ON_TRIAL, OVERDUE, PASSED, absolved, blamed
from floe.fuse.suspects import judge


class PlayedSlots:
    """Marks in memory. `bad` requests end the worker, after `delay` seconds of a clock that only sleeping moves."""

    def __init__(self, number, bad, delay):
        self.marks = dict.fromkeys(range(number), 0)
        self.bad, self.delay = bad, delay
        self.pulse = [0]
        self.counted = []

    def mark(self, slot):
        return self.marks.get(slot, 0)

    def set_mark(self, slot, mark):
        self.marks[slot] = mark

    def change_mark(self, slot, off, on):
        self.marks[slot] = self.marks[slot] & ~off | on

    def count(self, name):
        self.counted.append(name)


class EndedError(Exception):
    """The worker is dead."""


class Clock:
    """`time`, for suspects.py."""

    def __init__(self):
        self.now = 0.0
        self.due = []

    def monotonic(self):
        return self.now

    def perf_counter_ns(self):
        return int(self.now * 1e9)

    def sleep(self, _seconds):
        self.now += 0.5
        if self.due and self.now >= min(self.due):
            raise EndedError


@pytest.mark.parametrize("seed", range(30))
def test_only_what_ends_workers_is_refused_however_many_wait_beside_it(seed, monkeypatch):
    rng = random.Random(seed)
    number = rng.choice([1, 2, 3, 8, 50, 300])
    bad = set(rng.sample(range(number), min(number, rng.choice([1, 1, 2, 3]))))
    slots = PlayedSlots(number, bad, rng.choice([0.0, 0.4, 3.0]))
    clock = Clock()
    monkeypatch.setattr(suspects, "time", clock)
    refused = []

    def handle(slot):
        if slot in slots.bad:
            clock.due.append(clock.now + slots.delay)
            if not slots.delay:
                raise EndedError

    def refuse(slot, _error):
        refused.append(slot)
        del slots.marks[slot]

    for _ in range(300):
        clock.due.clear()
        try:
            suspects.take_up(slots, sorted(slots.marks), handle, refuse)
        except EndedError:
            pass
        else:
            if not clock.due:
                break  # a worker that lives
        slots.marks = {slot: blamed(mark) for slot, mark in slots.marks.items()}
    assert set(refused) == bad
    assert slots.counted == ["poisonous"] * len(bad)


def test_what_is_overdue_is_refused_and_nothing_else():
    found = judge({1: OVERDUE, 2: 0, 3: 2})
    assert (found.overdue, found.guilty, found.tried, found.cleared) == ([1], [], [], [])


def test_a_kill_by_others_makes_nobody_guilty():
    mark = 5 | ON_TRIAL
    assert judge({1: absolved(mark)}).guilty == []
    assert judge({1: blamed(mark)}).guilty == [1]


def test_a_mark_keeps_what_it_says():
    assert blamed(OVERDUE) == OVERDUE
    assert blamed(15) == 15
    assert blamed(3 | PASSED) == 4 | PASSED
    assert blamed(3 | ENDED) == 4 | ENDED
