"""Several cache directories against a model: what one of them holds is found wherever it belongs, and none takes others along."""

import random
import shutil
import tempfile
from pathlib import Path
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.mounts import until
from support.packs import make_pack, random_content

from floe.store.cache import CacheGroup, GroupWriter, NodeCache, group, ownership, placing
from floe.store.frames import VerifiedFrame

FRAME = 64 << 10
COUNT = 8  # frames of a pack
SIZE = COUNT * FRAME  # of a directory: one pack
PACKS = [make_pack(random_content(COUNT * FRAME, seed), FRAME) for seed in range(6)]
NAMES = ("a", "b", "c")

packs = st.sampled_from(PACKS)
lists = st.permutations(NAMES).flatmap(lambda names: st.integers(2, 3).map(lambda count: names[:count]))


def ranked_by_name(pack_id, weights):
    """Places that follow from the directories' names, and not from where this run has them: else no failure could be repeated."""
    paths = {Path(path).name: path for path in weights}
    return [paths[name] for name in placing.ranked(pack_id, dict.fromkeys(paths, 1))]


class Group(RuleBasedStateMachine):
    """`held`: by directory and pack the frames in it, at most; `gone`: directories taken away under the writer."""

    @initialize()
    def begin(self):
        shared = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(prefix="floe-group-", dir=shared if shared.is_dir() else None))
        self.placing = mock.patch.object(group, "ranked", ranked_by_name)
        self.placing.start()
        self.held = {(name, pack.id): set() for name in NAMES for pack in PACKS}
        self.gone = set()
        self.boot = 0
        self.pinned = {}  # pack -> frames that were there since
        self.start(NAMES)

    def teardown(self):
        if hasattr(self, "folder"):
            self.writer.close()
            self.placing.stop()
            shutil.rmtree(self.folder)

    def start(self, names):
        self.names = names
        self.cache = CacheGroup([NodeCache(self.folder / name, size=SIZE) for name in names])
        for pack in PACKS:
            self.cache.add_index(pack.id, pack.index.encode())
        self.writer = GroupWriter(self.cache, boot_id=f"{self.boot:036d}")
        self.see_pins()

    def see_pins(self):
        """Of a pack that lies in several directories by now one copy counts: a pin may be of the other."""
        self.pinned = {pack.id: self.trusted(pack) for pack in PACKS if self.cache.home(pack.id).pins(pack.id)}

    def end(self):
        self.writer.close()
        for name in self.gone:
            (self.folder / f"{name}.away").rename(self.folder / name)
        self.gone = set()

    def home(self, pack):
        return self.writer.pack(pack.id).folder.parent.parent.name

    def trusted(self, pack):
        return {number for number in range(COUNT) if self.writer.has(pack.id, number)}

    @rule(pack=packs, start=st.integers(0, COUNT - 1), count=st.integers(1, COUNT), unread=st.booleans())
    def put(self, pack, start, count, unread):
        numbers = range(COUNT)[start : start + count]
        frames = [VerifiedFrame(pack.content[n * FRAME :][:FRAME], pack.index.frames[n].digest) for n in numbers]
        kept = self.writer.put_run(pack.id, start, frames, unread=unread)
        if not (kept or unread or any(self.cache.pins(one.id) for one in PACKS)):
            # Nothing else keeps frames out for long: a pack that is being completed, or the pause after nothing could go.
            kept = until(lambda: self.writer.put_run(pack.id, start, frames))
        if kept:
            assert set(numbers) <= self.trusted(pack)
            self.held[self.home(pack), pack.id] |= set(numbers)

    @rule(pack=packs)
    def pin(self, pack):
        self.cache.pin(pack.id, "x")
        self.pinned[pack.id] = self.pinned.get(pack.id, set()) | self.trusted(pack)

    @rule(pack=packs)
    def unpin(self, pack):
        self.cache.unpin(pack.id, "x")
        self.pinned.pop(pack.id, None)

    @precondition(lambda self: not self.gone)
    @rule(data=st.data())
    def a_directory_goes(self, data):
        """Its packs are absent until the next start; the others' stay, and what comes goes to these. Indexes survive one."""
        name = data.draw(st.sampled_from(self.names))
        others = {pack.id: self.trusted(pack) for pack in PACKS if self.home(pack) != name}
        (self.folder / name).rename(self.folder / f"{name}.away")
        self.writer._troubled[self.folder / name].set()
        until(lambda: self.state(name) == "left out")
        self.gone.add(name)
        assert all(self.trusted(pack) == others[pack.id] for pack in PACKS if pack.id in others)
        self.pinned = {pack_id: frames for pack_id, frames in self.pinned.items() if pack_id in others}

    def state(self, name):
        (disk,) = [disk for disk in self.writer.disks() if Path(disk["path"]).name == name]
        return disk["state"]

    @rule(names=lists)
    def stop_and_start(self, names):
        """With others of the directories, perhaps, and in another order."""
        before = {pack.id: (self.home(pack), self.trusted(pack)) for pack in PACKS}
        same = not self.gone and set(names) == set(self.names)
        self.end()
        self.start(names)
        if same:
            assert all(self.trusted(pack) == before[pack.id][1] for pack in PACKS)

    @rule(names=lists, seed=st.integers(0, 1 << 32))
    def power_loss(self, names, seed):
        """A kill, and data lost of packs that are not complete: nothing is served of them before it was hashed."""
        choose = random.Random(seed)  # what was synced by now is a matter of time, and what is drawn must not be
        unsynced = {}
        for writer in self.writer._writers.values():
            writer._finishing.put(None)
            writer._finisher.join()
            for pack in writer.packs.values():
                lost = {n for n in pack.bits.present() if pack.changed or pack.bits.is_suspect(n)}
                if lost and not pack.complete:
                    unsynced[pack.folder] = lost
                pack.files = None
            ownership.release(writer._lock_fd)
        self.writer._writers = {}
        self.end()
        self.boot += 1
        spoiled = set()
        for folder, frames in sorted(unsynced.items()):
            if choose.random() < 0.5:
                number = choose.choice(sorted(frames))
                with (folder / "data").open("r+b") as file:
                    file.seek(number * FRAME)
                    file.write(b"spoiled!")
                spoiled.add((folder.parent.parent.name, folder.name, number))
        self.start(names)
        for pack in PACKS:
            home = self.home(pack)
            trusted = self.trusted(pack)
            assert not any((home, pack.id, number) in spoiled for number in trusted)
            for number in set(range(COUNT)) - trusted:
                frame = self.writer.recheck(pack.id, number)
                assert frame is None or (home, pack.id, number) not in spoiled
                assert frame is None or frame.content == pack.content[number * FRAME :][:FRAME]
        self.see_pins()

    @invariant()
    def what_it_has_is_right(self):
        if not hasattr(self, "folder"):
            return
        for pack in PACKS:
            trusted = self.trusted(pack)
            assert trusted <= self.held[self.home(pack), pack.id]
            assert self.home(pack) in set(self.names) - self.gone
            assert self.pinned.get(pack.id, set()) <= trusted
            for number in trusted:
                buffer = bytearray(FRAME)
                assert self.writer.pack(pack.id).read_into(number * FRAME, memoryview(buffer))
                assert buffer == pack.content[number * FRAME :][:FRAME]
        for disk in self.writer.disks():
            assert disk["held_bytes"] <= SIZE


Group.TestCase.settings = settings(
    max_examples=25, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
TestGroup = Group.TestCase
