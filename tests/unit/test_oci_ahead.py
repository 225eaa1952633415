"""A stream read ahead by a thread: the same bytes, errors in their place, no more held than allowed, nothing left running."""

import threading

import pytest

from floe.ingest.oci.ahead import Ahead

SECONDS = 30


@pytest.mark.parametrize("size", [1, 1000, 3 << 20])
def test_the_same_bytes_come_out(size):
    pieces = [bytes([number]) * size for number in range(20)]
    with Ahead(iter(pieces)) as ahead:
        assert b"".join(ahead) == b"".join(pieces)


def test_nothing_comes_out_of_nothing():
    with Ahead(iter(())) as ahead:
        assert list(ahead) == []


def test_an_error_comes_behind_what_was_read_before_it():
    def pieces():
        yield bytes(1 << 20)
        raise LookupError("here")

    taken = []
    with pytest.raises(LookupError, match="here"), Ahead(pieces()) as ahead:
        taken.extend(ahead)
    assert taken == [bytes(1 << 20)]


def test_no_more_is_read_than_may_be_held():
    reading = threading.Semaphore(0)
    read = []

    def pieces():
        for number in range(10):
            read.append(number)
            reading.release()
            yield bytes(1 << 20)

    with Ahead(pieces(), held=2 << 20) as ahead:
        for _ in range(3):  # two are held, the third waits for room
            assert reading.acquire(timeout=SECONDS)
        assert not reading.acquire(timeout=0.1)
        assert len(read) == 3
        assert sum(map(len, ahead)) == 10 << 20


def test_who_leaves_early_leaves_nothing_running():
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield bytes(1 << 20)
        finally:
            closed.set()

    with Ahead(endless()) as ahead:
        assert next(iter(ahead)) == bytes(1 << 20)
    assert closed.is_set()
    assert not any(thread.name == "floe-ahead" for thread in threading.enumerate())
