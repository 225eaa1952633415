"""Random trees survive writing and reading; random damage is noticed or harmless."""

from __future__ import annotations

import os
import stat

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.erofs_mount import fsck, mounted
from support.trees import TestPack, disk_facts, file_node, node_facts

from floe.ingest.entries import Node, place_tree, walk
from floe.ingest.erofs_writer import build_image
from floe.store import erofs
from floe.store.erofs_reader import read_image
from floe.store.errors import DamagedError, UnsupportedError

names = (
    st.binary(min_size=1, max_size=255)
    .map(lambda raw: raw.replace(b"/", b"_").replace(b"\0", b"_"))
    .filter(lambda name: name not in (b".", b".."))
)
xattrs = st.dictionaries(
    st.tuples(st.sampled_from([b"user.", b"trusted."]), st.text("abc", min_size=1, max_size=20)).map(
        lambda parts: parts[0] + parts[1].encode()
    ),
    st.binary(max_size=300),
    max_size=3,
)
attributes = st.fixed_dictionaries(
    {
        "uid": st.integers(0, 0xFFFFFFFE),
        "gid": st.integers(0, 0xFFFFFFFE),
        "mtime": st.integers(-(1 << 33), 1 << 33),
        "mtime_ns": st.integers(0, 10**9 - 1),
        "xattrs": xattrs,
    }
)
permissions = st.integers(0, 0o7777)
contents = st.one_of(
    st.binary(max_size=9000),
    st.integers(1, 10 << 20).map(lambda size: (b"Floe" * (size // 4 + 1))[:size]),
    st.integers(1, 10 << 20).map(bytes),
)
leaves = st.one_of(
    st.tuples(st.just("file"), attributes, permissions, contents),
    st.tuples(
        st.just("link"), attributes, permissions, st.binary(min_size=1, max_size=4095).filter(lambda b: 0 not in b)
    ),
    st.tuples(
        st.just("special"), attributes, permissions, st.sampled_from([stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR])
    ),
)
trees = st.recursive(
    leaves,
    lambda inner: st.tuples(st.just("dir"), attributes, permissions, st.dictionaries(names, inner, max_size=6)),
    max_leaves=25,
)
roots = st.dictionaries(names, trees, max_size=8)


def build(kind, given_attributes, mode, value, pack) -> Node:
    if kind == "dir":
        children = {name: build(*child, pack) for name, child in value.items()}
        return Node(stat.S_IFDIR | mode, children=children, **given_attributes)
    if kind == "file":
        return file_node(pack, value, mode, **given_attributes)
    if kind == "link":
        return Node(stat.S_IFLNK | 0o777, link=value, **given_attributes)
    rdev = os.makedev(12, 345) if value == stat.S_IFCHR else 0
    return Node(value | mode, rdev=rdev, **given_attributes)


def build_root(children, pack) -> Node:
    root = Node(stat.S_IFDIR | 0o755, children={name: build(*child, pack) for name, child in children.items()})
    files = [node for _, node in walk(root) if node.is_file]
    if files:
        root.children[b"hard link"] = files[0]
    return root


@settings(max_examples=35, deadline=None, suppress_health_check=list(HealthCheck))
@given(roots)
def test_read_back_equal(children):
    pack = TestPack("p")
    root = build_root(children, pack)
    image = build_image(root, {pack.id: pack.blocks})
    packs = {pack.id: pack.data}
    back = read_image(image)
    assert node_facts(back, packs) == node_facts(root, packs)
    assert build_image(back, dict(erofs.read_device_table(image))) == image


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(roots)
def test_the_kernel_reads_the_same(tmp_path_factory, children):
    home = tmp_path_factory.mktemp("tree")
    pack = TestPack("p")
    root = build_root(children, pack)
    # user.* attributes exist on files and directories only, as the kernel sees them.
    for _, node in walk(root):
        if not node.is_dir and not node.is_file:
            node.xattrs = {name: value for name, value in node.xattrs.items() if not name.startswith(b"user.")}
    image, device = home / "tree", home / "pack"
    image.write_bytes(build_image(root, {pack.id: pack.blocks}))
    device.write_bytes(pack.data)
    devices = [device] if erofs.read_device_table(image) else []
    with mounted(image, devices, home / "mnt") as mnt:
        assert disk_facts(mnt) == node_facts(root, {pack.id: pack.data})


places = st.lists(names, min_size=1, max_size=4).map(lambda parts: "/" + os.fsdecode(b"/".join(parts)))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(roots, st.none() | places, st.integers(1, 3))
def test_fsck_accepts_trees_as_they_are_and_placed(tmp_path_factory, children, place, count):
    """A tree at its top or, as an attached model, at a path; its files in up to three packs."""
    home = tmp_path_factory.mktemp("tree")
    packs = [TestPack(f"p{number}") for number in range(count)]
    root = Node(stat.S_IFDIR | 0o755)
    for number, (name, child) in enumerate(children.items()):
        root.children[name] = build(*child, packs[number % count])
    files = [node for _, node in walk(root) if node.is_file]
    if files:
        root.children[b"hard link"] = files[-1]
    shown = root if place is None else place_tree(root, place)
    image = build_image(shown, {pack.id: pack.blocks for pack in packs})
    (home / "tree").write_bytes(image)
    by_id = {pack.id: pack for pack in packs}
    devices = []
    for pack_id, _ in erofs.read_device_table(image):
        devices.append(home / pack_id)
        devices[-1].write_bytes(by_id[pack_id].data)
    fsck(home / "tree", devices)
    assert node_facts(read_image(image), {pack.id: pack.data for pack in packs}) == node_facts(
        shown, {pack.id: pack.data for pack in packs}
    )


def test_fsck_refuses_what_is_no_tree(tmp_path):
    (tmp_path / "tree").write_bytes(IMAGE[: erofs.SUPERBLOCK_OFFSET] + bytes(4) + IMAGE[erofs.SUPERBLOCK_OFFSET + 4 :])
    with pytest.raises(AssertionError, match=r"superblock|magic"):
        fsck(tmp_path / "tree", [])


def sample() -> bytes:
    pack = TestPack("p")
    root = Node(stat.S_IFDIR | 0o755, xattrs={b"user.a": b"b"})
    root.children = {b"f%d" % i: file_node(pack, b"%d" % i, xattrs={b"user.x": b"y" * i}) for i in range(40)}
    root.children[b"big"] = file_node(pack, b"z" * (5 << 20))
    root.children[b"link"] = Node(stat.S_IFLNK | 0o777, link=b"l" * 4090)
    root.children[b"dir"] = Node(
        stat.S_IFDIR | 0o700, children={b"n%d" % i * 20: Node(stat.S_IFREG) for i in range(99)}
    )
    root.children[b"hard"] = root.children[b"f1"]
    return build_image(root, {pack.id: pack.blocks})


IMAGE = sample()


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(IMAGE) - 1), st.integers(1, 255)), min_size=1, max_size=6), st.booleans())
def test_damage_is_noticed_or_harmless(flips, fix_checksum):
    image = bytearray(IMAGE)
    for position, flip in flips:
        image[position] ^= flip
    if fix_checksum:  # reach what lies behind the superblock's checksum
        checksum = erofs.superblock_checksum(image)
        image[erofs.SUPERBLOCK_OFFSET + 4 : erofs.SUPERBLOCK_OFFSET + 8] = checksum.to_bytes(4, "little")
    try:
        root = read_image(image)
    except (DamagedError, UnsupportedError):
        return
    for _, node in walk(root):
        assert node.content is None or sum(c.length for c in node.content.chunks if c) <= node.content.size


@settings(max_examples=50, deadline=None)
@given(st.integers(0, len(IMAGE)))
def test_truncation_is_noticed(length):
    if length != len(IMAGE):
        with pytest.raises(DamagedError):
            read_image(IMAGE[:length])
