"""Which reads are a stream, and how far ahead of it to fetch."""

import itertools

from floe.store.readahead import Streams

MIB = 1 << 20
LIMIT = 32 * MIB
END = 1 << 30


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def drain(stream, limit=LIMIT, end=END):
    pieces = []
    while (piece := stream.next_piece(limit, end)) is not None:
        pieces.append(piece)
        stream.ahead = piece[1]
    return pieces


def test_one_read_is_no_stream():
    assert drain(Streams(LIMIT).note("p", 0, MIB, waited=True)) == []


def test_two_reads_in_a_row_are():
    streams = Streams(LIMIT)
    streams.note("p", 0, MIB, waited=True)
    assert drain(streams.note("p", MIB, MIB, waited=True)) == [(2 * MIB, 3 * MIB), (3 * MIB, 4 * MIB)]


def test_small_reads_need_half_a_mebibyte():
    streams, reads = Streams(LIMIT), 0
    while not drain(streams.note("p", reads * 65536, 65536, waited=True)):
        reads += 1
    assert reads == 7


def test_the_window_grows_only_while_the_reader_waits():
    streams = Streams(LIMIT)
    windows = []
    for number in range(8):
        stream = streams.note("p", number * MIB, MIB, waited=True)
        windows.append(stream.window // MIB)
    assert windows == [2, 2, 8, 32, 32, 32, 32, 32]
    for number in range(8, 12):
        assert streams.note("p", number * MIB, MIB, waited=False).window == 32 * MIB
    pieces = drain(stream)
    assert max(stop - start for start, stop in pieces) == 8 * MIB
    assert stream.ahead <= stream.end + 32 * MIB


def test_the_window_grows_once_for_what_it_asked_for():
    streams = Streams(LIMIT)
    streams.note("p", 0, MIB, waited=True)
    stream = streams.note("p", MIB, MIB, waited=True)
    drain(stream)  # up to 4 MiB
    for quarter in range(8):  # the kernel's requests wait side by side, all for the same round trip
        stream = streams.note("p", 2 * MIB + quarter * MIB // 4, MIB // 4, waited=True)
    first = stream.window
    drain(stream)
    streams.note("p", 4 * MIB, MIB, waited=True)
    assert (first, stream.window) == (8 * MIB, 32 * MIB)  # it waits for what the larger window asked for


def test_the_window_ends_at_some_times_bandwidth_times_delay():
    clock = Clock()
    streams = Streams(512 * MIB, clock)
    streams.took(0.05)
    for number in range(300):
        stream = streams.note("p", number * MIB, MIB, waited=True)
        drain(stream, 512 * MIB)
        clock.now += 0.02  # 50 MiB a second, in 50 ms: 2.5 MiB
    assert 16 * MIB < stream.window < 32 * MIB
    streams.took(0.01)  # less delay makes no window smaller: what was learned before may come again
    assert streams.note("p", 300 * MIB, MIB, waited=True).window == stream.window


def test_a_stream_that_was_left_begins_small_where_it_got_to():
    streams = Streams(LIMIT)
    for number in range(6):
        stream = streams.note("p", number * MIB, MIB, waited=True)
        drain(stream)
    assert stream.window == 32 * MIB
    stream.left(9 * MIB)
    assert (stream.ahead, stream.window) == (9 * MIB, 8 * MIB)
    stream.left(0)
    assert stream.ahead == stream.end


def test_pieces_adjoin_and_end_with_the_pack():
    streams = Streams(LIMIT)
    streams.note("p", 0, MIB, waited=True)
    pieces = drain(streams.note("p", MIB, MIB, waited=True), end=3 * MIB + 4096)
    assert pieces == [(2 * MIB, 3 * MIB), (3 * MIB, 3 * MIB + 4096)]


def test_a_small_limit_is_kept():
    streams = Streams(256 << 10)
    streams.note("p", 0, MIB, waited=True)
    stream = streams.note("p", MIB, MIB, waited=True)
    assert drain(stream, 256 << 10) == [(2 * MIB, 2 * MIB + (256 << 10))]


def test_reads_out_of_order_are_one_stream():
    streams = Streams(LIMIT)
    for number in (1, 0, 3, 2, 5, 4):
        stream = streams.note("p", number * MIB, MIB, waited=True)
    assert (stream.start, stream.end) == (0, 6 * MIB)


def test_two_readers_of_a_pack_are_two_streams():
    streams = Streams(LIMIT)
    for number in range(4):
        low = streams.note("p", number * MIB, MIB, waited=True)
        high = streams.note("p", 512 * MIB + number * MIB, MIB, waited=True)
    assert low is not high
    assert drain(low)[0][0] == 4 * MIB
    assert drain(high)[0][0] == 516 * MIB
    assert len(list(streams.marks("p"))) == 2


def test_random_reads_make_no_stream():
    streams = Streams(LIMIT)
    for number in (50, 3, 90, 20, 70, 11):
        assert drain(streams.note("p", number * MIB, 4096, waited=True)) == []
    assert list(streams.marks("p")) == []


def test_requests_end_on_boundaries_of_their_size():
    streams, pieces = Streams(LIMIT), []
    at = 300 << 10  # nothing of the reader's is aligned
    while at < 100 * MIB:
        pieces += drain(streams.note("p", at, 700 << 10, waited=True))
        at += 700 << 10
    assert all(before[1] == after[0] for before, after in itertools.pairwise(pieces))
    assert {stop % MIB for _, stop in pieces} == {0}
    large = [piece for piece in pieces if piece[0] > 48 * MIB]  # the window is at its largest
    assert all(start % (8 * MIB) == 0 and stop - start == 8 * MIB for start, stop in large)


def test_a_read_that_touches_a_mark_gets_the_next_piece():
    streams = Streams(LIMIT)
    streams.note("p", 0, MIB, waited=True)
    stream = streams.note("p", MIB, MIB, waited=True)
    drain(stream)
    ((start, stop),) = streams.marks("p")
    assert start < stop
    offset = stream.end
    while offset + MIB <= start:  # answered from the cache, not reported
        offset += MIB
    assert drain(streams.note("p", offset, MIB, waited=False))


def test_what_a_stream_left_behind_is_told_once_in_large_pieces():
    streams, told = Streams(LIMIT), []
    for number in range(40):
        passed = streams.note("p", number * MIB, MIB, waited=True).passed()
        if passed is not None:
            told.append(passed)
    # From its second read on, as far as reads out of order may still come.
    assert told[0][0] == MIB
    assert all(first[1] == second[0] for first, second in itertools.pairwise(told))
    assert all(stop - start >= 8 * MIB for start, stop in told)
    assert told[-1][1] <= 38 * MIB
    assert len(told) == 4


def test_random_reads_leave_nothing_behind():
    streams = Streams(LIMIT)
    assert {streams.note("p", n * 64 * MIB, 4096, waited=True).passed() for n in (5, 3, 9, 2, 7)} == {None}
