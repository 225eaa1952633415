"""Three nodes and an image that nobody indexed: the first unpacks it and seeds it, the others start it lazily. Real daemons.

Each node is in a network namespace with a containerd of its own; registry, S3 server and Redis are those of one site.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from urllib.parse import urlsplit

import pytest
from support import redis_server, seaweed
from support.containerd import Containerd, each_version
from support.floe_daemons import Daemons, tree_listing
from support.floe_node import Node, wait_until
from support.images import add, build_oci, busybox
from support.netns import Network
from support.registry import Registry
from support.s3gate import S3Gate

from floe.store.catalog import Catalog
from floe.store.index import open_index
from floe.store.objects import open_store
from floe.upkeep.fsck import Checker

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
]


def nasty(tar):
    """What a directory does not tell of the tar that it was unpacked from, or hardly."""
    add(tar, "data/implied/deep/file", b"no directory above has an entry")
    add(tar, "data/z", b"one", mtime=1.25)
    add(tar, "data/a-link", kind=tarfile.LNKTYPE, link="data/z", mtime=2.75)
    add(tar, "data/setuid", b"su", mode=0o6755, uid=12, gid=34)
    add(tar, "data/pipe", kind=tarfile.FIFOTYPE)
    add(tar, "data/xattr", b"x", xattrs={"user.note": "kept"})
    add(tar, "data/holes", bytes(9 << 20) + b"end")
    add(tar, "data/empty", kind=tarfile.DIRTYPE, mode=0o1777)
    add(tar, "data/random", os.urandom(2_000_000))


def above(tar):
    add(tar, "data/.wh.setuid")
    add(tar, "data/implied/.wh..wh..opq")
    add(tar, "data/implied/other", b"alone here")
    add(tar, "bin/extra", b"of a directory that only lower layers name", mode=0o755)


class Machine:
    """A node in a network namespace: daemons, a containerd, and `floe seed` or an agent on request."""

    def __init__(self, stack, version, base, environ, registry, prefix):
        base.mkdir()
        self.daemons = Daemons(base / "h", environ, prefix=prefix)
        stack.callback(self.daemons.close)
        self.containerd = Containerd(
            version,
            base,
            snapshotter_address=self.daemons.address,
            snapshotter_root=self.daemons.root,
            registries=(registry,),
            prefix=prefix,
        )
        stack.callback(self.containerd.stop)
        self._stack, self._prefix = stack, prefix
        self.flags = ("--seed", "all", "--seed-rate", "none")
        # The sandbox's own image was never in a registry.
        self.flags += ("--image-policy", f'[{{name = "{registry}/*"}}]')
        self.flags += ("--containerd-socket", str(self.containerd.address), "--address", str(self.daemons.address))
        self.cri = self.containerd.cri()

    def seed(self):
        """One look; what became of each image."""
        done = subprocess.run(
            [*self._prefix, sys.executable, "-m", "floe", "seed", *self.flags, "--once", "--json"],
            env=self.daemons.environ, capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        return {outcome: names for outcome, names in found.items() if names}

    def start_agent(self):
        """It seeds by itself."""
        agent = self.daemons.start("agent", *self.flags)
        self._stack.callback(lambda: (agent.kill(), agent.wait()))
        return agent

    def listing(self, reference):
        return tree_listing(self.cri, self.cri.run_container(self.cri.run_pod("one"), reference, ["sleep", "1000"]))


@pytest.fixture
def world(tmp_path, monkeypatch):
    """(machine maker, gate that counts, registry, the image's name, its BuiltImage, a catalog)."""
    weed = seaweed.running()
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(Network())
        registry = Registry(tmp_path / "registry")
        stack.callback(registry.stop)
        host = network.reach(int(registry.host.rpartition(":")[2]))
        built = build_oci(tmp_path / "image", [busybox(), nasty, above], tag="1")
        name = registry.push(built.source, "unknown:1").replace(registry.host, host)
        gate = stack.enter_context(S3Gate(weed, {seaweed.ACCESS_KEY: None}))
        written = Counter()
        writing = threading.Lock()

        def note(action, key):
            if action == "s3:PutObject":
                with writing:
                    written[key] += 1

        gate.before, gate.written = note, written
        endpoint = f"http://{network.reach(urlsplit(gate.url).port)}"
        environ = weed.environment() | {
            "FLOE_STORE": gate.address(weed.bucket(), "fleet", path_style="true", endpoint=endpoint),
            "FLOE_INDEX": f"redis://{network.reach(redis_server.standalone().port)}",
            "FLOE_STORE_TIMEOUT": "30",
        }
        admin = Node(tmp_path)
        admin.environ |= environ
        admin.floe("store", "init")
        for key, value in weed.environment().items():
            monkeypatch.setenv(key, value)
        catalog = Catalog(open_store(environ["FLOE_STORE"]), open_index(None))
        stack.callback(catalog.close)

        def machine(version, number):
            named = environ | {"FLOE_NODE_NAME": f"n{number}"}
            return Machine(stack, version, tmp_path / f"m{number}", named, host, network.namespace().prefix)

        yield machine, gate, registry, name, built, catalog


def lasting(listing):
    """A listing without the times of directories: those that a tar only implies have the moment of unpacking, or what a lower layer says."""
    lines = [line.split() for line in listing.splitlines()]
    return [words[:4] + words[5:] if len(words) == 6 and words[1].startswith("4") else words for words in lines]


def sent(registry, built):
    """How often each layer left the registry."""
    counted = Counter(registry.blob_requests())
    return [counted[layer["digest"]] for layer in built.layers]


def packs(gate):
    return {key: count for key, count in gate.written.items() if "/packs/" in key}


@each_version(older=(pytest.mark.slow,))
def test_one_node_unpacks_an_image_and_the_others_start_it_lazily(version, world):
    machine, gate, registry, name, built, catalog = world
    a, b, c = (machine(version, number) for number in range(3))
    a.cri.pull(name)
    expected = lasting(a.listing(name))
    assert a.seed() == {"seeded": [name]}
    assert catalog.image(built.manifest_digest).names == (name,)
    for other in (b, c):
        other.cri.pull(name)
        assert lasting(other.listing(name)) == expected
    assert sent(registry, built) == [1] * len(built.layers)
    assert packs(gate)
    assert set(packs(gate).values()) == {1}
    assert b.seed() == c.seed() == {}  # they unpacked nothing of it


@pytest.mark.slow  # twice a minute an agent looks
@each_version()
def test_an_agent_seeds_what_its_node_unpacks_and_the_next_node_starts_it_lazily(version, world):
    machine, gate, registry, name, built, catalog = world
    a, b = machine(version, 0), machine(version, 1)
    agent = a.start_agent()
    a.cri.pull(name)
    wait_until(lambda: built.manifest_digest in {record.manifest_digest for record in catalog.images()}, seconds=180)
    assert catalog.image(built.manifest_digest).names == (name,)
    b.cri.pull(name)
    assert lasting(b.listing(name)) == lasting(a.listing(name))
    assert sent(registry, built) == [1] * len(built.layers)
    assert set(packs(gate).values()) == {1}
    agent.terminate()
    assert agent.wait(60) == 0


@each_version(older=(pytest.mark.slow,))
def test_two_nodes_that_race_upload_each_pack_once_and_publish_what_an_indexer_would(version, world, tmp_path):
    machine, gate, registry, name, built, catalog = world
    a, b, c = (machine(version, number) for number in range(3))
    for one in (a, b):
        one.cri.pull(name)
    found = {}
    threads = [threading.Thread(target=lambda one=one: found.update({one: one.seed()})) for one in (a, b)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outcomes = sorted(map(str, found.values()))
    assert str({"seeded": [name]}) in outcomes
    assert set(packs(gate).values()) == {1}
    c.cri.pull(name)
    assert lasting(c.listing(name)) == lasting(a.listing(name))
    assert sent(registry, built) == [2] * len(built.layers)  # to the two that had to unpack them
    # The same image by `floe image index`, into a store of its own: every pack and every tree is the same.
    folder = tmp_path / "other"
    folder.mkdir()
    other = Node(folder)
    other.floe("image", "index", "--plain-http", name)
    with contextlib.closing(Catalog(open_store(other.environ["FLOE_STORE"]), open_index(None))) as theirs:
        for kind in ("packs", "indexes", "chunks", "trees"):
            ours_by_key, theirs_by_key = (
                {info.key: bytes(one.store.get(info.key)) for info in one.store.list(kind)} for one in (catalog, theirs)
            )
            assert ours_by_key == theirs_by_key, kind
        for diff_id in built.diff_ids:
            assert catalog.layer(diff_id) is not None
            ours, others = catalog.layer(diff_id)[1], theirs.layer(diff_id)[1]
            assert (ours.tree, ours.packs, ours.sizes, ours.labels, ours.source) == (
                others.tree, others.packs, others.sizes, others.labels, others.source,
            )  # fmt: skip


@pytest.mark.slow  # the dead node's lease is waited for
@each_version()
def test_a_node_killed_while_it_seeds_leaves_nothing_half_and_another_takes_over(version, world):
    """The other one pulls when the first is dead, finds nothing that it could start lazily, and its agent does the rest."""
    machine, gate, registry, name, built, catalog = world
    a, b, c = (machine(version, number) for number in range(3))
    reached, go_on = threading.Event(), threading.Event()
    note = gate.before

    def stall(action, key):
        note(action, key)
        if action == "s3:PutObject" and "/trees/" in key and not go_on.is_set():
            reached.set()
            go_on.wait(400)

    gate.before = stall
    a.cri.pull(name)
    agent = a.start_agent()
    try:
        assert reached.wait(120)
        assert b.seed() == {}
        agent.send_signal(signal.SIGKILL)
        agent.wait()
    finally:
        go_on.set()
    before = packs(gate)
    assert before
    assert list(catalog.images()) == []
    assert [info.key for info in catalog.store.list("refs")] == []
    b.start_agent()
    b.cri.pull(name)
    assert sent(registry, built) == [2] * len(built.layers)
    wait_until(lambda: built.manifest_digest in {record.manifest_digest for record in catalog.images()}, seconds=240)
    assert set(packs(gate).values()) == {1}  # what the dead one stored is found, not stored again
    assert before.keys() <= packs(gate).keys()
    assert Checker(catalog, deep=True).run().faults == []
    c.cri.pull(name)
    assert lasting(c.listing(name)) == lasting(b.listing(name))
    assert sent(registry, built) == [2] * len(built.layers)
