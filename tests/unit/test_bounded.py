"""Work that is waited for only so long."""

import threading

import pytest

from floe.store.bounded import Bounded
from floe.store.errors import DeadlineError, NotFoundError

LATE = DeadlineError("late")


def test_what_the_work_returns_or_raises():
    bounded = Bounded("test", 1)
    assert bounded.call(lambda: 7, 10, LATE) == 7
    with pytest.raises(ZeroDivisionError):
        bounded.call(lambda: 1 // 0, 10, LATE)
    with pytest.raises(NotFoundError):
        bounded.call(lambda: (_ for _ in ()).throw(NotFoundError("x")), 10, LATE)


def test_work_that_hangs_is_left_and_keeps_its_place():
    bounded, go = Bounded("test", 1), threading.Event()
    with pytest.raises(DeadlineError, match="late"):
        bounded.call(go.wait, 0.01, LATE)
    with pytest.raises(DeadlineError, match="late"):
        bounded.call(lambda: pytest.fail("there was no place"), 0.01, LATE)
    go.set()
    assert bounded.call(lambda: 7, 10, LATE) == 7
