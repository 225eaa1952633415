"""Memory is shared: in order, within the bound, and no pack can take it all."""

import random

from floe.store.budget import Budget


def test_a_lease_is_granted_at_once_and_given_back():
    budget, leases = Budget(100), []
    budget.ask("p", 40, leases.append)
    assert (len(leases), budget.used) == (1, 40)
    leases[0].hold()
    leases[0].drop()
    assert budget.used == 40
    leases[0].drop()
    assert budget.used == 0


def test_one_pack_leaves_a_third_to_others():
    budget, first, second = Budget(90), [], []
    for _ in range(20):
        budget.ask("p", 10, first.append)
    assert len(first) == 6
    assert budget.waiting == 14
    budget.ask("q", 10, second.append)
    assert len(second) == 1


def test_who_waits_is_served_in_order():
    budget, order = Budget(30), []
    leases = []
    for number in range(6):
        budget.ask("p", 20, lambda lease, number=number: (order.append(number), leases.append(lease)))
    while leases:
        leases.pop().drop()
    assert order == list(range(6))
    assert (budget.used, budget.waiting) == (0, 0)


def test_more_than_everything_is_granted_alone():
    budget, leases = Budget(10), []
    budget.ask("p", 1000, leases.append)
    budget.ask("q", 1, leases.append)
    assert [lease.size for lease in leases] == [10]
    leases[0].drop()
    assert len(leases) == 2


def test_who_withdrew_is_passed_over():
    budget, leases = Budget(10), []
    budget.ask("p", 10, leases.append)
    gone = budget.ask("p", 10, leases.append)
    budget.ask("p", 5, leases.append)
    gone.withdrawn = True
    leases[0].drop()
    assert [lease.size for lease in leases] == [10, 5]
    assert budget.waiting == 0


def test_work_ahead_takes_only_what_nobody_misses():
    budget, leases = Budget(100), []
    lease = budget.try_lease("p", 50)
    assert lease is not None
    assert budget.try_lease("p", 1) is None
    lease.drop()
    budget.ask("p", 60, leases.append)
    budget.ask("p", 60, leases.append)
    leases[0].drop()
    assert budget.waiting == 0
    assert budget.try_lease("p", 10) is None


def test_everybody_is_served_in_the_end():
    source = random.Random(7)
    budget, held, granted = Budget(64), [], 0
    for _ in range(2000):
        if source.random() < 0.6:
            budget.ask(source.choice("pqr"), source.randint(1, 80), held.append)
        elif held:
            held.pop(source.randrange(len(held))).drop()
        assert budget.used <= 64
        assert held or not budget.waiting
    while held:
        held.pop().drop()
        granted += 1
    assert (budget.used, budget.waiting) == (0, 0)
    assert granted
