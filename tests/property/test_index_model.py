"""Indexes against dictionaries: what they say is true whatever came before, and what they were told they know."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections import defaultdict

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from support import redis_server

from floe.store.ids import digest, hexdigest
from floe.store.index import open_index
from floe.store.index.base import ChunkPlace
from floe.store.index.memory import MemoryIndex
from floe.store.packindex import ChunkEntry

PACKS = [hexdigest(b"pack %d" % n) for n in range(4)]
KEYS = [(digest(b"chunk %d" % n), length) for n in range(6) for length in (1, 4096)]
REFS = ["refs/layers/sha256/" + letter * 64 for letter in "ab"]
chunks = st.lists(
    st.builds(lambda key, block: ChunkEntry(*key, block), st.sampled_from(KEYS), st.integers(0, (1 << 20) - 1)),
    unique_by=lambda entry: (entry.digest, entry.length),
    max_size=8,
)


class Model(RuleBasedStateMachine):
    """`packs`: pack -> chunk -> block; `refs` by key. A pack is published once, with the chunks it has, and again after it was removed."""

    def open(self):
        raise NotImplementedError

    def close(self): ...

    @initialize()
    def begin(self):
        self.uuid = str(uuid.uuid4())
        self.packs: dict[str, dict] = {}
        self.content: dict[str, list] = {}
        self.refs: dict[str, bytes] = {}
        self.left = []
        self.index = self.open()
        self.index.bind(self.uuid)

    def teardown(self):
        if hasattr(self, "index"):
            for index in (self.index, *self.left):
                index.close()
            self.close()

    @rule(pack=st.sampled_from(PACKS), entries=chunks)
    def add(self, pack, entries):
        entries = self.content.setdefault(pack, entries)  # a pack's id stands for what it holds
        self.index.add_pack(pack, entries)
        self.packs[pack] = {(e.digest, e.length): e.block for e in entries}

    @rule(gone=st.sets(st.sampled_from(PACKS), max_size=3))
    def remove(self, gone):
        self.index.remove_packs(gone)
        for pack in gone:
            self.packs.pop(pack, None)

    @rule(key=st.sampled_from(REFS), data=st.binary(max_size=40))
    def put(self, key, data):
        self.index.put_ref(key, data)
        self.refs[key] = data

    @rule(key=st.sampled_from(REFS))
    def delete(self, key):
        self.index.delete_ref(key)
        self.refs.pop(key, None)

    @rule()
    def close_and_open(self):
        self.index.close()
        self.index = self.open()
        self.index.bind(self.uuid)

    @rule()
    def killed_and_opened(self):
        """What was open stays so, as of a process that hangs."""
        self.left.append(self.index)
        self.index = self.open()
        self.index.bind(self.uuid)

    @rule()
    def of_another_store(self):
        """It is emptied, or never knew anything: nothing of the old store is told to the new one."""
        self.uuid = str(uuid.uuid4())
        self.index.close()
        self.index = self.open()
        self.index.bind(self.uuid)
        self.packs, self.refs = {}, {}

    @invariant()
    def it_knows_what_it_was_told(self):
        if not hasattr(self, "index"):
            return
        places = defaultdict(set)
        for pack, held in self.packs.items():
            for key, block in held.items():
                places[key].add(ChunkPlace(pack, block))
        found = self.index.find_chunks(KEYS)
        assert set(found) == set(places)
        assert all(found[key] in places[key] for key in found)
        assert self.index.pack_ids() == set(self.packs)
        assert {key: self.index.get_ref(key) for key in REFS} == {key: self.refs.get(key) for key in REFS}


class InMemory(Model):
    def open(self):
        kept = getattr(self, "kept", None)
        if kept is None:
            self.kept = kept = MemoryIndex()
        return kept


class Sqlite(Model):
    def open(self):
        if not hasattr(self, "folder"):
            self.folder = tempfile.mkdtemp(prefix="floe-index-")
        return open_index(f"sqlite:{self.folder}/index.db")

    def close(self):
        shutil.rmtree(self.folder)


class Redis(Model):
    def open(self):
        return open_index(redis_server.standalone().url())


MACHINES = {"memory": (InMemory, 30, 400), "sqlite": (Sqlite, 8, 300), "redis": (Redis, 3, 150)}


def run(name, examples, steps, **more):
    chosen = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck), **more
    )
    run_state_machine_as_test(MACHINES[name][0], settings=chosen)


@pytest.mark.parametrize("name", MACHINES)
def test_an_index_is_a_dictionary(name):
    run(name, MACHINES[name][1], 20)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", MACHINES)
def test_an_index_at_length(name):
    run(name, MACHINES[name][2], 60, derandomize=False)
