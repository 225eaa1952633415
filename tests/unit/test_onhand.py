"""Frames on hand: how long they stay, and what goes first."""

from types import SimpleNamespace

import pytest

from floe.store.frames import VerifiedFrame
from floe.store.ids import digest
from floe.store.onhand import OnHand

SIZE = 4096
PACK = "a" * 64


class Get:
    """A request for frames [first, first + count): counts who holds its memory."""

    def __init__(self, first, count, pack_id=PACK, *, streamed=True):
        self.pack_id, self.first, self.count, self.streamed = pack_id, first, count, streamed
        self.table = SimpleNamespace(frame_size=SIZE, memory=lambda _: SIZE)
        self.holders = self.given_back = 0

    def give_back(self, size):
        self.given_back += size

    def hold(self):
        self.holders += 1

    def drop(self):
        self.holders -= 1


class Loop:
    """A clock, and what is to be called later."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def run(self, until):
        while self.calls and min(self.calls, key=lambda call: call[0])[0] <= until:
            call = min(self.calls, key=lambda call: call[0])
            self.calls.remove(call)
            self.now = call[0]
            call[1]()
        self.now = until


@pytest.fixture
def loop():
    return Loop()


@pytest.fixture
def hand(loop):
    return OnHand(lambda: loop.now, lambda delay, call: loop.calls.append((loop.now + delay, call)))


def content(number):
    return bytes([number]) * SIZE


def arrive(hand, get):
    for number in range(get.first, get.first + get.count):
        hand.add(get, number, VerifiedFrame(content(number), digest(content(number))))
    return hand.of(get)


def test_pieces_are_all_or_nothing(hand):
    arrive(hand, Get(2, 3))
    assert [bytes(p) for p in hand.pieces(PACK, 2 * SIZE, 3 * SIZE)] == [content(2), content(3), content(4)]
    assert b"".join(hand.pieces(PACK, 3 * SIZE - 1, 2)) == content(2)[:1] + content(3)[:1]
    assert hand.pieces(PACK, 2 * SIZE - 1, 2) is None
    assert hand.pieces(PACK, 4 * SIZE, SIZE + 1) is None
    assert hand.pieces("b" * 64, 2 * SIZE, 1) is None


def test_a_frame_goes_when_it_was_passed_and_is_on_the_disk_in_either_order(hand):
    get = Get(0, 4)
    batch = arrive(hand, get)
    assert get.holders == 4
    hand.passed(PACK, 0, 2 * SIZE)
    assert hand.pieces(PACK, 0, SIZE)
    hand.settle(batch[1:3])
    assert hand.find(PACK, 1) is None
    assert hand.find(PACK, 2)
    hand.passed(PACK, 2 * SIZE, 3 * SIZE)
    assert hand.find(PACK, 2) is None
    hand.settle(batch)
    assert [hand.find(PACK, n) is not None for n in range(4)] == [False, False, False, True]
    assert (get.holders, get.given_back) == (1, 3 * SIZE)


def test_a_frame_that_was_read_to_its_end_goes_once_it_is_on_the_disk(hand):
    get = Get(0, 3)
    batch = arrive(hand, get)
    hand.pieces(PACK, SIZE // 2, SIZE)  # the end of the first, the beginning of the second
    hand.settle(batch)
    assert [hand.find(PACK, n) is not None for n in range(3)] == [False, True, True]


def test_a_frame_without_a_stream_goes_once_it_is_on_the_disk(hand):
    get = Get(0, 2, streamed=False)
    batch = arrive(hand, get)
    assert hand.pieces(PACK, 0, 2 * SIZE)
    hand.settle(batch)
    assert hand.pieces(PACK, 0, 1) is None
    assert (get.holders, get.given_back) == (0, 0)  # its memory is the reads' that wanted it


def test_one_stream_does_not_take_anothers_frames(hand):
    ours, theirs = Get(0, 2), Get(10, 2)
    hand.settle(arrive(hand, ours) + arrive(hand, theirs))
    hand.passed(PACK, 9 * SIZE, 12 * SIZE)
    assert ours.holders == 2
    assert theirs.holders == 0


def test_what_goes_first_when_memory_is_wanted(hand, loop):
    unread, read, lagging, spared = Get(0, 1), Get(1, 1), Get(2, 1), Get(3, 1)
    hand.settle(arrive(hand, unread) + arrive(hand, spared))
    read_batch, waiting = arrive(hand, read), arrive(hand, lagging)
    hand.settle(read_batch)
    hand.pieces(PACK, SIZE, 2 * SIZE)  # read and lagging
    order = []
    for seconds in (0, 0, 0, 0.2, 0):
        loop.now += seconds
        hand.make_room(1, (PACK, 3 * SIZE, 4 * SIZE))
        order.append([get.holders for get in (unread, read, lagging, spared)])
    # Read and on the disk; unread and on the disk; read, and waiting for the disk too long.
    assert order == [[1, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1]]
    assert hand.skipped == 1
    assert waiting[0].frame is None  # whoever still waits to write it does not keep its memory
    hand.settle(waiting)  # too late, and no error
    hand.make_room(1)
    assert spared.holders == 0


def test_no_more_goes_than_is_wanted(hand):
    get = Get(0, 8)
    hand.settle(arrive(hand, get))
    hand.make_room(2 * SIZE + 1)
    assert get.holders == 5


def test_nothing_waits_for_its_reader_for_ever(hand, loop):
    stored, stuck = Get(0, 1), Get(1, 1)
    hand.settle(arrive(hand, stored))
    (held,) = arrive(hand, stuck)
    loop.run(4)
    assert (stored.holders, stuck.holders) == (1, 1)
    loop.run(7)
    assert (stored.holders, stuck.holders) == (0, 0)
    assert held.frame is None
    assert hand.skipped == 1
    assert loop.calls == []  # nobody looks while there is nothing
    arrive(hand, stored)
    loop.run(20)
    assert stored.holders == 0


def test_a_frame_that_comes_twice_is_held_once(hand):
    first, again = Get(0, 1), Get(0, 1)
    arrive(hand, first)
    assert arrive(hand, again) == []
    assert (first.holders, again.holders) == (1, 0)


def test_closing_gives_all_memory_back(hand):
    get = Get(0, 3)
    batch = arrive(hand, get)
    hand.close()
    assert get.holders == 0
    assert all(held.frame is None for held in batch)
