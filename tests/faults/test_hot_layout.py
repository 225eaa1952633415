"""Layers laid out by start-up profiles: what starts read lies together, nothing else changes, and what it costs."""

import random

import pytest
from support.erofs_mount import fsck
from support.images import build_oci, files
from support.stores import StoreWrapper

from floe.ingest import hotcontent
from floe.ingest.oci.image import ALL_LAYERS, NO_LAYERS, index_image
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.erofs import read_device_table
from floe.store.erofs_inodes import Inodes
from floe.store.errors import AccessDeniedError
from floe.store.frames import decode_frame
from floe.store.index import NullIndex
from floe.store.objects.memory import MemoryStore
from floe.store.packindex import LAYER_FRAME, PackIndex
from floe.store.profile import Profile, Touch
from floe.store.profilepaths import locate
from floe.store.profiles import ProfileStore
from floe.store.replay import plan
from floe.store.treeobject import decode_tree

MIB = 1 << 20
HOT = [f"d{n % 7}/f{n:03}" for n in (250, 3, 120, 77, 199, 298, 10, 45, 160, 222, 64, 281)]  # in the order of need


def content(seed=3):
    r = random.Random(seed)
    found = {f"d{n % 7}/f{n:03}": r.randbytes(r.randrange(1, 30000)) for n in range(300)}
    return found | {"big": r.randbytes(9 * MIB)}


class Repository:
    """A store, and versions of an image in it."""

    def __init__(self, folder, store=None):
        self.folder = folder
        self.store = store or MemoryStore()
        self.catalog = Catalog(self.store, NullIndex())
        self.catalog.ensure_store()
        self.profiles = ProfileStore(self.catalog)
        self.number = 0

    def build(self, *layers):
        self.number += 1
        return build_oci(
            self.folder / f"image{self.number}" / "app", [files(layer) for layer in layers], tag="1", compression="none"
        )

    def index(self, image, **options):
        # Versions of one repository: the name before the tag is what they have in common.
        link = self.folder / "app"
        link.unlink(missing_ok=True)
        link.symlink_to(image.directory)
        return index_image(self.catalog, f"oci:{link}:{image.tag}", spool_dir=self.folder, **options)

    def tree(self, image, number=0):
        return self.catalog.layer(image.diff_ids[number])[1].tree.digest

    def image_of(self, tree):
        return Inodes(decode_tree(self.store.get(layout.tree_key(tree)), tree))

    def started(self, tree, paths=HOT):
        """As after a start that read these files, one after the other."""
        pieces = {(path.encode(), 0): Touch(number, 1) for number, path in enumerate(paths)}
        self.profiles.add(tree, Profile(starts=1, pieces=pieces))

    def runs(self, tree, paths=HOT):
        """The requests by which these files are replayed."""
        image = self.image_of(tree)
        frames = []
        for pack, offset, length in locate(image, [(path.encode(), 0) for path in paths]):
            frames += [(pack, n) for n in range(offset // LAYER_FRAME, (offset + length - 1) // LAYER_FRAME + 1)]
        return list(plan(frames, lambda _: LAYER_FRAME))

    def read(self, tree, path):
        """A file's bytes, as a reader finds them."""
        image = self.image_of(tree)
        found = b""
        for pack, offset, length in locate(image, [(path.encode(), piece) for piece in range(80)]):
            found += self.pack(pack)[offset : offset + length]
        return found

    def pack(self, pack_id):
        index = PackIndex.decode(self.store.get(layout.pack_index_key(pack_id)), pack_id)
        stored = memoryview(self.store.get(layout.pack_key(pack_id)))
        parts = []
        for number, (entry, start) in enumerate(zip(index.frames, index.stored_offsets, strict=False)):
            parts.append(
                decode_frame(stored[start : start + entry.stored], entry, index.content_length(number)).content
            )
        return b"".join(map(bytes, parts))

    def packs(self):
        return {info.key: info.size for info in self.store.list(layout.PACKS)}


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path)


def check(repository, tree, wanted):
    for path in (*HOT, "d0/f000", "big"):
        assert repository.read(tree, path) == wanted[path], path


def check_by_fsck(repository, tree, folder):
    """fsck.erofs reads a tree of the store, and all its content, from packs written out."""
    image = decode_tree(repository.store.get(layout.tree_key(tree)), tree)
    (folder / tree).write_bytes(image)
    devices = [folder / pack_id for pack_id, _ in read_device_table(image)]
    for device in devices:
        device.write_bytes(repository.pack(device.name))
    fsck(folder / tree, devices)


def test_without_a_profile_nothing_changes_byte_for_byte(repository, tmp_path):
    """The ids are those of Floe before it knew of hot files."""
    image = repository.build(content())
    result = repository.index(image)
    assert [key.rpartition("/")[2] for key in repository.packs()] == [
        "70497809cdfdcec9d2a7e777b7cc0d7026ccc680cb61f3f858831d20b4a1f1c7"
    ]
    assert repository.tree(image) == "6e60951b90c23e41b2127eff28efb2befbafe1f5a6a80fc7c089df6d3ed323ab"
    assert (result.hot_bytes, result.copied_bytes, result.laid_out_layers) == (0, 0, 0)
    (tmp_path / "other").mkdir()
    other = Repository(tmp_path / "other")
    other.started(repository.tree(image))  # of the same tree, which was not asked for
    other.index(image, profile=NO_LAYERS)
    assert other.packs() == repository.packs()


def test_the_next_version_has_what_starts_read_at_the_front_of_a_pack(repository):
    first = repository.build(content(3))
    repository.index(first)
    repository.started(repository.tree(first))
    assert len(repository.runs(repository.tree(first))) >= 8  # some are neighbours
    wanted = content(4)
    second = repository.build(wanted)
    result = repository.index(second)
    tree = repository.tree(second)
    (run,) = repository.runs(tree)
    assert run.first == 0
    hot = sum(len(wanted[path]) for path in HOT)
    assert (result.hot_bytes, result.copied_bytes) == (hot, 0)  # new content is stored once, wherever it lies
    # In the order in which the start wanted them.
    places = [next(iter(locate(repository.image_of(tree), [(path.encode(), 0)]))).offset for path in HOT]
    assert places == sorted(places)
    check(repository, tree, wanted)


def test_fsck_accepts_trees_that_are_laid_out(repository, tmp_path):
    first, second = repository.build(content(3)), repository.build(content(4))
    repository.index(first)
    repository.started(repository.tree(first))
    repository.index(second)  # by the profile of its predecessor
    scattered = repository.tree(first)
    repository.index(first, profile=ALL_LAYERS)  # and anew by its own
    assert repository.tree(first) != scattered
    for tree in (scattered, repository.tree(first), repository.tree(second)):
        check_by_fsck(repository, tree, tmp_path)


def test_it_is_the_same_again_and_without_it_another(repository, tmp_path):
    wanted, digests = content(4), []
    for name, option in (("a", {}), ("b", {}), ("c", {"profile": NO_LAYERS})):
        (tmp_path / name).mkdir()
        made = Repository(tmp_path / name)
        before = made.build(content(3))
        made.index(before)
        made.started(made.tree(before))
        image = made.build(wanted)
        made.index(image, **option)
        digests.append((made.tree(image), made.packs()))
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_a_stored_layer_is_laid_out_anew_when_that_is_asked_for(repository):
    wanted = content()
    image = repository.build(wanted)
    repository.index(image)
    old = repository.tree(image)
    repository.started(old)
    assert repository.index(image).new_packs == 0
    assert repository.tree(image) == old
    before = repository.packs()
    result = repository.index(image, profile=ALL_LAYERS)
    tree = repository.tree(image)
    hot = sum(len(wanted[path]) for path in HOT)
    assert (result.hot_bytes, result.copied_bytes, result.laid_out_layers, result.new_layers) == (hot, hot, 1, 0)
    (new,) = repository.packs().keys() - before.keys()
    assert repository.packs()[new] < hot * 1.2  # what it costs: the hot files once more
    (run,) = repository.runs(tree)
    assert run == (
        new.rpartition("/")[2],
        0,
        -(-sum(-(-len(wanted[path]) // 4096) * 4096 for path in HOT) // LAYER_FRAME),
    )
    check(repository, tree, wanted)
    # Its starts are remembered by path, and asking again changes nothing.
    known = repository.profiles.of_tree(tree)
    assert (known.starts, len(known.pieces), len(known.frames)) == (1, len(HOT), 0)
    after = repository.packs()
    again = repository.index(image, profile=ALL_LAYERS)
    assert (again.new_packs, again.copied_bytes, again.laid_out_layers) == (0, 0, 0)
    assert (repository.tree(image), repository.packs()) == (tree, after)


def test_the_version_after_shares_what_was_laid_out(repository):
    """All but two of the hot files are the same: they stay in the pack of the version before."""
    wanted = content()
    image = repository.build(wanted)
    repository.index(image)
    repository.started(repository.tree(image))
    repository.index(image, profile=ALL_LAYERS)
    following = wanted | {HOT[2]: b"changed" * 900, HOT[5]: b"also changed" * 900, "d1/new": b"new"}
    second = repository.build(following)
    result = repository.index(second)
    assert result.copied_bytes == 0
    assert result.new_bytes < 40_000
    assert len(repository.runs(repository.tree(second))) <= 3
    check(repository, repository.tree(second), following)


def test_what_is_stored_scattered_is_stored_once_more(repository):
    """Another image has brought the same files, in its own order."""
    first = repository.build(content(3))
    repository.index(first)
    repository.started(repository.tree(first))
    wanted = content(5)
    other = repository.build(wanted | {"more": b"x" * 100})
    repository.index(other, profile=NO_LAYERS)
    second = repository.build(wanted)
    result = repository.index(second)
    hot = sum(len(wanted[path]) for path in HOT)
    assert (result.hot_bytes, result.copied_bytes) == (hot, hot)
    assert len(repository.runs(repository.tree(second))) == 1
    check(repository, repository.tree(second), wanted)


def test_few_files_and_large_ones_stay_where_they_are(repository):
    first = repository.build(content(3))
    repository.index(first)
    repository.started(repository.tree(first), ["big", *HOT[: hotcontent.LEAST - 1]])
    wanted = content(4)
    second = repository.build(wanted)
    assert repository.index(second).hot_bytes == sum(len(wanted[path]) for path in HOT[: hotcontent.LEAST - 1])
    assert len(repository.packs()) == 2  # no pack of their own
    check(repository, repository.tree(second), wanted)


def test_more_than_may_be_kept_goes_its_ordinary_way(repository, monkeypatch):
    monkeypatch.setattr(hotcontent, "HOT_MAX", 100_000)
    first = repository.build(content(3))
    repository.index(first)
    repository.started(repository.tree(first))
    wanted = content(4)
    second = repository.build(wanted)
    repository.index(second)
    check(repository, repository.tree(second), wanted)


def test_layers_that_share_hot_files_are_whole(repository):
    """Two layers at once, both with profiles, and content in common."""
    first = repository.build(content(3), content(6))
    repository.index(first)
    for number in (0, 1):
        repository.started(repository.tree(first, number))
    wanted = content(4)
    upper = {path: wanted[path] for path in HOT} | {"big": content(7)["big"], "d0/f000": b"own"}
    second = repository.build(wanted, upper)
    repository.index(second, workers=4)
    check(repository, repository.tree(second, 0), wanted)
    check(repository, repository.tree(second, 1), upper)


def test_profiles_that_cannot_be_read_cost_the_layout_only(tmp_path):
    class Denied(StoreWrapper):
        def get(self, key, *args):
            if key.startswith("profiles/"):
                raise AccessDeniedError("no such permission")
            return super().get(key, *args)

    repository = Repository(tmp_path, Denied(MemoryStore()))
    image = repository.build(content())
    result = repository.index(image)
    assert any("start-up profile" in warning for warning in result.warnings)
    assert repository.tree(image) == "6e60951b90c23e41b2127eff28efb2befbafe1f5a6a80fc7c089df6d3ed323ab"


@pytest.mark.parametrize("damage", ["record", "newer", "pack"])
def test_without_knowing_where_hot_files_lie_they_are_stored_once_more(repository, damage):
    wanted = content()
    image = repository.build(wanted)
    repository.index(image)
    repository.started(repository.tree(image))
    before = set(repository.packs())
    repository.index(image, profile=ALL_LAYERS)
    (pack,) = set(repository.packs()) - before
    (record,) = repository.store.list(layout.SOURCE_LAYOUTS)
    if damage == "pack":
        repository.store.delete(pack)
    else:
        version = 99 if damage == "newer" else 1
        text = f'{{"format":"floe.layout","version":{version},"source":"x","packs":["no id"]}}'
        repository.store.put(record.key, text.encode())
    following = wanted | {"d1/new": b"new"}
    second = repository.build(following)
    result = repository.index(second)
    assert result.copied_bytes == sum(len(wanted[path]) for path in HOT)
    check(repository, repository.tree(second), following)
    # Known again: the record was replaced, a newer Floe's too, since it is advice.
    assert repository.index(second, profile=ALL_LAYERS).copied_bytes == 0
