"""A mounted model over a faulty S3 server: EIO for the read concerned, in time, and right bytes once it is healed."""

from __future__ import annotations

import errno
import os
import random
import threading
import time

import pytest
from support import seaweed
from support.faultproxy import FaultProxy
from support.floe_node import Node, wait_until

from floe.store import layout
from floe.store.objects import open_store

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
CHUNK = 4 << 20
DEADLINE = 3  # seconds
# Of each kind one; tests/faults/test_faulty_server.py has them all.
FAULTS = ("http_500", "reset_mid_body", "stall_mid_body", "flipped_bit", "vanished")
DAMAGING = ("flipped_bit", "vanished")  # the first is believed in for a minute


@pytest.fixture(scope="module")
def proxy():
    with FaultProxy(seaweed.running().endpoint) as made:
        yield made


@pytest.fixture(scope="module")
def node(tmp_path_factory, proxy):
    """A model of a file of one chunk for each fault, with another chunk behind it, mounted at `place`."""
    server = seaweed.running()
    tmp_path = tmp_path_factory.mktemp("node")
    made = Node(tmp_path)
    made.direct = server.url(server.bucket(), "faulty")
    made.environ |= {
        **server.environment(),
        "FLOE_STORE": server.url(made.direct.partition("//")[2].partition("/")[0], "faulty", endpoint=proxy.url),
        "FLOE_READAHEAD": "0",
        "FLOE_READ_DEADLINE": str(DEADLINE),
        "FLOE_PROFILES": "off",
    }
    generator = random.Random(41)
    made.content = {fault: generator.randbytes(CHUNK) for fault in FAULTS}
    (tmp_path / "m").mkdir()
    for number, fault in enumerate(FAULTS):
        (tmp_path / "m" / f"{number:02} {fault}").write_bytes(made.content[fault])
        (tmp_path / "m" / f"{number:02} zz").write_bytes(generator.randbytes(CHUNK))
    (tmp_path / "m" / "zz").write_bytes(generator.randbytes(CHUNK))
    made.pushed = made.json("model", "push", tmp_path / "m", "m")
    made.place = tmp_path / "mnt"
    made.place.mkdir()
    made.floe("model", "mount", "m", made.place)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield made
    proxy.heal()
    made.clean_up()


def read(node, fault):
    with (node.place / f"{FAULTS.index(fault):02} {fault}").open("rb", buffering=0) as file:
        try:
            return os.pread(file.fileno(), CHUNK, 0)
        except OSError as error:
            return error.errno


def read_all(node):
    found = {}
    threads = [
        threading.Thread(target=lambda fault=fault: found.update({fault: read(node, fault)})) for fault in FAULTS
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE + 30)
    return found


def at(fault):
    """Where the file's only chunk lies in the pack: random content is stored as it is, in the order of the names."""
    start = 2 * FAULTS.index(fault) * CHUNK
    return start, start + CHUNK


@pytest.mark.slow
def test_lasting_faults_are_eio_in_time_and_pass_when_healed(node, proxy):
    (pack,) = node.pushed["packs"]
    faults = {fault: proxy.fault(fault, matches=pack["id"], part=at(fault)) for fault in FAULTS}
    began = time.monotonic()
    told = read_all(node)
    assert told == dict.fromkeys(FAULTS, errno.EIO)
    assert time.monotonic() - began < DEADLINE + 25
    assert [fault for fault, made in faults.items() if not made.hits] == []
    with (node.place / "00 zz").open("rb") as file:  # other content, all the while
        assert len(file.read()) == CHUNK
    proxy.heal()
    wrong = [fault for fault in FAULTS if fault not in DAMAGING and read(node, fault) != node.content[fault]]
    assert wrong == []


def test_damage_in_the_store_is_shown_and_healed(node):
    (pack,) = node.pushed["packs"]
    key = layout.pack_key(pack["id"])
    frame = 2 * len(FAULTS) * (CHUNK >> 20)  # of the last file, which nobody has read
    at = frame << 20
    store = open_store(node.direct)
    sound = bytes(store.get(key))
    store.put(key, sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
    with (node.place / "zz").open("rb") as file, pytest.raises(OSError, match="Input/output error"):
        file.read()
    record = layout.damage_key(pack["id"])
    wait_until(lambda: [info.key for info in store.list(layout.DAMAGE)] == [record])
    (shown,) = node.json("status")["damaged"]
    assert (shown["pack"], shown["sources"]) == (pack["id"], ["models/m"])
    assert frame in shown["frames"]
    assert f"damaged in the store: pack {pack['id']}, of models/m," in node.floe("status").stdout
    again = node.floe("model", "push", node.home / "m", "m").stdout
    assert f"healed pack {pack['id']}" in again
    assert bytes(store.get(key)) == sound
    assert list(store.list(layout.DAMAGE)) == []
    store.close()
