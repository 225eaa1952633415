"""What a read waited for, as the fetcher's parts tell it."""

from types import SimpleNamespace

import pytest

from floe.store.errorkinds import KINDS, kind_of
from floe.store.errors import CancelledError, DeadlineError, ThrottledError, TransitDamageError, UnavailableError
from floe.store.waits import Stall, Waits

PACK = "p" * 64


def read(*, indexed=0.0, granted=0.0, source=None, flights=()):
    waiting = {number: SimpleNamespace(get=get) for number, get in enumerate(flights)}
    return SimpleNamespace(
        pack_id=PACK, offset=4096, length=100, submitted=1.0, indexed=indexed, granted=granted, source=source,
        flights=waiting,
    )  # fmt: skip


def get(*, ahead=False, streamed=False, error=None):
    return SimpleNamespace(ahead=ahead, streamed=streamed, error=error, began=1.5)


def told(one, error=None, now=2.0):
    found = []
    waits = Waits(lambda: now, found.append)
    waits.finished(one, error)
    return found, {cause for cause, data in waits.status()["read_seconds"].items() if any(data["counts"])}


@pytest.mark.parametrize(
    ("cause", "one"),
    [
        ("store", read(indexed=1.0, granted=1.0, source=get())),
        ("read_ahead", read(indexed=1.0, granted=1.0, source=get(ahead=True))),
        ("disk", read(indexed=1.0, granted=1.0)),
        ("store_error", read(indexed=1.0, granted=1.0, source=get(error=ThrottledError("slow down")))),
        ("damaged_in_transit", read(indexed=1.0, granted=1.0, source=get(error=TransitDamageError("bad")))),
        ("memory", read(indexed=1.0, granted=1.9, source=get())),
        ("memory", read(indexed=1.0)),
        ("pack_index", read(indexed=1.9, granted=1.9, source=get())),
        ("pack_index", read()),
    ],
)
def test_the_cause_is_what_most_of_the_wait_was_for(cause, one):
    found, counted = told(one)
    assert counted == {cause}
    detail = str(one.source.error) if one.source is not None and one.source.error else ""
    assert found == [Stall(PACK, 4096, 100, 1.0, cause, detail)]


def test_a_read_that_failed_is_told_with_its_error_and_what_it_still_waited_for():
    one = read(indexed=1.0, granted=1.0, flights=[get(error=UnavailableError("refused"))])
    found, counted = told(one, DeadlineError("did not arrive"))
    assert (counted, found[0].detail) == ({"store_error"}, "did not arrive")


def test_short_waits_are_counted_and_not_told_and_given_up_ones_neither():
    assert told(read(indexed=1.0, granted=1.0, source=get()), now=1.01) == ([], {"store"})
    assert told(read(indexed=1.0, granted=1.0), CancelledError("gone")) == ([], set())


def test_requests_are_told_apart_by_who_wanted_them():
    waits = Waits(lambda: 2.0)
    for one in (get(), get(ahead=True, streamed=True), get(ahead=True), get(ahead=True)):
        waits.requested(one)
    counted = {name: sum(found["counts"]) for name, found in waits.status()["request_seconds"].items()}
    assert counted == {"demand": 1, "readahead": 1, "background": 2}


def test_every_kind_of_error_has_a_name_and_the_special_one_wins():
    assert (kind_of(ThrottledError("")), kind_of(UnavailableError(""))) == ("throttled", "unavailable")
    assert kind_of(CancelledError("")) == KINDS[-1]
