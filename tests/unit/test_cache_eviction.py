"""What goes first, and how much."""

from array import array

from floe.store.cache.eviction import EMPTY, batch, oldest_first, shortage


def test_oldest_first_over_all_packs():
    packs = [array("I", [5, EMPTY, 1]), array("I", [EMPTY]), array("I", [3, 4]), array("I")]
    assert list(oldest_first(packs)) == [(0, 2), (2, 0), (2, 1), (0, 0)]


def test_a_pack_not_reached_is_not_walked():
    class Watched(list):
        walks = 0

        def __iter__(self):
            Watched.walks += 1
            return super().__iter__()

    packs = [Watched([1, 2]), Watched([10, 11])]
    plan = oldest_first(packs)
    assert [next(plan), next(plan)] == [(0, 0), (0, 1)]
    assert Watched.walks == 3  # the smallest of each, and one pack sorted


def test_shortage_is_the_worse_of_two_bounds():
    assert shortage(10, 90, 100, None, 0) == 0
    assert shortage(10, 95, 100, None, 0) == 5
    assert shortage(10, 0, None, 100, 95) == 5
    assert shortage(10, 95, 100, 100, 99) == 9
    assert shortage(10, 10**15, None, None, 5) <= 0


def test_a_batch_is_at_least_what_is_short():
    assert batch(100, 64) == 100
    assert batch(1, 6400) == 100
    assert batch(1, 1 << 50) == 64 << 20
    assert batch(1, None) == 64 << 20
