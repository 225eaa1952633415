"""When a tree has no reads in flight: those of others over the same packs go on all the time."""

import pytest

from floe.mount import quiet
from floe.mount.state import PACKFS, MountRecord
from floe.store.errors import BusyError

DEVICE = "0:77"


class Answers:
    """A pack filesystem that is asked so often: (count, numbers), the last one for good."""

    def __init__(self, *answers):
        self.left = list(answers)

    def unanswered(self, packs):
        assert packs == ("p",)
        count, reads = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        return count, frozenset(reads)


@pytest.fixture
def ask(monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr(quiet, "packfs_device", lambda _: DEVICE)
    monkeypatch.setattr(quiet.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(quiet.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    record = MountRecord("t", PACKFS, ("p",), "boot", packfs_device=DEVICE)

    def ask(*answers, patience=1.0):
        quiet.ensure_quiet(record, tmp_path, Answers(*answers), None, patience=patience)
        return now[0]

    return ask


def test_without_reads_at_once(ask):
    assert ask((0, [])) == 0


def test_others_reads_begun_later_do_not_matter(ask):
    ask((2, [1, 2]), (2, [2, 3]), (3, [2, 4, 5]), (2, [6, 7]))


def test_a_read_that_stays_is_busy_and_counted_alone(ask):
    with pytest.raises(BusyError, match="has 1 reads in flight"):
        ask((3, [1, 2, 3]), (9, [1, 4, 5, 6, 7, 8, 9, 10, 11]))


def test_reads_that_nobody_has_taken_may_be_its_own(ask):
    with pytest.raises(BusyError, match="has 5 reads in flight"):
        ask((5, [1, 2]), (5, [3, 4]))
    ask((5, [1, 2]), (5, [3, 4]), (2, [3, 9]), (1, [9]), (1, [10]))


def test_a_worker_of_before_tells_no_numbers_and_without_patience_nobody_waits(ask):
    with pytest.raises(BusyError, match="has 2 reads in flight"):
        ask((2, []))
    ask((2, []), (1, []), (0, []))
    with pytest.raises(BusyError):
        ask((1, [1]), (0, []), patience=0)
