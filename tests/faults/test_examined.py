"""What the doctor finds, for a page: whoever asks is answered at once, however long a look takes and however it ends."""

import threading

import pytest
from support.floe_node import wait_until

from floe.cli import examined
from floe.cli.examined import Examined
from floe.doctor.finding import Finding

BAD = Finding("clock", "error", "an hour late", "timedatectl set-ntp true")


class Looks:
    """A look that waits until it is let go, and answers `found` or raises it."""

    def __init__(self):
        self.begun, self.go, self.found = 0, threading.Semaphore(0), [BAD]

    def __call__(self):
        self.begun += 1
        assert self.go.acquire(timeout=60)
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.fixture
def looks():
    return Looks()


def test_nobody_waits_for_a_look_and_one_goes_on_at_a_time(looks):
    shown = Examined(looks)
    for _ in range(5):
        assert (shown.problems(), shown.at) == ([], None)
    looks.go.release()
    wait_until(lambda: shown.at is not None)
    assert looks.begun == 1
    assert shown.problems() == [("error", "clock: an hour late", "timedatectl set-ntp true")]
    assert looks.begun == 1  # not so soon again


def test_what_is_well_and_what_the_page_follows_itself_is_left_out(looks):
    looks.found = [Finding("kernel", "ok", "fine"), Finding("store", "skipped", "none"), BAD]
    looks.found.append(Finding("snapshotter", "warning", "floe snapshotter: not running", "systemctl start"))
    looks.go.release()
    shown = Examined(looks)
    wait_until(lambda: shown.problems() and shown.at)
    assert [problem.text for problem in shown.problems()] == ["clock: an hour late"]


def test_what_was_mended_goes_with_the_next_look_and_a_look_that_fails_is_not_the_last(looks, monkeypatch, caplog):
    monkeypatch.setattr(examined, "_AGAIN", 0.0)
    monkeypatch.setattr(examined, "_AGAIN_SOON", 0.0)
    shown = Examined(looks)
    looks.go.release()
    wait_until(shown.problems)
    looks.found = RuntimeError("nobody thought of this")
    looks.go.release()
    wait_until(lambda: not shown.problems())
    assert "nobody thought of this" in caplog.text
    looks.found = [BAD]
    looks.go.release(2)
    wait_until(shown.problems)
    looks.go.release(100)  # nothing waits when the test is over
