"""What the kernel makes of our images: every kind of entry, attribute by attribute."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from support.erofs_mount import fsck, mounted
from support.odd_tree import DIR, LNK, REG, odd_tree
from support.trees import TestPack, content_of, disk_facts, file_node, node_facts

from floe.ingest.entries import FileContent, Node, walk
from floe.ingest.erofs_writer import build_image, plan_image, write_image
from floe.store.erofs import read_device_table

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


def listed(directory: Path) -> list[bytes]:
    return sorted(os.fsencode(path.name) for path in directory.iterdir())


def write(tmp_path: Path, root: Node, *packs: TestPack) -> tuple[Path, list[Path]]:
    """The image and its devices as files, the devices in the order of the table."""
    image = tmp_path / "tree.erofs"
    image.write_bytes(build_image(root, {p.id: p.blocks for p in packs}))
    by_id = {p.id: p for p in packs}
    devices = []
    for pack_id, blocks in read_device_table(image):
        assert by_id[pack_id].blocks == blocks
        devices.append(tmp_path / pack_id)
        devices[-1].write_bytes(by_id[pack_id].data)
    return image, devices


def test_every_kind_of_entry(tmp_path):
    full, small = TestPack("full"), TestPack("small")
    root = odd_tree(full, small)
    image, devices = write(tmp_path, root, full, small)
    with mounted(image, devices, tmp_path / "mnt") as mnt:
        with (mnt / "vast").open("rb") as file:
            assert os.fstat(file.fileno()).st_size == 1 << 40
            file.seek((1 << 40) - 5)
            assert file.read() == bytes(5)
        split = (mnt / "split").read_bytes()
        assert split == content_of(root.children[b"split"], {full.id: full.data, small.id: small.data})
        # Reading a terabyte of zeros would take too long: of that file the size and the end are enough.
        del root.children[b"vast"]
        expected = node_facts(root, {full.id: full.data, small.id: small.data})
        facts = disk_facts(mnt, without=b"vast")
        assert set(facts) == set(expected)
        for path, fact in expected.items():
            assert facts[path] == fact, path


def test_tree_without_packs_mounts(tmp_path):
    root = Node(DIR, children={b"a": Node(DIR), b"s": Node(LNK, link=b"a")})
    image, devices = write(tmp_path, root)
    assert devices == []
    with mounted(image, devices, tmp_path / "mnt") as mnt:
        assert sorted(p.name for p in mnt.iterdir()) == ["a", "s"]


def test_256_packs_mount(tmp_path):
    packs = [TestPack(str(i)) for i in range(256)]
    root = Node(DIR)
    for number, pack in enumerate(packs):
        root.children[b"%d" % number] = file_node(pack, b"%d" % number)
    image, devices = write(tmp_path, root, *packs)
    with mounted(image, devices, tmp_path / "mnt") as mnt:
        assert all((mnt / str(i)).read_text() == str(i) for i in range(256))


@pytest.mark.slow
def test_hundred_thousand_entries_in_one_directory(tmp_path):
    pack = TestPack("p")
    chunk = pack.add(b"same")
    content = FileContent(4, 12, (chunk,))
    root = Node(DIR)
    root.children = {b"file-%06d" % i: Node(REG, mtime=i, content=content) for i in range(100_000)}
    image, devices = write(tmp_path, root, pack)
    with mounted(image, devices, tmp_path / "mnt") as mnt:
        assert listed(mnt) == sorted(root.children)
        for number in (0, 1, 4711, 99_999):
            path = mnt / f"file-{number:06d}"
            assert path.read_bytes() == b"same"
            assert path.stat().st_mtime == number
        assert not (mnt / "file-100000").exists()


def test_fsck_accepts_a_tree(tmp_path):
    full, small = TestPack("full"), TestPack("small")
    root = odd_tree(full, small)
    del root.children[b"vast"]  # it would be read whole
    image, devices = write(tmp_path, root, full, small)
    fsck(image, devices)


def test_dump_counts_the_inodes(tmp_path):
    full, small = TestPack("full"), TestPack("small")
    root = odd_tree(full, small)
    image, devices = write(tmp_path, root, full, small)
    options = [f"--device={device}" for device in devices]
    done = subprocess.run(["dump.erofs", "-s", *options, image], capture_output=True, text=True, check=True)
    inodes = len({id(node) for _, node in walk(root)})
    assert re.search(rf"inode count:\s+{inodes}\n", done.stdout), done.stdout


def test_unstorable_attributes_are_left_out_and_said(tmp_path):
    root = Node(DIR, xattrs={b"system.nfs4_acl": b"x", b"user.kept": b"1", b"security." + b"n" * 250: b"x"})
    plan = plan_image(root, {})
    assert len(plan.warnings) == 2
    assert "system.nfs4_acl" in plan.warnings[1]
    image = tmp_path / "t"
    image.write_bytes(write_image(plan))
    with mounted(image, [], tmp_path / "mnt") as mnt:
        assert os.listxattr(mnt) == ["user.kept"]
