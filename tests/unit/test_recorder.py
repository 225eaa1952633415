"""What is recorded, and when a recording ends; by a clock of the test's own."""

import pytest

from floe.store import recorder as module
from floe.store.recorder import Recorder

TREE, OTHER = "a" * 64, "b" * 64


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def recorder(clock):
    return Recorder(clock)


def note(recorder, pack, offset, length=4096):
    if pack in recorder.packs:
        recorder.note(pack, offset, length)


def test_nothing_is_noted_before_a_mount_or_of_other_packs(recorder):
    note(recorder, "p", 0)
    assert not recorder.packs
    recording = recorder.begin(TREE, ["p"])
    note(recorder, "q", 0)
    note(recorder, "p", 8192)
    assert [noted[:3] for noted in recording.reads] == [("p", 8192, 4096)]


def test_the_window_begins_with_the_first_read(recorder, clock):
    recorder.begin(TREE, ["p"])
    clock.now += module.WAIT - 1  # mounted while it was pulled, started later
    assert recorder.finished() == []
    for second in range(int(module.WINDOW)):
        note(recorder, "p", second * 4096)
        assert recorder.finished() == []
        clock.now += 1
    (recording,) = recorder.finished()
    assert len(recording.reads) == int(module.WINDOW)
    assert not recorder.packs
    assert not recorder.active


def test_nothing_new_for_a_while_ends_it(recorder, clock):
    recorder.begin(TREE, ["p"])
    note(recorder, "p", 0)
    for _ in range(int(module.QUIET) - 1):
        clock.now += 1
        note(recorder, "p", 0)  # again the same
        assert recorder.finished() == []
    clock.now += 1
    assert len(recorder.finished()) == 1


def test_what_is_never_read_is_given_up(recorder, clock):
    recorder.begin(TREE, ["p"])
    clock.now += module.WAIT
    (recording,) = recorder.finished()
    assert recording.reads == []


def test_a_shared_pack_is_noted_for_both(recorder):
    one, other = recorder.begin(TREE, ["p", "q"]), recorder.begin(OTHER, ["q"])
    note(recorder, "q", 0)
    note(recorder, "p", 0)
    assert (len(one.reads), len(other.reads)) == (2, 1)
    assert set(recorder.finished(all_of_them=True)) == {one, other}


def test_it_is_bounded(recorder, monkeypatch):
    monkeypatch.setattr(module, "_READS_MAX", 3)
    monkeypatch.setattr(module, "_RECORDINGS_MAX", 1)
    recording = recorder.begin(TREE, ["p"])
    assert recorder.begin(TREE, ["p"]) is None  # under way
    assert recorder.begin(OTHER, ["p"]) is None  # too many
    for number in range(5):
        note(recorder, "p", number * 4096)
    assert len(recording.reads) == 3
    assert recorder.finished() == [recording]


def test_a_stream_ends_it(recorder, monkeypatch):
    monkeypatch.setattr(module, "_BYTES_MAX", 1 << 20)
    recording = recorder.begin(TREE, ["p"])
    for number in range(3):
        note(recorder, "p", number << 20, 1 << 20)
    assert len(recording.reads) == 1
    assert recorder.finished() == [recording]
