"""Threads that ask the store, where none can be started for a while."""

import threading

import pytest

from floe.snapshotter.lookups import LookUps
from floe.store.errors import UnavailableError


@pytest.fixture
def no_threads(monkeypatch):
    def start(_thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        yield patch


def test_without_threads_a_look_up_fails_and_later_ones_do_not(no_threads):
    look_ups = LookUps(2)
    for _ in range(5):
        with pytest.raises(UnavailableError, match="no thread can be started"):
            look_ups.start(lambda: 1).result(timeout=0)
    no_threads.undo()
    assert look_ups.start(lambda: 2).result(timeout=10) == 2


def test_who_has_a_thread_does_what_waits_when_no_other_can_be_started(monkeypatch):
    look_ups, gate = LookUps(2), threading.Event()
    first = look_ups.start(lambda: gate.wait(10))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda _thread: (_ for _ in ()).throw(RuntimeError("no more")))
        second = look_ups.start(lambda: 2)
    gate.set()
    assert (first.result(timeout=10), second.result(timeout=10)) == (True, 2)
