"""The webhook: who is heard, what is read of it, and what strangers, crowds and a slow queue do to the others."""

import contextlib
import io
import json
import socket
import threading

import pytest
from support import redis_server
from support.floe_node import wait_until
from support.notifying import SECRET, event, post, webhook

from floe.indexer import webhook as webhook_module
from floe.indexer.events import BODY_MAX
from floe.indexer.webhook import Webhook, parse_listen
from floe.store import places as places_module
from floe.store.errors import AccessDeniedError, BadInputError, UnavailableError
from floe.store.imagepolicy import ImageRule


def test_who_does_not_know_the_secret_is_refused(queue, tmp_path):
    news = event("registry.example", "app", "1")
    with webhook(queue, tmp_path) as hook:
        for wrong in ("", SECRET[:-1], SECRET + "x", SECRET.upper(), "\xe9" * 32):
            assert post(hook, news, secret=wrong) == 401
        assert post(hook, news, Authorization=SECRET) == 401
        assert queue.status().waiting == 0
        assert post(hook, news) == 202
        (tmp_path / "secret").write_text("another secret of some length")  # rotated
        assert post(hook, news) == 401
        assert post(hook, news, secret="another secret of some length") == 202
        (tmp_path / "secret").unlink()
        assert post(hook, news) == 401
    assert queue.status().waiting == 1


def test_only_whole_envelopes_within_bounds_are_read(queue, tmp_path):
    with webhook(queue, tmp_path) as hook:
        assert post(hook, b"no envelope") == 400
        assert post(hook, b"", Content_Length=str(BODY_MAX + 1)) == 413
        assert post(hook, b"", Content_Length="9" * 5000) == 413
        assert post(hook, b"", Content_Length="-1") == 411
        assert post(hook, b"", Transfer_Encoding="chunked") == 411
        assert post(hook, b"", method="GET", path="/healthz") == 200
        assert post(hook, b"", method="GET", path="/") == 404
        assert post(hook, event("registry.example", "app", "1")) == 202
    assert queue.status().waiting == 1


def test_an_event_that_nobody_can_name_holds_up_nothing_that_follows(queue, tmp_path, caplog):
    """A registry sends what was refused again, for ever, before anything else."""
    unnamed, named = event("registry", "app", "1"), event("registry.example", "app", "1")
    both = {"events": [*unnamed["events"], *named["events"]]}
    with webhook(queue, tmp_path) as hook:
        assert post(hook, unnamed) == 202
        assert queue.status().waiting == 0
        assert post(hook, both) == 202
    assert queue.take("a").job.ref == "registry.example/app:1"
    told = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert len(told) == 2
    assert "'registry/app:1' is no name of an image" in told[0]
    assert "give --webhook-registry HOST[:PORT]" in told[0]
    with webhook(queue, tmp_path, registry="registry.example") as hook:
        assert post(hook, event("registry", "app", "2")) == 202
    assert queue.take("a").job.ref == "registry.example/app:2"


def test_what_no_policy_wants_is_not_even_queued(queue, tmp_path):
    with webhook(queue, tmp_path, rules=(ImageRule("registry.example/prod/*"),)) as hook:
        assert post(hook, event("registry.example", "test/app", "1")) == 202
        assert post(hook, event("registry.example", "prod/app", "1")) == 202
    assert queue.take("a").job.ref == "registry.example/prod/app:1"
    assert queue.take("a") is None


def test_a_notification_that_cannot_be_kept_is_to_be_sent_again(tmp_path):
    class Away:
        def put_all(self, jobs):
            raise UnavailableError("index is away")

    with webhook(Away(), tmp_path) as hook:
        assert post(hook, event("registry.example", "app", "1")) == 503


@pytest.mark.parametrize(("text", "error"), [("", BadInputError), ("short", BadInputError), (None, AccessDeniedError)])
def test_a_secret_that_is_none_is_refused_before_anybody_listens(tmp_path, text, error):
    file = tmp_path / "secret"
    if text is not None:
        file.write_text(text)
    with pytest.raises(error):
        Webhook(("127.0.0.1", 0), file, None)


@pytest.mark.parametrize("text", ["", "5000", "host:", "host:x", "host:70000", "host:-1"])
def test_an_address_that_is_none_is_refused(text):
    with pytest.raises(BadInputError, match="no address to listen at"):
        parse_listen(text)


# Crowds


def connect(hook, stack, text=b""):
    """A connection that has sent `text`, and says nothing more."""
    made = stack.enter_context(contextlib.closing(socket.create_connection(hook.address, timeout=60)))
    made.sendall(text)
    return made


def head(length, secret=SECRET):
    return f"POST / HTTP/1.1\r\nAuthorization: Bearer {secret}\r\nContent-Length: {length}\r\n\r\n".encode()


@pytest.fixture
def patient(monkeypatch):
    """Nobody is given up for want of time."""
    monkeypatch.setattr(places_module, "_SECONDS", 600.0)
    monkeypatch.setattr(webhook_module, "_SILENCE", 600.0)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("said", [b"", b"POST / HT", head(5, secret="wrong" * 8)[:-2]])
def test_strangers_who_are_silent_or_slow_keep_nobody_out(queue, tmp_path, said):
    with webhook(queue, tmp_path) as hook, contextlib.ExitStack() as stack:
        silent = [connect(hook, stack, said) for _ in range(places_module._AT_ONCE + 8)]
        assert post(hook, event("registry.example", "app", "1")) == 202
        silent[0].settimeout(60)
        assert b" 202 " not in silent[0].recv(1000)  # the oldest made room
        assert post(hook, b"", method="GET", path="/healthz") == 200
    assert queue.status().waiting == 1


@pytest.mark.usefixtures("patient")
def test_who_is_known_keeps_its_place_whoever_comes(queue, tmp_path, monkeypatch):
    monkeypatch.setattr(places_module, "_AT_ONCE", 4)
    body = json_of(event("registry.example", "slow", "1"))
    with webhook(queue, tmp_path) as hook, contextlib.ExitStack() as stack:
        slow = connect(hook, stack, head(len(body)) + body[:10])
        wait_until(lambda: [one for one in list(hook._server._taken.values()) if one.known])
        for _ in range(20):
            connect(hook, stack)
        assert post(hook, event("registry.example", "app", "1")) == 202
        slow.sendall(body[10:])
        assert slow.recv(1000).startswith(b"HTTP/1.0 202 ")
    assert queue.status().waiting == 2


def json_of(value):
    return json.dumps(value).encode()


@pytest.mark.parametrize("said", [b"", head(50) + b"{"])
def test_who_falls_silent_is_given_up(queue, tmp_path, monkeypatch, said):
    """Also one who is known, and one who sends a byte now and then."""
    monkeypatch.setattr(places_module, "_SECONDS", 0.3)
    with webhook(queue, tmp_path) as hook, contextlib.ExitStack() as stack:
        one = connect(hook, stack, said)
        assert b" 202 " not in one.recv(1000)
        wait_until(lambda: not hook._server._taken)
        assert post(hook, event("registry.example", "app", "1")) == 202


def test_strangers_fill_no_memory(queue, tmp_path):
    with webhook(queue, tmp_path) as hook:
        assert post(hook, event("registry.example", "app", "1"), X="a" * 8000) == 202
    file = io.BytesIO(b"X: a\r\n" * 10_000 + b"body")
    bounded = places_module.Head(file)
    while bounded.readline(65_537):
        pass
    assert file.tell() == 16 << 10
    assert len(bounded.read(3)) == 3


# A slow queue


def test_an_envelope_goes_to_the_queue_in_one_step(queue, tmp_path):
    news = [event("registry.example", "app", str(number))["events"][0] for number in range(300)]
    with webhook(queue, tmp_path) as hook:
        assert post(hook, {"events": news[:1]}) == 202
        redis_server.standalone().forget_calls()
        assert post(hook, {"events": news}) == 202
    calls = redis_server.standalone().calls()
    assert calls["eval"] == 1
    assert calls["xadd"] == 299  # what waits is not put twice
    assert queue.status().waiting == 300


def test_while_the_queue_hangs_registries_are_told_to_send_again_and_nobody_waits_for_long(
    queue, tmp_path, monkeypatch
):
    monkeypatch.setattr(webhook_module, "_PUT_SECONDS", 0.1)
    go_on = threading.Event()

    class Hanging:
        def put_all(self, jobs):
            go_on.wait(60)
            return queue.put_all(jobs)

    news = event("registry.example", "app", "1")
    with webhook(Hanging(), tmp_path) as hook:
        assert [post(hook, news) for _ in range(webhook_module._PUTTING + 4)] == [503] * (webhook_module._PUTTING + 4)
        assert post(hook, b"", method="GET", path="/healthz") == 200
        go_on.set()
        wait_until(lambda: post(hook, news) == 202)
    assert queue.status().waiting == 1
