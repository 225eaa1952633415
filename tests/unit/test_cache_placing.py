"""Which directory a pack belongs to: by weight, the same everywhere, moved by nothing but its own directory."""

from collections import Counter

from floe.store.cache.placing import ranked
from floe.store.ids import hexdigest

PACKS = [hexdigest(str(number).encode()) for number in range(4000)]
GOLDEN = ["/b", "/b", "/a", "/c", "/c", "/b", "/c", "/a"]
WEIGHTS = {"/a": 1 << 30, "/b": 1 << 30, "/c": 2 << 30}


def test_packs_are_spread_by_weight():
    firsts = Counter(ranked(pack, WEIGHTS)[0] for pack in PACKS)
    assert all(abs(firsts[name] / len(PACKS) - weight / (4 << 30)) < 0.03 for name, weight in WEIGHTS.items())
    seconds = Counter(ranked(pack, WEIGHTS)[1] for pack in PACKS)
    assert min(seconds.values()) > len(PACKS) / 5


def test_the_order_of_the_list_means_nothing_and_is_always_the_same():
    assert all(ranked(pack, dict(reversed(WEIGHTS.items()))) == ranked(pack, WEIGHTS) for pack in PACKS[:200])
    assert [
        ranked(digit * 64, WEIGHTS)[0] for digit in "01234567"
    ] == GOLDEN  # else caches of before are not found at once


def test_a_directory_less_moves_only_its_own_packs():
    without = {name: weight for name, weight in WEIGHTS.items() if name != "/b"}
    for pack in PACKS:
        order = ranked(pack, WEIGHTS)
        assert ranked(pack, without) == [name for name in order if name != "/b"]
