"""What containerd's own overlayfs snapshotter answers, Floe answers: one transcript, taken from both."""

import re
from contextlib import contextmanager

import pytest
from support.containerd import Containerd, each_version
from support.snapshots import Node, SnapshotsClient, Status, mounted, status

ROOT = {"containerd.io/gc.root": "2024-01-01T00:00:00Z"}


class Transcript:
    """Calls and what came of them, with whatever differs by nature (paths, times) made alike."""

    def __init__(self, client, base):
        self.client = client
        self.base = base
        self.lines = []
        self.ids = {}

    def say(self, what, result):
        self.lines.append((what, result))

    def call(self, method, *args, **kwargs):
        code = status(lambda: self.say(f"{method} {args}", self.alike(getattr(self.client, method)(*args, **kwargs))))
        if code.value[0] != 0:
            # containerd 1.6's List forgets to translate its parser's errors.
            code = Status.INVALID_ARGUMENT if (method, code) == ("list", Status.UNKNOWN) else code
            self.say(f"{method} {args}", code.name)

    def call_sorted(self, filters):
        self.say(f"list {filters}", sorted(self.client.names(*filters)))

    def alike(self, result):
        if isinstance(result, list):
            return [self.alike(item) for item in result]
        if hasattr(result, "options"):
            options = sorted(self.path(option) for option in result.options)
            return (result.type, self.path(result.source), options)
        if hasattr(result, "created_at"):
            same = result.created_at == result.updated_at
            return (result.name, result.parent, result.kind, sorted(result.labels.items()), same)
        if hasattr(result, "inodes"):
            return (result.size, result.inodes)
        return result

    def path(self, text):
        def number(match):
            return f"#{self.ids.setdefault(match[1], len(self.ids))}/{match[2]}"

        return re.sub(r"[^:=]*/(?:s|snapshots)/(\d+)/(fs|work)", number, text)

    def write(self, key, **files):
        """Write files into an active snapshot; a text of None deletes."""
        with mounted(self.client.mounts(key), self.base) as root:
            for name, text in files.items():
                if text is None:
                    (root / name).unlink()
                else:
                    (root / name).write_text(text)

    def read(self, key):
        with mounted(self.client.mounts(key), self.base) as root:
            self.say(f"content {key}", {path.name: path.read_text() for path in sorted(root.iterdir())})


def transcript(client, base):
    """A walk through everything a snapshotter can be asked."""
    t = Transcript(client, base)
    for text in ("prepare", "view"):
        t.call(text, f"{text} nothing", "", ROOT)
        t.call(text, f"{text} nothing", "", ROOT)
        t.call(text, "orphan", "nobody", ROOT)
    for method in ("stat", "mounts", "usage", "remove"):
        t.call(method, "nobody")
    t.call("commit", "name", "nobody", ROOT)
    t.call("update", "nobody", ROOT)

    # Layers of three, with a change, a deletion and labels.
    t.call("prepare", "x 1", "", {**ROOT, "only": "active", "empty": ""})
    t.call("stat", "x 1")
    t.write("x 1", a="1", b="1", c="1")
    t.call("usage", "x 1")
    t.call("commit", "one", "x 1", ROOT)
    t.call("stat", "one")
    t.call("stat", "x 1")
    t.call("usage", "one")
    t.call("commit", "one", "prepare nothing", ROOT)
    t.call("prepare", "x 2", "one", ROOT)
    t.write("x 2", a="22", b=None)
    t.call("commit", "two", "x 2", {**ROOT, "k": "v"})
    t.call("prepare", "x 3", "two", ROOT)
    t.read("x 3")
    t.call("usage", "x 3")
    t.call("commit", "three", "x 3", ROOT)
    t.call("prepare", "active", "three", ROOT)
    t.call("mounts", "active")
    t.call("view", "view 1", "one", ROOT)
    t.call("view", "view 3", "three", ROOT)
    t.read("view 3")
    t.call("usage", "view 3")

    # What must be refused.
    t.call("prepare", "child of active", "active", ROOT)
    t.call("view", "child of view", "view 1", ROOT)
    t.call("commit", "four", "view 1", ROOT)
    t.call("commit", "four", "one", ROOT)
    t.call("mounts", "one")
    for name in ("one", "two", "three"):
        t.call("remove", name)
    t.call("prepare", "one", "", ROOT)
    t.call("commit", "two", "active", ROOT)
    t.call("prepare", "long", "", {"k" * 100: "v" * 4000})

    # Labels.
    t.call("update", "one", {**ROOT, "l1": "v1", "l2": "v2", "none": ""})
    t.call("update", "one", {"l1": "new", "l3": "v3"}, "labels.l1", "labels.l2")
    t.call("update", "one", {**ROOT, "l4": "v4"}, "labels")
    t.call("update", "one", {"dotted.key/x": "y"}, "labels.dotted.key/x")
    for path in ("name", "parent", "kind", "created_at", "label", "labelsx"):
        t.call("update", "one", ROOT, path, parent="two")
    t.call("stat", "one")
    t.call("update", "active", {**ROOT, "running": "yes"})

    # Searches: sorted, since nothing promises an order.
    for filters in (
        (),
        ("",),
        ("kind==active",),
        ("kind==view",),
        ("kind==committed",),
        ("kind==nothing",),
        ("name==one",),
        ("name==one", "name==two"),
        ("name!=one,kind==committed",),
        ("name~=^t",),
        ("name~=(",),
        ("name~=/tw|one/",),
        ('parent==""',),
        ('parent!=""',),
        ('parent=="two"',),
        ("labels.k",),
        ("labels.k==v",),
        ("labels.k!=v",),
        ('labels."dotted.key/x"==y',),
        ('labels."containerd.io/gc.root"',),
        ("size==1",),
    ):
        t.call_sorted(filters)
    for text in ("name==", "==", "name=one", "name==one two", "name==one ,kind==active", 'name=="one', "name~=/\\./"):
        t.call("list", text)

    # Taking down.
    for name in ("active", "view 1", "view 3", "three", "two", "one", "prepare nothing", "view nothing"):
        t.call("remove", name)
        t.call("stat", name)
    t.call("list")
    return t.lines


@contextmanager
def containerd(version, base, **settings):
    base.mkdir()
    daemon = Containerd(version, base, **settings)
    try:
        yield daemon
    finally:
        daemon.stop()


@pytest.fixture
def nodes(tmp_path):
    nodes = [Node(tmp_path / name) for name in ("behind", "own")]
    yield nodes
    for node in nodes:
        node.stop()


@each_version()
def test_floe_answers_as_overlayfs_does(version, nodes, tmp_path):
    behind, own = nodes
    with containerd(version, tmp_path / "c", snapshotter_address=behind.config.address) as daemon:
        with SnapshotsClient(daemon.address, snapshotter="overlayfs") as client:
            expected = transcript(client, tmp_path)
        with SnapshotsClient(daemon.address, snapshotter="floe") as client:
            assert transcript(client, tmp_path) == expected
    assert transcript(own.client, tmp_path) == expected
    assert len(expected) >= 100
