"""What is mounted becomes orders, pins and shares: by policy, from mount to mount, whatever cannot be asked or read."""

import stat

import pytest
from support.floe_node import wait_until
from support.packs import make_pack, random_content
from support.trees import TestPack, file_node

from floe.fuse.pack_reader import PackReader
from floe.fuse.pins import PolicyPins
from floe.fuse.residency import Mounted, Residency
from floe.ingest.entries import Node, walk
from floe.ingest.erofs_writer import build_image
from floe.store.cache import CacheWriter, NodeCache, open_cache
from floe.store.errors import UnavailableError
from floe.store.frames import VerifiedFrame
from floe.store.ids import hexdigest
from floe.store.objects.memory import MemoryStore
from floe.store.packindex import LAYER_FRAME
from floe.store.policy import Policy

FILE = 4 * LAYER_FRAME


class Pack:
    """A pack of `count` files of four frames each, and trees of some of them."""

    def __init__(self, store, seed, count=8):
        laid_out = TestPack(f"{seed}")
        self.files = [file_node(laid_out, random_content(FILE, f"{seed} {number}")) for number in range(count)]
        self.pack = make_pack(bytes(laid_out.data), LAYER_FRAME)
        self.pack.publish(store)

    def tree(self, cache, *numbers):
        root = Node(stat.S_IFDIR | 0o755)
        for number in numbers:
            root.children[b"file%d" % number] = self.files[number]
        for _, node in walk(root):
            for chunk in node.content.chunks if node.content else ():
                chunk.pack_id = self.pack.id
        image = build_image(root, {self.pack.id: len(self.pack.content) // 4096})
        cache.add_index(self.pack.id, self.pack.index.encode())
        cache.add_tree(hexdigest(image), image)
        return hexdigest(image)


class Machine:
    """A node whose mounts, the newest first, and sources of trees are what the test says."""

    def __init__(self, folder, store, *, size=None, start=True, **options):
        self.writer = CacheWriter(NodeCache(folder, size=size))
        self.cache = self.writer.cache
        self.reader = PackReader(store, self.writer, readahead=0)
        self.mounts = []
        self.sources = {}
        self.asked = 0
        self.down = False
        self.residency = Residency(
            self.writer, self.reader, mounted=lambda: self.mounts, source_of=self.source, settle=0.0, **options
        )
        if start:
            self.residency._pins.keep_wanted()

    def source(self, tree):
        self.asked += 1
        if self.down:
            raise UnavailableError("the store does not answer")
        return self.sources.get(tree)

    def mount(self, *trees, model=None):
        self.mounts = [Mounted(tree, model) for tree in reversed(trees)]
        return self.residency._look()

    def status(self, tree):
        return self.residency.status()[tree]

    def wait(self, tree, state):
        wait_until(lambda: self.status(tree)["state"] == state)
        return self.status(tree)

    def close(self):
        self.residency.close()
        self.reader.close()
        self.writer.close()


@pytest.fixture
def store():
    return MemoryStore()


@pytest.fixture
def machine(tmp_path, store):
    made = []

    def make(**options):
        for node in made:
            node.close()
        made[:] = [Machine(tmp_path / "cache", store, **options)]
        return made[0]

    yield make
    made[0].close()


def pins(node, pack):
    return {owner.partition("@")[0] for owner in node.cache.pins(pack.pack.id)}


def test_the_thread_finds_what_is_mounted_already_and_is_told_of_the_rest(machine, store):
    node = machine(completion="idle")
    one, two = Pack(store, 1), Pack(store, 2)
    first, second = one.tree(node.cache, *range(8)), two.tree(node.cache, *range(8))
    node.mounts = [Mounted(first, None)]
    node.residency.start()
    found = node.wait(first, "complete")
    assert (found["completion"], found["model"], found["pinned"]) == ("idle", None, False)
    assert found["here_bytes"] == found["content_bytes"] == 8 * FILE
    wait_until(lambda: node.status(first)["native_next"])
    node.mounts = [Mounted(second, None), Mounted(first, None)]
    node.residency.mounted(second, [two.pack.id])
    node.wait(second, "complete")
    wait_until(lambda: node.residency.states(node.residency.status())["complete"] == 2)
    assert node.asked == 0  # without policies nobody need know whose a tree is


def test_off_fetches_nothing_and_tells_what_is_here(machine, store):
    node = machine()
    tree = Pack(store, 1).tree(node.cache, *range(8))
    assert not node.mount(tree)
    node.residency.start()
    found = node.status(tree)
    assert (found["state"], found["here_bytes"], found["content_bytes"]) == ("off", 0, 8 * FILE)
    assert node.residency._thread is None


def test_what_is_unmounted_is_worked_on_no_longer(machine, store):
    node = machine(completion="idle")
    tree = Pack(store, 1).tree(node.cache, *range(8))
    given = []
    node.reader.complete = given.append
    node.residency._reader = node.reader
    node.mount(tree)
    assert [[order.tree for order in orders] for orders in given] == [[tree]]
    node.mount(tree)
    assert len(given) == 1  # the same work is not begun anew
    node.mount()
    assert given[1:] == [[]]


def test_content_of_other_images_is_left_out_until_it_is_an_eighth(machine, store):
    node = machine(completion="idle")
    pack = Pack(store, 1)
    small, large = pack.tree(node.cache, 0, 1), pack.tree(node.cache, *range(2, 8))
    node.mount(small)
    found = node.wait(small, "complete")
    assert (found["content_bytes"], found["native_next"]) == (2 * FILE, False)
    assert node.writer.pack(pack.pack.id).bits.present() == list(range(8))
    node.mount(small, large)  # together they need all of it
    node.wait(large, "complete")
    wait_until(lambda: node.status(small)["native_next"])


def test_policies_go_by_the_model_s_name_and_wait_until_it_is_known(machine, store, caplog):
    node = machine(policies=[Policy("llama/*", "idle", share=1 << 20), Policy("*", "always")])
    tree, layer = Pack(store, 1).tree(node.cache, *range(8)), Pack(store, 2).tree(node.cache, 0)
    node.sources = {tree: "models/llama/8b", layer: "images/python@linux/amd64#0"}
    node.down = True
    assert node.mount(layer, tree)
    assert node.status(tree)["problem"] == "the store does not answer"
    node.mount(layer, tree)
    assert sum("does not answer" in record.getMessage() for record in caplog.records) == 2  # once for each
    assert node.asked == 2  # one waits in vain for all of them, each time
    node.down = False
    node.mount(layer, tree)
    found = node.wait(tree, "full")
    assert (found["model"], found["completion"], found["share_bytes"]) == ("llama/8b", "idle", 1 << 20)
    assert 0 <= found["here_bytes"] <= 1 << 20
    assert node.status(layer)["state"] == "off"
    asked = node.asked
    node.mount(layer, tree)
    assert node.asked == asked


def test_a_pin_outlives_the_worker_and_is_the_last_version_s(machine, store):
    policies = [Policy("acme/*", pin=True)]
    old, new, other = Pack(store, 1), Pack(store, 2), Pack(store, 3)
    node = machine(policies=policies)
    first, second = old.tree(node.cache, 0), new.tree(node.cache, 0)
    node.mount(first, model="acme/m")
    assert pins(node, old) == {"policy-acme/m"}
    node.mount()
    node = machine(policies=policies)
    assert pins(node, old) == {"policy-acme/m"}
    node.mount(first, second, model="acme/m")  # both at once
    assert pins(node, old) == pins(node, new) == {"policy-acme/m"}
    node.mount(other.tree(node.cache, 0), model="another")
    assert pins(node, old) == pins(node, new) == {"policy-acme/m"}
    node.mount(second, model="acme/m")
    assert (pins(node, old), pins(node, new)) == (set(), {"policy-acme/m"})
    assert node.status(second)["pinned"]
    assert pins(machine(policies=[Policy("acme/*")]), new) == set()


def test_a_pack_that_comes_to_another_directory_is_pinned_there(tmp_path):
    cache = open_cache([tmp_path / "a", tmp_path / "b"])
    packs = [make_pack(random_content(LAYER_FRAME, seed), LAYER_FRAME) for seed in range(3)]
    for pack in packs:
        cache.add_index(pack.id, pack.index.encode())
    trees = {"tree": [pack.id for pack in packs]}
    policy_pins = PolicyPins(cache, lambda _name: Policy("m", pin=True))
    assert policy_pins.pin("m", trees) == ""
    cache.leave_out(cache.home(packs[0].id).root, "a test")
    assert cache.pins(packs[0].id) == set()
    assert policy_pins.pin("m", trees) == ""
    assert all(cache.pins(pack.id) == {"policy-m@tree"} for pack in packs)


def test_pinned_content_is_not_evicted_for_others_but_for_its_own_share(machine, store):
    node = machine(policies=[Policy("acme/*", pin=True, share=4 * FILE)])
    pinned, other = Pack(store, 1), Pack(store, 2)
    node.mount(pinned.tree(node.cache, *range(8)), model="acme/m")
    other.tree(node.cache, 0)
    for pack in (pinned, other):
        for frame in range(8):
            assert fetch(node, pack, frame)
    assert node.writer.evict(4 * FILE) == 2 * FILE
    assert node.writer.pack(pinned.pack.id).bits.present() == list(range(8))
    for frame in range(8, 32):
        assert fetch(node, pinned, frame)
    assert node.writer.pack(pinned.pack.id).bits.held() <= 4 * FILE
    assert node.writer.pack(pinned.pack.id).bits.is_trusted(31)


def fetch(node, pack, frame):
    content = pack.pack.content[frame * LAYER_FRAME : (frame + 1) * LAYER_FRAME]
    entry = node.writer.table(pack.pack.id).entry(frame)
    return node.writer.put(pack.pack.id, frame, VerifiedFrame(content, entry.digest))


def test_pins_beyond_the_cache_are_refused_together(machine, store, caplog):
    node = machine(policies=[Policy("*", pin=True)], size=12 * FILE)
    one, two = Pack(store, 1), Pack(store, 2)
    first, second = one.tree(node.cache, 0), two.tree(node.cache, 0)
    node.mounts = [Mounted(second, "acme/two"), Mounted(first, "acme/one")]
    node.residency._look()
    node.residency._look()
    assert [len(pins(node, pack)) for pack in (one, two)].count(1) == 1
    refused = [record.getMessage() for record in caplog.records if "cannot keep" in record.getMessage()]
    assert len(refused) == 1
    assert "beside 0.0 GiB of other pinned models" in refused[0]


def test_a_damaged_tree_is_said_and_harms_no_other(machine, store, caplog):
    node = machine(completion="idle")
    tree, damaged = Pack(store, 1).tree(node.cache, *range(8)), "d" * 64
    (node.cache.trees / f"{damaged}.erofs").write_bytes(b"no image")
    node.mount(damaged, tree)
    node.wait(tree, "complete")
    assert node.status(damaged)["state"] == "new"
