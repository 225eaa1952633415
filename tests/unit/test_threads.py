"""Threads where there are none to be had for a while."""

import threading

import pytest

from floe.store.threads import started_pool, try_start


def refuse(_thread):
    raise RuntimeError("can't start new thread")


def test_a_thread_that_cannot_be_started_is_told_and_the_next_runs(monkeypatch, caplog):
    ran = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert try_start("floe-x", ran.set) is None
    assert "floe-x is begun later" in caplog.text
    try_start("floe-x", ran.set).join(10)
    assert ran.is_set()


def test_a_started_pool_takes_work_when_no_thread_can_be_started_any_more(monkeypatch):
    pool = started_pool(2, "floe-pool")
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert [pool.submit(int, text).result(10) for text in ("1", "2", "3")] == [1, 2, 3]
    pool.shutdown()
    with pytest.raises(RuntimeError):
        started_pool(2, "floe-pool")
