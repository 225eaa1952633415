"""Addresses of an index in Redis, the names of its keys, and what is read out of INFO. No I/O."""

import pytest

from floe.store.errors import BadInputError
from floe.store.ids import digest
from floe.store.index import open_index
from floe.store.index.redis.address import RedisAddress
from floe.store.index.redis.facts import Facts
from floe.store.index.redis.keys import Keys, chunk_field, encode_block, generation, places


def test_a_whole_address():
    text = "rediss://floe:p%40ss@one:7000,[::1],two?ca=/ca.pem&sentinel=main&sentinel_password_file=/s&prefix=team"
    address = RedisAddress.parse(text)
    assert address.hosts == (("one", 7000), ("::1", 26379), ("two", 26379))
    assert (address.tls, address.user, address.password) == (True, "floe", "p@ss")
    assert (address.option("ca"), address.option("sentinel"), address.prefix) == ("/ca.pem", "main", "team")


def test_a_short_address():
    address = RedisAddress.parse("redis://host")
    assert address == RedisAddress((("host", 6379),))
    assert (address.prefix, address.shown) == ("floe", "redis://host:6379")


def test_no_secret_is_ever_shown():
    address = RedisAddress.parse("rediss://:s3cret@[::1]:1?ca=/x")
    assert address.shown == "rediss://[::1]:1"
    for text in (repr(address), open_index("redis://user:s3cret@host").url):
        assert "s3cret" not in text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("redis://", "HOST"),
        ("redis://user:s3cret@", "HOST"),
        ("redis://host:0", "HOST"),
        ("redis://host:65536", "HOST"),
        ("redis://host,", "HOST"),
        ("redis://host/1", "database 0"),
        ("redis://host#x", "HOST"),
        ("redis://host?db=1", "unknown option 'db'"),
        ("redis://host?prefix=a&prefix=b", "twice"),
        ("redis://host?prefix=", "without a value"),
        ("redis://host?prefix={x}", "prefix"),
        ("redis://host?ca=/x", "TLS"),
        ("redis://user@host?iam=memorydb&name=n", "TLS"),
        ("rediss://host?ca=x.pem", "absolute"),
        ("rediss://host?cert=/x", "'key'"),
        ("redis://user:s3cret@host?password_file=/x", "both"),
        ("redis://host?sentinel_password_file=/x", "'sentinel'"),
        ("rediss://user@host?iam=rds&name=n", "none of"),
        ("rediss://host?iam=memorydb&name=n", "user and a name"),
        ("rediss://user@host?iam=memorydb", "user and a name"),
        ("rediss://user:s3cret@host?iam=memorydb&name=n", "token"),
        ("rediss://host?region=r", "'iam'"),
        ("rediss://user:hunter?s3cret@host", "behind"),
        ("redis://:?ca=s3cret@host", "behind"),
        ("valkeys://user:s3cret@host", "unknown kind 'valkeys'"),
        ("REDISS://user:s3cret@host", "unknown kind"),
    ],
)
def test_addresses_that_are_refused(text, told):
    with pytest.raises(BadInputError, match=told) as caught:
        open_index(text)
    assert "s3cret" not in str(caught.value) + caught.value.hint


def test_a_key_has_one_tag_and_the_store_in_it():
    one, two = Keys("floe", "store-a"), Keys("floe", "store-b")
    names = [one.packs(0xA1), one.chunks(0xA1, 0xB2), one.ref("refs/layers/x"), one.filling]
    assert [name.partition("{")[2].partition("}")[0] for name in names] == ["a1", "a1", "refs/layers/x", "00"]
    assert all(name.count("{") == name.count("}") == 1 and name.startswith("floe:") for name in names)
    assert len({*names, two.packs(0xA1), two.chunks(0xA1, 0xB2), two.ref("refs/layers/x"), two.filling}) == 8


def test_places_come_back():
    value = b"12345678" + encode_block(0) + b"abcdefgh" + encode_block((1 << 20) - 1)
    assert list(places(value)) == [(b"12345678", 0), (b"abcdefgh", (1 << 20) - 1)]
    assert list(places(b"short")) == []
    chunk = digest(b"x"), 4 << 20
    assert chunk_field(chunk) == chunk[0][2:] + bytes([0, 0x40, 0, 0])


def test_a_generation_ends_with_any_marker():
    keys = Keys("floe", "store-a")
    markers = [keys.new_marker() for _ in range(256)]
    assert len(set(markers)) == 256
    assert all(keys.owns(marker) for marker in markers)
    assert not Keys("floe", "store").owns(markers[0])
    changed = [*markers[:-1], keys.new_marker()]
    assert generation(markers) == generation(list(markers)) != generation(changed)


def test_what_info_says():
    healthy = {"redis_version": "7.0.0", "run_id": "1", "role": "master", "maxmemory_policy": "noeviction"}
    assert Facts.of([healthy]).warning("url") is None
    mixed = Facts.of([healthy, {**healthy, "run_id": "2", "maxmemory_policy": "allkeys-lru", "evicted_keys": 5}])
    assert (mixed.evicts, mixed.policy, mixed.evicted) == (True, "allkeys-lru", {"1": 0, "2": 5})
    assert "allkeys-lru" in mixed.warning("url")
    assert mixed.evicted_since({})
    assert mixed.evicted_since({"2": 4})
    assert not mixed.evicted_since({"2": 5})
    full = Facts.of([{**healthy, "used_memory": 11, "maxmemory": 10}, {**healthy, "used_memory": 99}])
    assert (full.full, full.replica, full.used_memory) == (True, False, 110)
    assert Facts.of([{**healthy, "role": "slave"}]).replica
    assert Facts.of([{"valkey_version": "8.0.1", "redis_version": "7.2.4"}]).version == "8.0.1"
    assert Facts.of([{}]).version == "unknown"  # a managed service may hide all of it
