"""What `floe ui` serves holds no secrets, in whatever form it is served."""

import threading
import urllib.request
from contextlib import contextmanager

import pytest

from floe.cli.redact import MARK, Redactor
from floe.cli.timeline import Span, Start, Timeline
from floe.cli.ui_server import PageServer

SECRET = 'q7x"w<z>&k9v'
WRONG = f"GET https://user:{SECRET}@host/pack?X-Amz-Signature=deadbeef failed"


class Shown:
    """A node on which a request failed, of a start too."""

    def sample(self):
        return {"problems": [{"text": WRONG}]}

    def timeline(self, key, at):
        spans = (
            Span(0.0, 1.0, "layer", f"layer {SECRET} unpacked", WRONG),
            Span(1.0, 1.0, "stall", "<b>file</b>", WRONG, "<b>file</b>", 4096, "store_error"),
        )
        return Timeline(Start(key, "app:1", ("t",), at), at, 2.0, spans, {"store_requests": 4})


@contextmanager
def served(clean):
    server = PageServer("127.0.0.1", 0, Shown(), clean)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.close()
        thread.join()


@pytest.mark.parametrize("path", ["/state.json", "/start?key=k&at=1.0"])
def test_secrets_are_taken_out_of_all_that_is_served(path):
    with served(Redactor([SECRET]).value) as address, urllib.request.urlopen(address + path) as answer:
        said = answer.read().decode()
    for part in ("q7x", "k9v", "deadbeef"):
        assert part not in said
    assert MARK in said or "&lt;secret&gt;" in said


def test_a_start_without_secrets_is_shown_as_it_is():
    with (
        served(Redactor(["another"]).value) as address,
        urllib.request.urlopen(f"{address}/start?key=k&at=1.0") as answer,
    ):
        said = answer.read().decode()
    assert "&lt;b&gt;file&lt;/b&gt;" in said
    assert 'class="bar stall"' in said
    assert "4096" in said
    assert "store requests" in said
