"""The circuit breaker and the budget of a pull, by a clock of our own."""

import pytest

from floe.snapshotter.breaker import Breaker, Budgets


@pytest.fixture
def clock():
    class Clock:
        now = 100.0

        def __call__(self):
            return self.now

    return Clock()


def test_breaker_opens_probes_and_closes(clock):
    breaker = Breaker(5, clock)
    assert breaker.allow()
    breaker.failed()
    assert breaker.state == "open"
    clock.now += 4.9
    assert not breaker.allow()
    clock.now += 0.2
    assert breaker.allow()
    assert breaker.state == "probing"
    assert not breaker.allow()
    breaker.failed()
    assert not breaker.allow()
    assert breaker.state == "open"
    clock.now += 5
    assert breaker.state == "probing"  # nobody asks, and nobody is held off
    assert breaker.allow()
    breaker.succeeded()
    assert (breaker.state, breaker.allow(), breaker.allow()) == ("closed", True, True)


def test_budget_is_handed_on_and_grows_back(clock):
    budgets = Budgets(2.0, free=0.25, refill=60, clock=clock)
    assert budgets.remaining(0) == 2.0
    assert budgets.after(2.0, 0.2) == 2.0
    assert budgets.after(2.0, 1.25) == 1.0
    assert budgets.after(1.0, 9) == 0.0
    budgets.keep(1, 0.5)
    assert budgets.remaining(1) == 0.5
    assert budgets.remaining(2) == 2.0
    clock.now += 30
    assert budgets.remaining(1) == 1.5
    clock.now += 30
    budgets.keep(3, 0.0)
    assert budgets.remaining(1) == 2.0
    assert budgets.remaining(0) == 2.0
    assert list(budgets._left) == [3]
