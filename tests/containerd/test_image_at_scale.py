"""An unmodified image of 500 MiB and 20,000 files, through real daemons, a real registry, both containerds and stores.

The tree that a container sees is compared with the one that containerd's own overlayfs snapshotter makes of the image.
"""

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support import fleet, scale_image, seaweed
from support.container_tree import ContainerTree, differences
from support.containerd import Containerd, versions
from support.floe_daemons import Daemons
from support.floe_node import Node, wait_until
from support.registry import running_registry
from support.slow_proxy import SlowProxy

from floe.store import layout

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

MIB = 1 << 20
FETCHED = 0.05  # of the image, at most, for a pull and `true`
KEEPER, WORKER, SNAPSHOTTER = 25 * MIB, 350 * MIB, 120 * MIB  # resident, at most
INDEX_CALLS = 2  # commands to Redis for a start, at most, for each layer and for the image
# A folder and SQLite, and a bucket in S3 with these indexes; each on one containerd, since neither knows of the other.
OLDEST, NEWEST = versions()[:1], versions()[-1:]
MACHINES = [*zip(OLDEST + NEWEST * 2, ("file", *fleet.INDEXES), strict=False)]


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    made = scale_image.build(tmp_path_factory.mktemp("image"))
    assert len(made.built.layers) == 3
    assert made.files >= scale_image.FILES
    assert made.content >= scale_image.BYTES
    return made


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    with running_registry(tmp_path_factory.mktemp("registry")) as made:
        yield made


@pytest.fixture(scope="module")
def reference(image, registry):
    return registry.push(image.built.source, "app:1")


@pytest.fixture(scope="module")
def unpacked(reference, registry, tmp_path_factory):
    """By version: what containerd's overlayfs snapshotter makes of the image, seen in a container."""
    seen = {}

    def look(version):
        if version not in seen:
            base = tmp_path_factory.mktemp("overlayfs")
            daemon = Containerd(version, base, registries=(registry.host,))
            try:
                cri = daemon.cri()
                cri.pull(reference)
                seen[version] = Seen(daemon, cri, reference, contents=True)
                scale_image.check_nasty(seen[version].facts)
            finally:
                daemon.stop()
        return seen[version]

    return look


class Seen:
    """What a container shows of an image: its tree, its files' sums if wanted, what its program prints."""

    def __init__(self, daemon, cri, reference, *, contents=False):
        pod = cri.run_pod(f"pod-{time.monotonic_ns()}")
        code, text = cri.run(pod, reference, [])
        assert code == 0, text
        self.printed = json.loads(text)
        container = cri.run_container(pod, reference, ["sleep", "1000"])
        tree = ContainerTree(daemon.pid_of(container))
        self.facts = tree.facts()
        self.contents = tree.contents() if contents else {}
        assert len(self.facts) > scale_image.FILES


class Indexed:
    """A store that holds the image, put there by `floe image index` on another machine; counts what nodes fetch."""

    def __init__(self, kind, base, reference):
        self.proxy = None
        self.node = Node(base)
        if kind in fleet.INDEXES:
            server = seaweed.running()
            self.node.environ |= fleet.environment(kind)
            self.proxy = SlowProxy(("127.0.0.1", urlsplit(server.endpoint).port))
            behind = self.node.environ["FLOE_STORE"].replace(str(urlsplit(server.endpoint).port), self.port)
            index = fleet.index_url(kind, user="node")
            self.environ = {**server.environment(), "FLOE_STORE": behind, "FLOE_INDEX": index}
        else:
            # A node needs the store alone.
            self.environ = {"FLOE_STORE": self.node.environ["FLOE_STORE"], "FLOE_INDEX": "none"}
        begun = time.monotonic()
        self.result = self.node.json("image", "index", "--plain-http", reference)
        self.seconds = time.monotonic() - begun

    def passed(self):
        """Bytes of S3's answers so far."""
        return self.proxy.passed if self.proxy else 0

    def fetched(self, packs, before):
        """Bytes that a node fetched of this store since `before`, given that its worker counted `packs` of packs.

        From S3 as the line counts them, headers too. In a folder nobody counts: all that is not packs is taken as read.
        """
        if self.proxy is not None:
            assert self.passed() - before >= packs
            return self.passed() - before
        objects = [path for path in self.node.store.rglob("*") if path.is_file()]
        kinds = [path.relative_to(self.node.store).parts[0] for path in objects]
        assert layout.PACKS in kinds
        return packs + sum(
            path.stat().st_size
            for path, kind in zip(objects, kinds, strict=True)
            if kind not in (layout.PACKS, layout.CHUNK_TABLES)  # the second is for pushing
        )

    @property
    def port(self):
        return self.proxy.address.rpartition(":")[2]

    def close(self):
        if self.proxy is not None:
            self.proxy.close()
        self.node.clean_up()


@pytest.fixture(scope="module")
def stores(reference, tmp_path_factory):
    """By kind: the indexed store, made when first asked for."""
    with contextlib.ExitStack() as stack:
        made = {}

        def store(kind):
            if kind not in made:
                made[kind] = Indexed(kind, tmp_path_factory.mktemp(kind), reference)
                stack.callback(made[kind].close)
            return made[kind]

        yield store


class Machine:
    """Floe's daemons and a containerd that pulls through them."""

    def __init__(self, version, base, registry, environ):
        with contextlib.ExitStack() as stack:
            self.daemons = Daemons(base / "h", environ)
            stack.callback(self.daemons.close)
            self.containerd = Containerd(
                version,
                base,
                snapshotter_address=self.daemons.address,
                snapshotter_root=self.daemons.root,
                registries=(registry.host,),
            )
            stack.callback(self.containerd.stop)
            self.cri = self.containerd.cri()
            self.close = stack.pop_all().close

    def seen(self, reference, **wanted):
        return Seen(self.containerd, self.cri, reference, **wanted)

    def pid(self, name):
        return int((self.daemons.run_dir / f"{name}.pid").read_text())

    def worker(self):
        """The counters of the pack filesystem's worker."""
        return self.daemons.json("status")["packfs"]["counters"]

    def peaks(self):
        """Resident memory of each daemon at its peak, in bytes."""
        pids = {
            "keeper": self.pid("keeper"),
            "worker": self.pid("worker"),
            "snapshotter": self.daemons.snapshotter.pid,
        }
        return {name: peak(pid) for name, pid in pids.items()}


def peak(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


@pytest.fixture
def machine(tmp_path, registry):
    with contextlib.ExitStack() as stack:

        def start(version, environ):
            made = Machine(version, tmp_path, registry, environ)
            stack.callback(made.close)
            return made

        yield start


@pytest.fixture
def tell(capsys, record_property):
    """Print a line that is seen when the tests pass, too, and put it into the report."""

    def tell(name, line):
        record_property(name, line)
        with capsys.disabled():
            print(f"\n  {name}: {line}", end="")

    return tell


@pytest.mark.parametrize(("version", "kind"), MACHINES, ids=str)
def test_indexed_image_is_pulled_lazily_and_is_the_same(
    version, kind, image, reference, unpacked, stores, machine, registry, tell
):
    expected = unpacked(version)
    store = stores(kind)
    whole = kind != "redis"  # the whole content from files and from S3: it does not hang on which
    node = machine(version, {**store.environ, "FLOE_READAHEAD": "0", "FLOE_PROFILES": "off"})
    downloaded = registry.blob_requests()
    before = store.passed()
    if kind in fleet.INDEXES:
        fleet.forget_calls(kind)
    begun = time.monotonic()
    node.cri.pull(reference)
    pulled = time.monotonic() - begun
    begun = time.monotonic()
    assert node.cri.run(node.cri.run_pod("true"), reference, ["true"]) == (0, "")
    ran = time.monotonic() - begun
    calls = fleet.calls(kind) if kind in fleet.INDEXES else 0
    counted = node.worker()
    fetched = store.fetched(counted["store_bytes"], before)
    assert counted["readahead_bytes"] == 0
    if kind in fleet.INDEXES:
        tell(f"{version} {kind} index", f"{calls} commands for {len(image.built.layers)} layers")
        assert 0 < calls <= INDEX_CALLS * (len(image.built.layers) + 1)
    tell(
        f"{version} {kind}",
        f"{image.content / MIB:.0f} MiB in {image.files} files, indexed in {store.seconds:.1f} s; pulled in {pulled:.2f} s, "
        f"`true` ran in {ran:.2f} s; fetched {fetched / MIB:.2f} MiB = {fetched / image.size:.2%}, "
        f"{counted['store_requests']} reads of packs",
    )
    assert counted["store_bytes"] > 0
    assert fetched < FETCHED * image.size
    seen = node.seen(reference, contents=whole)
    assert seen.printed == expected.printed
    assert differences(seen.facts, expected.facts) == {}
    if whole:
        assert differences(seen.contents, expected.contents) == {}
    layers = {layer["digest"] for layer in image.built.layers}
    assert not layers.intersection(registry.blob_requests()[len(downloaded) :])
    status = node.daemons.json("status")
    assert (status["snapshotter"]["snapshots"]["lazy"], sum(status["snapshotter"]["fallbacks"].values())) == (3, 0)
    assert {mount["mode"] for mount in status["mounts"]} == {"packfs"}
    peaks = node.peaks()
    tell(f"{version} {kind} memory", ", ".join(f"{name} {size / MIB:.1f} MiB" for name, size in peaks.items()))
    assert peaks["keeper"] < KEEPER
    assert peaks["worker"] < WORKER
    assert peaks["snapshotter"] < SNAPSHOTTER


@pytest.mark.parametrize("version", NEWEST, ids=str)  # the rules for ordinary layers are tested on each
def test_same_image_not_indexed_is_unpacked_and_says_so(version, image, reference, unpacked, machine, registry, tell):
    expected = unpacked(version)
    node = machine(version, {})
    downloaded = registry.blob_requests()
    begun = time.monotonic()
    node.cri.pull(reference)
    tell(f"{version} not indexed", f"pulled and unpacked in {time.monotonic() - begun:.2f} s")
    fetched = registry.blob_requests()[len(downloaded) :]
    assert {layer["digest"] for layer in image.built.layers} <= set(fetched)
    seen = node.seen(reference)
    assert seen.printed == expected.printed
    assert differences(seen.facts, expected.facts) == {}
    status = node.daemons.json("status")["snapshotter"]
    assert status["fallbacks"]["not_indexed"] == 3
    assert status["snapshots"]["lazy"] == 0
    log = node.daemons.log("snapshotter").read_text()
    assert log.count("is unpacked the ordinary way, reason not_indexed") == 3


def test_the_second_machine_has_what_a_start_reads_before_it_is_read(
    reference, stores, registry, tmp_path_factory, tell
):
    store = stores("file")
    profiles = store.node.store / layout.TREE_PROFILES
    environ = {**store.environ, "FLOE_READAHEAD": "0"}

    def start(wait):
        node = Machine(versions()[-1], tmp_path_factory.mktemp("machine"), registry, environ)
        try:
            node.cri.pull(reference)
            wait_until(lambda: wait(node.worker()))
            assert node.cri.run(node.cri.run_pod("app"), reference, [])[0] == 0
            found = node.worker()
            before = {path: path.read_bytes() for path in profiles.rglob("*") if path.is_file()}
            os.kill(node.pid("worker"), signal.SIGTERM)  # in good order: it says first what it recorded
            wait_until(lambda: any(path.read_bytes() != data for path, data in before.items()))
        finally:
            node.close()
        return found

    first = start(lambda _: True)
    second = start(lambda found: found["profile_frames"] and not found["memory_bytes"])
    tell(
        "start",
        f"{first['store_requests']} reads of packs, {first['store_bytes'] / MIB:.1f} MiB; with a profile "
        f"{second['store_requests']}, and {second['profile_frames']} frames, {second['readahead_bytes'] / MIB:.1f} MiB, before",
    )
    assert first["profiles_found"] == 0
    assert second["store_requests"] <= first["store_requests"] // 10
    assert second["store_bytes"] + second["readahead_bytes"] <= 1.3 * first["store_bytes"]
    layers = store.node.json("image", "profile", reference)["layers"]
    assert [layer["source"].rpartition("#")[2] for layer in layers] == ["0", "1", "2"]
    assert max(layer["starts"] for layer in layers) == 2
    assert "/app@" in store.node.floe("image", "profile", reference).stdout
