"""The settings file merged line by line, and where a setting comes from."""

import sys

import pytest
from bootstrap.errors import NodeError, UsageError
from bootstrap.plan import settings_text, written_by_us
from bootstrap.record import Record
from bootstrap.settings import HEADER, gather, keys_of, merge, shown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

THEIRS = """# ours since 2024
cache_size = '50%'   # half
model_policy = [
  { model = "llama", pin = true },  # store = "no key of the file"
]
log_level = "debug"

[made_up]
store = "in a table"
"""


def test_a_new_file():
    assert merge("", {"store": "s3://b/p"}) == HEADER + 'store = "s3://b/p"\n'


def test_other_lines_stay_byte_for_byte():
    merged = merge(THEIRS, {"store": "s3://b/p", "log_level": "info"})
    assert merged == 'store = "s3://b/p"\n' + THEIRS.replace('log_level = "debug"', 'log_level = "info"')
    assert tomllib.loads(merged)["made_up"] == {"store": "in a table"}


def test_twice_changes_nothing():
    once = merge(THEIRS, {"store": "s3://b/p"})
    assert merge(once, {"store": "s3://b/p"}) == once


def test_keys_are_those_before_the_first_table():
    assert set(keys_of(THEIRS)) == {"cache_size", "model_policy", "log_level"}


def test_a_key_is_taken_out():
    assert "cache_size" not in merge(THEIRS, {}, ("cache_size",))


@pytest.mark.parametrize("value", ['[\n  "a",\n]', '"""\na"""', "'''\na'''"])
def test_a_value_of_several_lines_is_left_to_people(value):
    with pytest.raises(NodeError, match="several lines"):
        merge(f"trusted_keys = {value}\n", {"trusted_keys": "x"})


@pytest.mark.parametrize("value", ["s3://b/p?ca=/x y", 'a"b\\c', "ü\U0001f600", "a\tb\x7f", "#no comment"])
def test_any_text_comes_back(value):
    merged = merge("a = 1\n", {"store": value})
    assert tomllib.loads(merged)["store"] == value
    assert "store" in keys_of(merged)


def test_a_file_without_a_last_line_end():
    assert tomllib.loads(merge("a = 1", {"store": "x"})) == {"a": 1, "store": "x"}


class Known:
    """A checker to whom all is good."""

    def keys(self):
        return ["store", "index", "cache_size", "root"]

    def check(self, given, environ):
        self.asked = given, environ


def test_flags_come_before_variables_before_metadata():
    values, sources, notes = gather(
        {"store": "s3://flag/"},
        {"FLOE_STORE": "s3://variable/", "FLOE_INDEX": "none", "FLOE_CACHE_SIZE": "", "PATH": "/bin"},
        {"floe-store": "s3://metadata/", "floe-index": "redis://x", "floe-cache-size": "3GiB", "ssh-keys": "x"},
        Known(),
    )
    assert values == {"store": "s3://flag/", "index": "none", "cache_size": "3GiB"}
    assert sources == {"store": "flag", "index": "environment", "cache_size": "metadata"}
    assert not notes


def test_unknown_metadata_is_said_and_ignored():
    values, _, (note,) = gather({}, {}, {"floe-owner": "me"}, Known())
    assert not values
    assert "floe-owner" in note


@pytest.mark.parametrize(
    ("flags", "environ", "metadata"),
    [
        ({"store": "ftp://x"}, {}, {}),
        ({}, {"FLOE_INDEX": "mysql://x"}, {}),
        ({}, {"FLOE_ROOT": "/data"}, {}),
        ({}, {}, {"floe-root": "/data"}),
    ],
)
def test_what_cannot_be_meant_is_refused(flags, environ, metadata):
    with pytest.raises(UsageError) as caught:
        gather(flags, environ, metadata, Known())
    assert caught.value.hint


def test_a_password_is_not_shown():
    assert shown("rediss://node:secret@host:6379?ca=/x") == "rediss://node:...@host:6379?ca=/x"
    assert shown("s3://bucket/a:b@c") == "s3://bucket/a:b@c"


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "node")


def test_what_people_changed_since_is_theirs(record):
    text, record.data["settings"] = settings_text("", {"cache_size": "70%"}, None, record)
    assert written_by_us("cache_size", keys_of(text), record.data["settings"])
    changed = text.replace("70%", "60%")
    assert not written_by_us("cache_size", keys_of(changed), record.data["settings"])
    again, _ = settings_text(changed, {}, None, record)
    assert again == changed
    asked, _ = settings_text(changed, {"cache_size": "50%"}, None, record)
    assert 'cache_size = "50%"' in asked
