"""The snapshotter against a model of it: a dictionary of names, parents and labels, and a file in every layer."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from support.snapshots import REF, DirectoryLayers

from floe.snapshotter.config import SnapshotterConfig
from floe.snapshotter.schema import Kind
from floe.snapshotter.snapshotter import Snapshotter
from floe.store.errors import AlreadyExistsError, BadInputError, FloeError, NotFoundError, PreconditionError
from floe.store.ids import hexdigest

CHAINS = {"sha256:" + letter * 64: hexdigest(letter.encode()) for letter in "ab"}
UNKNOWN = "sha256:" + "c" * 64
names = st.sampled_from(["one", "two", "three", "k8s.io/4/deep name", "../out", "ünï"])
labels = st.sampled_from([{}, {"a": "1"}, {"a": "2", "b.c": "x,y==z"}, {"empty": ""}])


@dataclass
class Known:
    """What the model has of a snapshot. `file` is the name of the file that its layer holds; a view's has none."""

    kind: Kind
    parent: str
    labels: dict[str, str]
    file: str | None
    chain: str | None = None


class Layers(DirectoryLayers):
    """Binds are copies: what the kernel does is not the question here."""

    def bind(self, tree: str, target: Path) -> None:
        self.unbind(target)
        shutil.copytree(self.trees[tree], target, dirs_exist_ok=True)

    def unbind(self, target: Path) -> None:
        for path in target.iterdir() if target.exists() else ():
            path.unlink()


class Model(RuleBasedStateMachine):
    """`known` by name."""

    @initialize()
    def begin(self):
        shared = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(prefix="floe-snapshots-", dir=shared if shared.is_dir() else None))
        self.layers = Layers()
        for chain, tree in CHAINS.items():
            directory = self.folder / tree
            directory.mkdir()
            (directory / tree[:8]).touch()
            self.layers.remote[tree] = directory
            self.layers.chains[chain] = tree
        root = self.folder / "root"
        self.config = SnapshotterConfig(
            address=self.folder / "s", root=root, run_dir=self.folder, cache_dir=self.folder, store_url="memory://",
            prepare_timeout=60.0,
        )  # fmt: skip
        self.known: dict[str, Known] = {}
        self.made = 0
        self.start()

    def start(self):
        self.snapshotter = Snapshotter(self.config, self.layers)
        assert self.snapshotter.start() == []
        self.snapshotter.tidy()

    def teardown(self):
        if hasattr(self, "folder"):
            self.snapshotter.close()
            shutil.rmtree(self.folder)

    def refused(self, key: str, parent: str) -> type[FloeError] | None:
        """How a new snapshot is refused, if it is."""
        if parent and parent not in self.known:
            return NotFoundError
        if parent and self.known[parent].kind is not Kind.COMMITTED:
            return BadInputError
        return AlreadyExistsError if key in self.known else None

    def someone(self, data) -> str:
        """A name that may stand for something: a lazy layer's too."""
        return data.draw(st.one_of(names, st.sampled_from(sorted(self.known))) if self.known else names)

    def parent(self, data) -> str:
        return data.draw(st.sampled_from(["", *sorted(self.known), "nobody"]))

    @rule(data=st.data(), key=names, given=labels)
    def prepare(self, data, key, given):
        parent = self.parent(data)
        error = self.refused(key, parent)
        if error:
            with pytest.raises(error):
                self.snapshotter.prepare(key, parent, given)
            return
        mounts = self.snapshotter.prepare(key, parent, given)
        self.made += 1
        file = f"file {self.made}"
        (self.writable(mounts) / file).touch()
        self.known[key] = Known(Kind.ACTIVE, parent, given, file)

    @rule(data=st.data(), key=names, chain=st.sampled_from([*CHAINS, UNKNOWN]))
    def prepare_a_layer(self, data, key, chain):
        parent = self.parent(data)
        error = self.refused(key, parent)
        if error is None and chain == UNKNOWN:
            mounts = self.snapshotter.prepare(key, parent, {REF: chain})
            self.made += 1
            (self.writable(mounts) / f"file {self.made}").touch()
            self.known[key] = Known(Kind.ACTIVE, parent, {REF: chain}, f"file {self.made}")
            return
        with pytest.raises(error or AlreadyExistsError):
            self.snapshotter.prepare(key, parent, {REF: chain})
        if error is None and not any((k.chain, k.parent) == (chain, parent) for k in self.known.values()):
            (found,) = [s for s in self.snapshotter.walk([]) if s.chain == chain and s.parent_name == parent]
            self.known[found.name] = Known(Kind.COMMITTED, parent, {REF: chain}, CHAINS[chain][:8], chain)

    @rule(data=st.data(), key=names, given=labels)
    def view(self, data, key, given):
        parent = self.parent(data)
        error = self.refused(key, parent)
        if error:
            with pytest.raises(error):
                self.snapshotter.view(key, parent, given)
            return
        self.snapshotter.view(key, parent, given)
        self.known[key] = Known(Kind.VIEW, parent, given, None)

    @rule(data=st.data(), name=names, given=labels)
    def commit(self, data, name, given):
        key = self.someone(data)
        error = None
        if key not in self.known:
            error = NotFoundError
        elif name in self.known:
            error = AlreadyExistsError
        elif self.known[key].kind is not Kind.ACTIVE:
            error = PreconditionError
        if error:
            with pytest.raises(error):
                self.snapshotter.commit(name, key, given)
            return
        self.snapshotter.commit(name, key, given)
        active = self.known.pop(key)
        self.known[name] = Known(Kind.COMMITTED, active.parent, given, active.file)

    @rule(data=st.data())
    def remove(self, data):
        key = self.someone(data)
        children = [name for name, known in self.known.items() if known.parent == key]
        if key not in self.known or children:
            with pytest.raises(NotFoundError if key not in self.known else PreconditionError):
                self.snapshotter.remove(key)
            return
        self.snapshotter.remove(key)
        del self.known[key]

    @rule(data=st.data(), given=labels)
    def update(self, data, given):
        key = self.someone(data)
        if key not in self.known:
            with pytest.raises(NotFoundError):
                self.snapshotter.update(key, given, [])
            return
        self.snapshotter.update(key, given, ["labels"])
        known = self.known[key]
        known.labels = {**given, REF: known.chain} if known.chain else given

    @rule(data=st.data())
    def usage(self, data):
        key = self.someone(data)
        if key not in self.known:
            with pytest.raises(NotFoundError):
                self.snapshotter.usage(key)
            return
        usage = self.snapshotter.usage(key)
        assert usage.size >= 0
        chain = self.known[key].chain
        if chain is None:
            assert (usage.inodes >= 1) == (self.known[key].kind is not Kind.VIEW)
            return
        # What several snapshots show is on the disk once, and counted so.
        same = [name for name, known in self.known.items() if known.chain == chain]
        assert sum(self.snapshotter.usage(name).inodes for name in same) == 1

    @rule()
    def cleanup(self):
        self.snapshotter.cleanup()
        assert len(list(self.config.root.glob("s/[0-9]*"))) == len(self.known)
        assert {tree for tree, _ in self.layers.uses()} == {CHAINS[k.chain] for k in self.known.values() if k.chain}

    @rule()
    def restart(self):
        self.snapshotter.close()
        self.start()

    @rule(data=st.data())
    def killed_while_a_layer_is_made(self, data):
        """The row is there, and perhaps its directory; nobody was told."""
        chain, tree = data.draw(st.sampled_from(sorted(CHAINS.items())))
        made = self.snapshotter._meta.begin_lazy(f"floe/{chain}/", 0, {REF: chain}, chain, tree)
        if data.draw(st.booleans()):
            self.layers.trees[tree] = self.layers.remote[tree]
            self.snapshotter.lazy.attach(made)
        self.restart()

    @rule()
    def killed_while_a_snapshot_is_made(self):
        self.snapshotter._directories.new(work=True, owner=None)
        self.restart()

    def writable(self, mounts) -> Path:
        (mount,) = mounts
        for option in mount.options:
            if option.startswith("upperdir="):
                return Path(option.removeprefix("upperdir="))
        assert "rw" in mount.options
        return Path(mount.source)

    @invariant()
    def it_lists_what_there_is(self):
        if not hasattr(self, "folder"):
            return
        listed = {s.name: (s.kind, s.parent_name, dict(s.labels)) for s in self.snapshotter.walk([])}
        assert listed == {
            name: (k.kind, k.parent, {key: value for key, value in k.labels.items() if value})
            for name, k in self.known.items()
        }

    @invariant()
    def every_mount_shows_its_layers_in_their_order(self):
        for name, known in self.known.items() if hasattr(self, "folder") else ():
            if known.kind is Kind.COMMITTED:
                with pytest.raises(PreconditionError):
                    self.snapshotter.mounts(name)
                continue
            (mount,) = self.snapshotter.mounts(name)
            below, parent = [], known.parent
            while parent:
                below.append(self.known[parent].file)
                parent = self.known[parent].parent
            lowers = [o.removeprefix("lowerdir=").split(":") for o in mount.options if o.startswith("lowerdir=")]
            shown = [Path(path) for path in (lowers[0] if lowers else [])]
            if known.kind is Kind.VIEW:
                shown = shown or [Path(mount.source)]
                assert "rw" not in mount.options
                below = below or [None]
            else:
                assert (self.writable([mount]) / known.file).exists()
            assert [[found.name for found in path.iterdir()] for path in shown] == [
                [file] if file else [] for file in below
            ]
            assert all(self.config.root in path.parents for path in shown)


Model.TestCase.settings = settings(
    max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSnapshotter = Model.TestCase


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_snapshotter_at_length():
    long = settings(Model.TestCase.settings, max_examples=1000, stateful_step_count=60, derandomize=False)
    run_state_machine_as_test(Model, settings=long)
