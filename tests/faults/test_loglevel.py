import json
import logging
import time
from contextlib import closing

import pytest
from support.floe_node import wait_until

from floe.cli.logs import JsonFormatter, TextFormatter
from floe.store import loglevel
from floe.store.loglevel import Follower


@pytest.fixture(autouse=True)
def looks_often(monkeypatch):
    monkeypatch.setattr(loglevel, "_LOOK", 0.01)
    before = logging.getLogger().level
    logging.getLogger().setLevel(logging.WARNING)
    yield
    logging.getLogger().setLevel(before)


def test_a_wish_is_followed_until_it_is_over_or_taken_back(tmp_path):
    with closing(Follower(tmp_path)):
        loglevel.wish(tmp_path, "debug", 500)
        wait_until(lambda: loglevel.current() == "debug")
        loglevel.wish(tmp_path, "error", 500)
        wait_until(lambda: loglevel.current() == "error")
        loglevel.unwish(tmp_path)
        wait_until(lambda: loglevel.current() == "warning")
        loglevel.wish(tmp_path, "debug", 0.3)
        wait_until(lambda: loglevel.current() == "debug" or loglevel.wished(tmp_path) is None)
        wait_until(lambda: loglevel.current() == "warning")


def test_who_starts_later_follows_and_what_is_no_wish_changes_nothing(tmp_path):
    loglevel.wish(tmp_path, "debug", 500)
    with closing(Follower(tmp_path)):
        assert loglevel.current() == "debug"
    logging.getLogger().setLevel(logging.WARNING)
    for text in (b"", b"[]", b'{"level": "loud", "until": 1e12}', b'{"level": "debug", "until": "x"}', b"\xff"):
        (tmp_path / loglevel.FILE).write_bytes(text)
        with closing(Follower(tmp_path)):
            assert loglevel.current() == "warning"


def test_the_file_is_for_its_owner_alone_and_ends(tmp_path):
    loglevel.wish(tmp_path, "info", 60)
    assert (tmp_path / loglevel.FILE).stat().st_mode & 0o077 == 0
    level, until = loglevel.wished(tmp_path)
    assert level == "info"
    assert until <= time.time() + 60
    assert [path.name for path in tmp_path.iterdir()] == [loglevel.FILE]


def test_fields_of_a_line_are_in_json_and_in_the_text_unless_it_says_them():
    record = logging.makeLogRecord(
        {"msg": "layer %s is here", "args": ("sha256:ab",), "levelno": 20, "levelname": "INFO"}
    )
    record.layer, record.image = "sha256:ab", "registry.example/app:1"
    text = TextFormatter(journal=True).format(record)
    assert text.endswith("layer sha256:ab is here image=registry.example/app:1")
    found = json.loads(JsonFormatter().format(record))
    assert (found["layer"], found["image"]) == ("sha256:ab", "registry.example/app:1")
