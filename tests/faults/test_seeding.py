"""Self-seeding without a containerd: which images a node gives away, who does it, and what it does when it may not."""

import contextlib
import datetime as dt
import json
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
from support import images, redis_server, seaweed
from support.floe_node import Node, wait_until
from support.signing import signer, signing, trusting
from support.stores import StoreWrapper

from floe.ingest.oci.image import index_image, index_resolved, open_source
from floe.ingest.oci.media import Descriptor
from floe.ingest.oci.source import resolve
from floe.seeding import seeder as seeder_module
from floe.seeding.containerd import StoredImage
from floe.seeding.duty import Seeding
from floe.seeding.gently import Pace, step_back
from floe.seeding.seeder import ALL, ASKED, FAILED, LABEL, LEFT, OFF, SEEDED, SeedConfig, Seeder
from floe.seeding.source import registry_name
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.errors import AccessDeniedError, CancelledError, NotFoundError, UnavailableError, UntrustedError
from floe.store.ids import chain_ids
from floe.store.imagepolicy import ImageRule
from floe.store.index import open_index
from floe.store.index.jobs import NODE, open_queue
from floe.store.objects.memory import MemoryStore
from floe.store.profile import Profile, Touch
from floe.store.profiles import ProfileStore, layer_source
from floe.store.progress import Adding

NAME = "registry.example/app:1"
K8S = "k8s.io"


class FakeNode:
    """A containerd that holds images of layouts. `unpacked`: chains by namespace; `lost`: blobs it no longer has."""

    def __init__(self):
        self.unpacked = {}
        self.lost = set()
        self.read_of = []
        self._images = {}

    def add(self, built, *names, namespace=K8S, unpacked=None):
        raw = (self._blobs(built) / built.manifest_digest.partition(":")[2]).read_bytes()
        target = Descriptor(images.MANIFEST, built.manifest_digest, len(raw))
        for name in names or (NAME,):
            self._images[namespace, name] = (built, target)
        chains = chain_ids(built.diff_ids) if unpacked is None else unpacked
        self.unpacked.setdefault(namespace, set()).update(chains)

    def ordinary_layers(self):
        return {namespace: frozenset(chains) for namespace, chains in self.unpacked.items()}

    def images(self, namespace):
        return [StoredImage(name, target) for (of, name), (_, target) in self._images.items() if of == namespace]

    def read(self, namespace, digest):
        self.read_of.append(digest)
        for (of, _), (built, _) in self._images.items():
            file = self._blobs(built) / digest.partition(":")[2]
            if of == namespace and digest not in self.lost and file.exists():
                data = file.read_bytes()
                yield data[: len(data) // 2]
                yield data[len(data) // 2 :]
                return
        raise NotFoundError(f"no blob {digest}")

    @staticmethod
    def _blobs(built):
        return built.directory / "blobs" / "sha256"


@pytest.fixture
def node():
    return FakeNode()


@pytest.fixture
def seed(catalog, queue, node, tmp_path):
    """Makes a seeder; one look of it."""

    def make(policy=ALL, rules=(), *, catalog=catalog, queue=queue, node=node):
        return Seeder(catalog, queue, node, SeedConfig(policy, tmp_path, tuple(rules)))

    return make


def look(seeder):
    return {outcome: names for outcome, names in seeder.round(threading.Event()).items() if names}


def an_image(tmp_path, *contents, **options):
    contents = contents or ({"a": os.urandom(5000)}, {"b/c": b"c"})
    return images.build_oci(tmp_path / f"image-{os.urandom(4).hex()}", [images.files(c) for c in contents], **options)


def published(store, *, without=()):
    """All objects by key, but for times and names of where they come from."""
    found = {}
    for info in store.list(""):
        if info.key == layout.STORE_KEY or info.key.startswith(("gc/", "profiles/", *without)):
            continue
        found[info.key] = bytes(store.get(info.key))
    return found


def test_what_is_seeded_is_what_an_indexer_would_publish_byte_for_byte(seed, node, catalog, tmp_path, monkeypatch):
    _stop_the_clock(monkeypatch)
    built = an_image(tmp_path)
    node.add(built)
    assert look(seed()) == {SEEDED: [NAME]}
    with contextlib.closing(Catalog(MemoryStore(), open_index(None))) as other:
        source = open_source(built.source)
        source.name = NAME  # as if it had come from that registry
        index_resolved(other, resolve(source), spool_dir=tmp_path)
        ours, theirs = published(catalog.store), published(other.store)
    assert {key.partition("/")[0] for key in ours} == {"packs", "indexes", "chunks", "trees", "manifests", "refs"}
    assert ours.keys() == theirs.keys()
    assert [key for key in theirs if ours[key] != theirs[key]] == []
    assert json.loads(ours[layout.image_ref_key(built.manifest_digest)])["names"] == [NAME]


class Shown:
    """A Progress: what there is to do, and what is done."""

    whole = done = 0

    def total(self, nbytes):
        self.whole = nbytes

    def advance(self, nbytes):
        self.done += nbytes


def test_the_bytes_of_all_that_is_seeded_are_told_to_whoever_shows_them(seed, node, tmp_path):
    built = [an_image(tmp_path), an_image(tmp_path)]
    for number, image in enumerate(built):
        node.add(image, f"registry.example/shown:{number}")
    seeder, shown = seed(), Shown()
    seeder.shown = Adding(shown)
    assert len(look(seeder)[SEEDED]) == 2
    assert shown.whole == shown.done > max(sum(layer["size"] for layer in image.layers) for image in built)


def _tar(*entries):
    def fill(tar):
        for name, content in entries:
            images.add(tar, name, content, kind=tarfile.REGTYPE if content else tarfile.DIRTYPE, mode=0o755)

    return fill


@pytest.mark.parametrize(
    ("one", "other", "where"),
    [
        # A directory that is named, and one that is only implied: its attributes are those of the layers below.
        ([("data", None), ("data/file", b"x")], [("data/file", b"x")], "labels"),
        # The order of entries is that of content in packs.
        ([("a", b"a" * 9000), ("b", b"b" * 9000)], [("b", b"b" * 9000), ("a", b"a" * 9000)], "packs"),
    ],
)
def test_two_tars_may_unpack_to_one_directory_and_are_two_layers(tmp_path, one, other, where):
    """So no directory can tell which of the two it came from (ADR 16)."""
    found, unpacked = [], []
    for number, entries in enumerate((one, other)):
        built = images.build_oci(tmp_path / f"tar-{number}", [_tar(*entries)])
        folder = tmp_path / f"unpacked-{number}"
        folder.mkdir()
        subprocess.run(["tar", "-xp", "-C", folder], input=images.make_tar(_tar(*entries)), check=True, timeout=60)
        for path in folder.rglob("*/"):
            os.utime(path, (images.MTIME, images.MTIME))
        unpacked.append(
            {
                path.relative_to(folder): (path.stat().st_mode, path.is_file() and path.read_bytes())
                for path in folder.rglob("*")
            }
        )
        with contextlib.closing(Catalog(MemoryStore(), open_index(None))) as catalog:
            index_image(catalog, built.source, spool_dir=tmp_path)
            found.append(catalog.layer(built.diff_ids[0])[1])
    assert unpacked[0] == unpacked[1]
    assert getattr(found[0], where) != getattr(found[1], where)


def _stop_the_clock(monkeypatch):
    class Stopped(dt.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 1, tzinfo=tz)

    for module in ("floe.ingest.publish", "floe.ingest.oci.image", "floe.store.catalog"):
        monkeypatch.setattr(f"{module}.datetime", Stopped)


def test_a_second_look_finds_nothing_to_do(seed, node, catalog, tmp_path):
    node.add(an_image(tmp_path))
    seeder = seed()
    look(seeder)
    node.read_of.clear()
    before = published(catalog.store)
    assert look(seeder) == {}
    assert node.read_of == []
    assert look(seed()) == {}  # another process, too
    assert published(catalog.store) == before


# Which images


def test_off_is_off(seed, node, tmp_path):
    node.add(an_image(tmp_path))
    assert look(seed(OFF)) == {}
    assert node.read_of == []


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [(None, False), ({"io.floe.seed": "true"}, True), ({"io.floe.seed": "no"}, False), ([], False)],
)
def test_by_label_only_what_says_so(seed, node, tmp_path, labels, wanted):
    node.add(an_image(tmp_path, config={"config": {"Labels": labels}}))
    assert look(seed(LABEL)) == ({SEEDED: [NAME]} if wanted else {})


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (ImageRule("registry.example/*"), True),
        (ImageRule("registry.example/*", never=True), False),
        (ImageRule("elsewhere/*"), False),
        (ImageRule("*", tags=("2*",)), False),
        (ImageRule("*", max_size=100), False),
        (ImageRule("*", platforms=("linux/riscv64",)), False),
        (ImageRule("*", platforms=("linux/riscv64", f"linux/{images.ARCHITECTURE}")), True),
        # As users write it, and as an indexer reads it.
        (ImageRule("*", platforms=(f"linux/{'aarch64' if images.ARCHITECTURE == 'arm64' else 'x86_64'}",)), True),
    ],
)
def test_policies_bind_it(seed, node, catalog, tmp_path, rule, wanted):
    node.add(an_image(tmp_path))
    assert look(seed(rules=[rule])) == ({SEEDED: [NAME]} if wanted else {})
    assert bool(list(catalog.images())) == wanted


@pytest.mark.parametrize(
    ("platform", "variant", "wanted"),
    [
        ("linux/arm", "v7", True),
        ("linux/arm/v7", "v7", True),
        ("linux/arm/v6", "v7", False),
        ("linux/arm64/v8", "", True),
    ],
)
def test_a_platform_of_a_policy_is_read_as_indexers_read_it(seed, node, tmp_path, platform, variant, wanted):
    """Without a variant any will do, and the only one of an architecture need not be named."""
    architecture = platform.split("/")[1]
    node.add(an_image(tmp_path, config={"architecture": architecture, "variant": variant}))
    assert look(seed(rules=[ImageRule("*", platforms=(platform,))])) == ({SEEDED: [NAME]} if wanted else {})


@pytest.mark.parametrize(
    ("names", "rule", "chosen"),
    [
        (("docker.io/library/app:1", "registry.example/mirror/app:1"), ImageRule("registry.example/*"), 1),
        (("registry.example/app:latest", "registry.example/app:v1"), ImageRule("*", tags=("v*",)), 1),
        (("registry.example/app@{digest}", "registry.example/app:1"), ImageRule("registry.example/*"), 1),
        (("docker.io/library/app:1", "registry.example/app@{digest}"), ImageRule("registry.example/*"), 1),
        (("registry.example/app:1", "registry.example/app:2"), ImageRule("elsewhere/*"), None),
    ],
)
def test_the_name_is_one_that_a_policy_wants(seed, node, tmp_path, names, rule, chosen):
    built = an_image(tmp_path)
    names = [name.format(digest=built.manifest_digest) for name in names]
    node.add(built, *names)
    assert look(seed(rules=[rule])) == ({} if chosen is None else {SEEDED: [names[chosen]]})


class Counting(StoreWrapper):
    """Counts what is read of a store."""

    def __init__(self, inner):
        super().__init__(inner)
        self.gets = 0

    def get(self, key, start=0, length=None):
        self.gets += 1
        return self.inner.get(key, start, length)


def test_what_another_snapshotter_unpacked_costs_the_store_nothing(seed, node, catalog, tmp_path):
    """Nor does what this node has a part of cost more than the answer to one layer, at every look."""
    ours = an_image(tmp_path)
    other = an_image(tmp_path, *({f"f{number}": os.urandom(100)} for number in range(12)))
    counting = Counting(catalog.store)
    seeder = seed(catalog=Catalog(counting, open_index(None)))
    node.add(ours, "registry.example/ours:1")
    node.add(other, "registry.example/other:1", unpacked=())
    assert look(seeder) == {SEEDED: ["registry.example/ours:1"]}
    counting.gets = 0
    assert look(seeder) == {}
    assert counting.gets == 0
    node.add(other, "registry.example/other:1", unpacked=chain_ids(other.diff_ids)[:1])
    for _ in range(2):
        counting.gets = 0
        assert look(seeder) == {}
        assert counting.gets == 1
    node.add(other, "registry.example/other:1")
    assert look(seeder) == {SEEDED: ["registry.example/other:1"]}


def test_only_what_this_node_has_unpacked_whole(seed, node, tmp_path):
    built = an_image(tmp_path)
    node.add(built, unpacked=chain_ids(built.diff_ids)[:1])
    seeder = seed()
    assert look(seeder) == {}
    node.add(built)  # the pull is over
    assert look(seeder) == {SEEDED: [NAME]}


def test_layers_that_are_stored_already_are_not_read(seed, node, catalog, tmp_path):
    base = {"base": os.urandom(20_000)}
    lower, upper = an_image(tmp_path, base), an_image(tmp_path, base, {"new": b"new"})
    index_image(catalog, lower.source, spool_dir=tmp_path)
    node.add(upper, unpacked=chain_ids(upper.diff_ids)[1:])
    node.lost.add(upper.layers[0]["digest"])  # it was pulled lazily
    assert look(seed()) == {SEEDED: [NAME]}
    assert upper.layers[0]["digest"] not in node.read_of
    assert catalog.resolve_chain(chain_ids(upper.diff_ids)[1])


def test_the_name_is_the_registry_s(seed, node, catalog, tmp_path):
    built = an_image(tmp_path)
    node.add(built, built.config_digest, f"registry.example/app@{built.manifest_digest}", NAME, "import-2026-01-01")
    assert look(seed()) == {SEEDED: [NAME]}
    assert catalog.image(built.manifest_digest).names == (NAME,)
    assert [registry_name(text) for text in ("app", "busybox:1", "sha256:" + "0" * 64, "a/b:1")] == [None] * 4
    assert str(registry_name("docker.io/library/app:1")) == "docker.io/library/app:1"


def test_an_image_that_only_this_node_has_a_name_for_stays_here(seed, node, tmp_path):
    built = an_image(tmp_path)
    node.add(built, built.config_digest)
    assert look(seed()) == {}


# Who


def test_one_node_stores_each_layer(seed, node, catalog, queue, tmp_path):
    built = an_image(tmp_path)
    node.add(built)
    lease = queue.try_lease([built.diff_ids[1]], 600)
    seeder = seed()
    assert look(seeder) == {LEFT: [NAME]}
    assert published(catalog.store) == {}
    assert queue.try_lease([built.diff_ids[0]], 600) is not None  # none is kept of a lease that was not had whole
    lease.release()


def test_when_the_elected_node_dies_another_one_goes_on(seed, node, catalog, queue, tmp_path):
    built = an_image(tmp_path)
    node.add(built)
    lease = queue.try_lease(built.diff_ids, 0.3)
    lease._ended.set()  # as if its process had been killed
    seeder = seed()
    for _ in range(600):
        if look(seeder) == {SEEDED: [NAME]}:
            break
        threading.Event().wait(0.1)
    assert catalog.image(built.manifest_digest)


def test_a_lease_that_is_lost_stops_the_work_and_nothing_is_published(
    seed, node, catalog, queue, tmp_path, monkeypatch
):
    built = an_image(tmp_path)
    node.add(built)
    taken = queue.try_lease

    def lost(names, seconds):
        lease = taken(names, seconds)
        lease._lost = True
        return lease

    monkeypatch.setattr(queue, "try_lease", lost)
    assert look(seed()) == {FAILED: [NAME]}
    assert [info.key for info in catalog.store.list("refs")] == []
    monkeypatch.setattr(queue, "try_lease", taken)
    assert look(seed()) == {SEEDED: [NAME]}


class ReadOnly(StoreWrapper):
    """A bucket that this node may not write to."""

    def put(self, key, data):
        raise AccessDeniedError(f"no permission to write {key}")

    def put_if(self, key, data, version):
        raise AccessDeniedError(f"no permission to write {key}")


def test_who_may_not_write_asks_an_indexer_once_in_a_while(seed, node, catalog, queue, tmp_path, monkeypatch, caplog):
    node.add(an_image(tmp_path))
    seeder = seed(catalog=Catalog(ReadOnly(catalog.store), open_index(None)))
    assert look(seeder) == {ASKED: [NAME]}
    assert look(seeder) == {LEFT: [NAME]}
    assert caplog.text.count("may not write to the store") == 1
    task = queue.take("a")
    assert (task.job.ref, task.job.origin) == (NAME, NODE)
    monkeypatch.setattr(seeder_module, "ASK_AGAIN", 0.0)
    assert look(seeder) == {ASKED: [NAME]}
    assert [info.key for info in catalog.store.list("refs")] == []


def test_who_asked_an_indexer_does_not_try_again_meanwhile(seed, node, catalog, tmp_path):
    node.add(an_image(tmp_path))
    seeder = seed(catalog=Catalog(ReadOnly(catalog.store), open_index(None)))
    assert look(seeder) == {ASKED: [NAME]}
    layers = [digest for digest in node.read_of if digest not in node.read_of[:2]]
    seen = len(node.read_of)
    assert look(seeder) == {LEFT: [NAME]}
    assert not set(node.read_of[seen:]) & set(layers)


@pytest.mark.parametrize("error", [UnavailableError("no"), RuntimeError("a defect")])
def test_an_image_that_fails_keeps_none_of_the_others_waiting(seed, node, catalog, queue, tmp_path, monkeypatch, error):
    """Whatever it fails of, and also when no indexer can be asked for it."""
    node.add(an_image(tmp_path))
    node.add(an_image(tmp_path), "registry.example/other:1")
    real = seeder_module.resolve

    def fails(source):
        if source.name == NAME:
            raise error
        return real(source)

    def refused(job):
        raise UnavailableError("the queue is away")

    monkeypatch.setattr(seeder_module, "resolve", fails)
    monkeypatch.setattr(queue, "put", refused)
    seeder = seed()
    assert look(seeder) == {FAILED: [NAME], SEEDED: ["registry.example/other:1"]}
    for _ in range(3):
        assert look(seeder) == {FAILED: [NAME]}


def test_who_may_not_lease_asks_an_indexer(seed, node, tmp_path):
    """Its user of Redis may put jobs, and nothing else."""
    server = redis_server.cluster()
    with contextlib.closing(Catalog(MemoryStore(), open_index(None))) as catalog:
        uuid = catalog.ensure_store().uuid
        with (
            contextlib.closing(_as(server, "asking", uuid)) as asking,
            contextlib.closing(_as(server, "indexer", uuid)) as all_of_it,
        ):
            node.add(an_image(tmp_path))
            assert look(seed(catalog=catalog, queue=asking)) == {ASKED: [NAME]}
            assert all_of_it.take("a").job.ref == NAME
            assert list(catalog.images()) == []
    server.empty()


def _as(server, user, uuid):
    return open_queue(server.url(user=user), uuid)


def test_what_this_node_no_longer_has_an_indexer_is_asked_for(seed, node, catalog, queue, tmp_path):
    """containerd was told to discard blobs that it unpacked (discard_unpacked_layers)."""
    built = an_image(tmp_path)
    node.add(built)
    node.lost.add(built.layers[1]["digest"])
    assert look(seed()) == {ASKED: [NAME]}
    assert queue.take("a").job.ref == NAME
    assert [info.key for info in catalog.store.list("refs")] == []


@pytest.mark.parametrize("part", ["layer", "config", "manifest"])
def test_what_rotted_on_this_node_s_disk_is_not_published(seed, node, catalog, tmp_path, part):
    """Every blob is hashed, and the layer's tar against its diff id: who names layers/<diff id> has content with it."""
    built = an_image(tmp_path)
    node.add(built)
    digest = {"layer": built.layers[0]["digest"], "config": built.config_digest, "manifest": built.manifest_digest}[
        part
    ]
    file = built.directory / "blobs/sha256" / digest.partition(":")[2]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert look(seed()) == {ASKED: [NAME]}
    assert [info.key for info in catalog.store.list("refs")] == []


def test_a_store_that_is_away_is_tried_again_and_then_an_indexer_is_asked(seed, node, catalog, queue, tmp_path):
    class Away(StoreWrapper):
        def put(self, key, data):
            raise UnavailableError("the store is away")

    node.add(an_image(tmp_path))
    seeder = seed(catalog=Catalog(Away(catalog.store), open_index(None)))
    assert [look(seeder) for _ in range(3)] == [{FAILED: [NAME]}, {FAILED: [NAME]}, {ASKED: [NAME]}]


def test_seeded_layers_are_signed_where_signatures_count(seed, node, tmp_path, queue):
    key, other = signer(1), signer(2)
    store = MemoryStore()
    built = an_image(tmp_path)
    node.add(built)
    catalog = signing(store, key)
    catalog.ensure_store()
    assert look(seed(catalog=catalog, queue=queue)) == {SEEDED: [NAME]}
    chain = chain_ids(built.diff_ids)[-1]
    assert trusting(store, key).resolve_chain(chain)
    with pytest.raises(UntrustedError):
        trusting(store, other).resolve_chain(chain)


def test_profiles_of_the_version_before_count_for_what_is_seeded(seed, node, catalog, tmp_path):
    source = layer_source(NAME, f"linux/{images.ARCHITECTURE}", 0)
    built = an_image(tmp_path)
    node.add(built)
    look(seed())
    tree = catalog.layer(built.diff_ids[0])[1].tree.digest
    profiles = ProfileStore(catalog)
    profiles.add(tree, Profile(starts=1, pieces={(b"a", 0): Touch(1, 1)}))
    assert [path for path, _ in profiles.of_source(source).hot_pieces()] == [b"a"]


# Gently


def test_the_thread_and_those_it_starts_come_last():
    found = {}

    def work():
        found["problems"] = step_back()
        inner = threading.Thread(
            target=lambda: found.update(inner=os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        )
        inner.start()
        inner.join()
        found["outer"] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert (found["problems"], found["outer"], found["inner"]) == ([], 19, 19)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


@pytest.mark.parametrize("command", [("seed",), ("agent", "--agent-metrics", "none")])
def test_all_threads_of_a_process_that_seeds_come_last(command, tmp_path):
    """Also those of the library that sends to the store: they begin with the first request, at the priority of whoever made it."""
    server = seaweed.running()
    node = Node(tmp_path)
    node.environ |= server.environment() | {"FLOE_STORE": server.url(server.bucket(), "seeds")}
    node.environ["FLOE_INDEX"] = redis_server.standalone().url()
    node.floe("store", "init")
    log = tmp_path / "log"
    with (
        log.open("wb") as out,
        subprocess.Popen(
            [sys.executable, "-m", "floe", *command, "--seed", "all"], env=node.environ, stderr=out, stdout=out
        ) as process,
    ):
        try:
            # By then it has asked the store.
            wait_until(lambda: "cannot be asked" in log.read_text() or process.poll() is not None)
            found = []
            for path in Path(f"/proc/{process.pid}/task").iterdir():
                with contextlib.suppress(ProcessLookupError):  # that thread has ended
                    found.append(os.getpriority(os.PRIO_PROCESS, int(path.name)))
            assert len(found) > 1, log.read_text()
            assert {*found} == {19}
        finally:
            process.kill()


def test_the_rate_is_kept_whatever_the_pieces(monkeypatch):
    now, waited = [0.0], []
    stop = threading.Event()

    def wait(seconds):
        waited.append(seconds)
        now[0] += seconds
        return False

    monkeypatch.setattr("floe.seeding.gently.time.monotonic", lambda: now[0])
    monkeypatch.setattr(stop, "wait", wait)
    pace = Pace(1000, lambda: None, stop)
    for size in (100, 900, 1, 9999, 500):
        pace.advance(size)
    assert sum(waited) == pytest.approx(11.5)
    unbounded = Pace(0, lambda: None, stop)
    unbounded.advance(1 << 40)
    assert sum(waited) == pytest.approx(11.5)


def test_work_ends_while_it_waits_for_its_rate():
    stop = threading.Event()
    stop.set()
    with pytest.raises(CancelledError):
        Pace(1, lambda: None, stop).advance(1 << 30)


def test_a_look_ends_between_two_images(seed, node, tmp_path):
    node.add(an_image(tmp_path))
    stop = threading.Event()
    stop.set()
    assert seed().round(stop) == {SEEDED: [], ASKED: [], LEFT: [], FAILED: []}


# As a duty of the agent


def test_the_agent_s_duty_seeds_and_ends_with_it(seed, node, catalog, tmp_path):
    node.add(an_image(tmp_path))
    opened = []

    @contextlib.contextmanager
    def open_seeder():
        opened.append("in")
        yield seed()
        opened.append("out")

    duty = Seeding(open_seeder)
    assert duty.turn() > 0
    for _ in range(600):
        if list(catalog.images()):
            break
        threading.Event().wait(0.1)
    assert [record.names for record in catalog.images()] == [(NAME,)]
    duty.turn()
    assert opened == ["in"]  # it is at work still
    duty.end()
    duty._thread.join(60)
    assert opened == ["in", "out"]
    duty.turn()
    assert opened == ["in", "out"]


def test_what_keeps_the_duty_from_beginning_is_its_failure_and_it_is_tried_again(seed, node):
    answers = [UnavailableError("the store is away"), None]

    @contextlib.contextmanager
    def open_seeder():
        error = answers.pop(0)
        if error:
            raise error
        yield seed()

    duty = Seeding(open_seeder)
    with pytest.raises(UnavailableError):
        duty.turn()
    duty.turn()
    assert answers == []
    duty.end()
    duty._thread.join(60)
