"""What a mounted tree is, whatever mounts it: EROFS on files, EROFS on loop devices, the portable mount."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.mounts import content_of as random_file
from support.mounts import entry_at, mount_node, until
from support.odd_tree import DIR, odd_tree
from support.trees import TestPack, content_of, disk_facts, file_node, node_facts

from floe.ingest.entries import FileContent, Node
from floe.mount.loop import attached_loops
from floe.mount.mountinfo import read_mounts
from floe.store.erofs_inodes import Inodes
from floe.store.errors import BusyError
from floe.store.process import is_alive

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
MIB = 1 << 20
KINDS = {
    "erofs": {"kind": "erofs", "loop": "never"},
    "loop": {"kind": "erofs", "loop": "always"},
    "portable": {"kind": "portable"},
}
BELOW = ("native", "packfs")


class Mounts:
    """Trees of `node` mounted by one kind of mounter over one kind of packs."""

    def __init__(self, node, kind, below):
        self.node, self.kind, self.complete = node, kind, below == "native"
        self.mounter = node.mounter(**KINDS[kind])
        if not self.complete:
            self.server = node.serve()

    def mount(self, tree):
        where = self.mounter.mount(tree, "a")
        (record,) = [record for record in self.mounter.mounts() if record.digest == tree.digest]
        assert bool(record.loops) == (self.kind == "loop")
        assert bool(record.server) == (self.kind == "portable")
        return where


@pytest.fixture(
    params=[
        (kind, below)
        for kind in KINDS
        for below in BELOW
        if (kind, below) != ("loop", "packfs")  # see tests/mount/test_mounter_loop.py
    ],
    ids="-".join,
)
def mounts(request, tmp_path):
    with mount_node(tmp_path) as node:
        yield Mounts(node, *request.param)


@pytest.fixture(params=KINDS)
def native(request, tmp_path):
    """The same, over complete packs only."""
    with mount_node(tmp_path) as node:
        yield Mounts(node, request.param, "native")


def refused(number, action):
    with pytest.raises(OSError, match=r".") as caught:
        action()
    assert caught.value.errno == number, caught.value


def test_every_kind_of_entry(mounts):
    full, small = TestPack("full"), TestPack("small")
    root = odd_tree(full, small)
    tree = mounts.node.install(root, [full, small], complete=mounts.complete)
    packs = {pack.id: pack.data.read_bytes() for pack in tree.packs}
    where = mounts.mount(tree)
    with (where / "vast").open("rb") as file:
        assert os.fstat(file.fileno()).st_size == 1 << 40
        file.seek((1 << 40) - 5)
        assert file.read() == bytes(5)
    assert (where / "split").read_bytes() == content_of(root.children[b"split"], packs)
    del root.children[b"vast"]  # reading all of it would take too long
    expected = node_facts(root, packs)
    facts = disk_facts(where, without=b"vast")
    assert set(facts) == set(expected)
    assert {path: (facts[path], fact) for path, fact in expected.items() if facts[path] != fact} == {}


def test_inodes_sizes_and_times_are_those_of_the_image(native):
    full, small = TestPack("full"), TestPack("small")
    tree = native.node.install(odd_tree(full, small), [full, small])
    where = native.mount(tree)
    image = Inodes(tree.image.read_bytes())
    pending = [(where, image.inode(image.superblock.root_nid))]
    seen = 0
    while pending:
        here, inode = pending.pop()
        found = here.lstat()
        assert (found.st_ino, found.st_size) == (inode.nid, inode.size), here
        assert found.st_blocks == -(-inode.size // 4096) * 8, here
        assert found.st_atime_ns == found.st_ctime_ns == found.st_mtime_ns, here
        seen += 1
        if stat.S_ISDIR(inode.mode):
            # Path is no place for names of any bytes.
            with os.scandir(here) as entries:
                listed = {os.fsencode(entry.name): entry.inode() for entry in entries}
            known = {entry.name: entry.nid for entry in image.entries(inode) if entry.name not in (b".", b"..")}
            assert listed == known
            pending.extend((here / os.fsdecode(name), image.inode(nid)) for name, nid in known.items())
    assert seen > 3000


def test_a_directory_names_itself_and_its_parent(native):
    tree = native.node.install(Node(DIR, children={b"sub": Node(DIR)}), [])
    where = native.mount(tree)
    script = 'for name in "$1" "$1"/sub; do ls -f1 "$name"; done'
    listed = subprocess.run(["sh", "-c", script, "sh", where], check=True, capture_output=True, text=True).stdout
    assert sorted(listed.split()) == [".", ".", "..", "..", "sub"]


def test_reads_of_any_place_and_length(mounts):
    size = 21 * MIB + 4321
    pack = TestPack("p")
    content = random_file("any", 0, size)
    with_hole = content[: 4 * MIB] + bytes(4 * MIB) + content[8 * MIB :]
    root = Node(DIR, children={b"f": file_node(pack, with_hole)})
    where = mounts.mount(mounts.node.install(root, [pack], complete=mounts.complete))
    source = random.Random("any place")
    with (where / "f").open("rb", buffering=0) as file:
        for _ in range(200):
            at, length = source.randrange(size + 9000), source.choice((1, 511, 4096, 70_000, 3 * MIB))
            assert os.pread(file.fileno(), length, at) == with_hole[at : at + length]
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            for _ in range(50):
                at = source.randrange(size)
                assert mapped[at : at + 9000] == with_hole[at : at + 9000]
        with ThreadPoolExecutor(8) as threads:
            reads = threads.map(lambda n: os.pread(file.fileno(), MIB, n * MIB), range(22))
            assert b"".join(reads) == with_hole


def test_nothing_can_be_changed(native):
    pack = TestPack("p")
    root = Node(DIR, children={b"one": file_node(pack, b"1"), b"d": Node(DIR)})
    where = native.mount(native.node.install(root, [pack]))
    one = where / "one"
    for action in (
        lambda: one.open("r+b"),
        (where / "new").touch,
        (where / "new").mkdir,
        one.unlink,
        (where / "d").rmdir,
        lambda: one.rename(where / "else"),
        lambda: one.chmod(0o600),
        lambda: os.chown(one, 1, 1),
        lambda: os.utime(one),
        lambda: os.truncate(one, 0),
        lambda: os.setxattr(one, "user.new", b""),
        lambda: os.link(one, where / "else"),
    ):
        refused(errno.EROFS, action)
    assert os.statvfs(where).f_flag & os.ST_RDONLY
    refused(errno.ENOENT, (where / "no such").stat)
    refused(errno.ENOTDIR, (one / "below").stat)
    refused(errno.ENODATA, lambda: os.getxattr(one, "user.none"))


def test_permissions_count(native):
    """Modes and ACLs hold for those who are not root, and attributes of trusted.* are root's."""
    pack = TestPack("p")
    acl = b"\2\0\0\0" + b"".join(
        tag.to_bytes(2, "little") + permission.to_bytes(2, "little") + who.to_bytes(4, "little")
        for tag, permission, who in (
            (1, 6, 2**32 - 1), (2, 4, 4242), (4, 0, 2**32 - 1), (16, 4, 2**32 - 1), (32, 0, 2**32 - 1)
        )
    )  # fmt: skip
    root = Node(
        DIR,
        children={
            b"private": file_node(pack, b"x", 0o600),
            b"public": file_node(pack, b"x", 0o644, xattrs={b"trusted.t": b"1", b"user.u": b"2"}),
            b"acl": file_node(pack, b"x", 0o640, xattrs={b"system.posix_acl_access": acl}),
        },
    )
    where = native.mount(native.node.install(root, [pack]))
    # A user enters by a descriptor: the folders above are root's.
    script = """
import os, sys
os.chdir(sys.argv[1]); os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
def can(name):
    try:
        return open(name).read()
    except PermissionError:
        return "no"
print(can("private"), can("public"), can("acl"), os.listxattr("public"))
"""
    for uid, seen in ((4242, "no x x"), (4343, "no x no")):
        done = subprocess.run(
            [sys.executable, "-c", script, where, str(uid)], check=True, capture_output=True, text=True
        )
        assert done.stdout == f"{seen} ['user.u']\n"
    assert sorted(os.listxattr(where / "public")) == ["trusted.t", "user.u"]


def test_devices_and_set_id_programs_work_in_layers_and_not_in_models(native, tmp_path):
    pack = TestPack("p")
    root = Node(DIR, children={b"zero": Node(stat.S_IFCHR | 0o666, rdev=os.makedev(1, 5))})
    root.children[b"file"] = file_node(pack, b"x", 0o4755)
    tree = native.node.install(root, [pack])
    where = native.mount(tree)
    with (where / "zero").open("rb", buffering=0) as file:
        assert file.read(3) == bytes(3)
    assert not os.statvfs(where).f_flag & os.ST_NOSUID
    (tmp_path / "m").mkdir()
    native.mounter.bind(tree.digest, tmp_path / "m", model=True)
    refused(errno.EACCES, (tmp_path / "m" / "zero").open)
    assert os.statvfs(tmp_path / "m").f_flag & os.ST_NOSUID
    native.mounter.unbind(tmp_path / "m")


def test_as_a_lower_directory_of_an_overlay(native, tmp_path):
    pack = TestPack("p")
    lower = Node(DIR, children={b"gone": file_node(pack, b"1"), b"dir": Node(DIR), b"kept": file_node(pack, b"k")})
    lower.children[b"dir"].children[b"hidden"] = file_node(pack, b"2")
    upper = Node(DIR, children={b"gone": Node(stat.S_IFCHR, rdev=0)})
    upper.children[b"dir"] = Node(DIR, xattrs={b"trusted.overlay.opaque": b"y"})
    upper.children[b"dir"].children[b"new"] = file_node(pack, b"3")
    trees = [native.mount(native.node.install(root, [pack])) for root in (upper, lower)]
    for name in ("up", "work", "merged"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={trees[0]}:{trees[1]},upperdir={tmp_path}/up,workdir={tmp_path}/work,index=off"
    merged = tmp_path / "merged"
    subprocess.run(["mount", "-t", "overlay", "none", merged, "-o", options], check=True)
    try:
        assert {str(path.relative_to(merged)) for path in merged.rglob("*")} == {"dir", "dir/new", "kept"}
        (merged / "kept").write_text("changed")
        (merged / "dir" / "hidden").touch()
        assert (trees[1] / "kept").read_text() == "k"
        assert (merged / "kept").read_text() == "changed"
    finally:
        subprocess.run(["umount", merged], check=True)


def test_a_directory_of_thirty_thousand(native):
    pack = TestPack("p")
    content = FileContent(4, 12, (pack.add(b"same"),))
    names = [b"file-%06d" % number for number in range(30_000)]
    root = Node(DIR, children={name: Node(stat.S_IFREG | 0o644, mtime=7, content=content) for name in names})
    where = native.mount(native.node.install(root, [pack]))
    assert sorted(os.listdir(os.fsencode(where))) == names  # noqa: PTH208 - bytes
    for number in (0, 4711, 29_999):
        assert (where / f"file-{number:06}").read_bytes() == b"same"
    assert not (where / "file-030000").exists()
    assert not (where / "a").exists()


def test_content_that_cannot_be_read_is_eio_and_never_zeros(native):
    tree = native.node.tree(size=4 * MIB)
    where = native.mount(tree)
    data = tree.packs[0].data
    os.truncate(data, MIB)
    with (where / "file0").open("rb", buffering=0) as file:
        refused(errno.EIO, lambda: os.pread(file.fileno(), 4096, 3 * MIB))
        assert os.pread(file.fileno(), 4096, 0) == random_file("tree", 0, 4 * MIB)[:4096]


def test_all_is_given_back(mounts, tmp_path):
    tree = mounts.node.tree(packs=2, complete=mounts.complete)
    where = mounts.mount(tree)
    (record,) = mounts.mounter.mounts()
    with (where / "file0").open("rb"), pytest.raises(BusyError, match="in use") as busy:
        mounts.mounter.release(tree.digest, "a")
    assert f"pid {os.getpid()}" in busy.value.hint
    assert (where / "file1").read_bytes() == random_file("tree", 1, MIB)
    mounts.mounter.release(tree.digest, "a")
    assert entry_at(where) is None
    assert not [file for file in attached_loops().values() if file.startswith(str(mounts.node.root))]
    assert not record.server or not is_alive(record.server)
    assert mounts.node.cache.pins(tree.packs[0].id) == set()
    assert not [m for m in read_mounts() if m.target.startswith(f"{mounts.node.run}/trees/")]
    assert mounts.mounter.sweep() == []


def test_a_killed_maker_leaves_what_a_sweep_takes(native):
    """A process that mounted and died: its mount serves on, until it is swept since nobody owns it."""
    tree = native.node.tree()
    script = """
import os, sys
from pathlib import Path
from floe.mount.mounter import TreeMounter
from floe.store.cache import NodeCache
from floe.store.trees import TreeStore
run, cache, digest, kind, loop = sys.argv[1:]
cache = NodeCache(Path(cache))
mounter = TreeMounter(Path(run), cache, kind=kind, loop=loop)
mounter.mount(TreeStore(None, cache).fetch_local(digest), "dead")
os.kill(os.getpid(), 9)
"""
    kind = KINDS[native.kind]
    argv = (native.node.run, native.node.cache.root, tree.digest, kind["kind"], kind.get("loop", "auto"))
    done = subprocess.run([sys.executable, "-c", script, *argv], check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == -9
    (record,) = native.mounter.mounts()
    where = native.mounter.target(tree.digest)
    assert (where / "file0").read_bytes() == random_file("tree", 0, MIB)
    native.mounter.state.remove_owner(tree.digest, "dead")
    assert len(native.mounter.sweep()) == 1
    assert not [file for file in attached_loops().values() if file.startswith(str(native.node.root))]
    assert not record.server or not is_alive(record.server)
    assert native.node.cache.pins(tree.packs[0].id) == set()


def test_reads_that_wait_can_be_waited_for_and_end(tmp_path):
    """With the packs held back, names and cached content stay readable; then all arrives."""
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        with mount_node(tmp_path / kind) as node:
            made = Mounts(node, kind, "packfs")
            tree = node.tree(packs=2, complete=False)
            where = made.mount(tree)
            first = (where / "file0").read_bytes()
            made.server.hold()
            with subprocess.Popen(["cat", where / "file1"], stdout=subprocess.PIPE) as cat:
                until(lambda made=made, tree=tree: made.server.client.inflight([tree.packs[1].id]))
                assert (where / "file1").stat().st_size == MIB
                assert (where / "file0").read_bytes() == first
                with pytest.raises(BusyError):
                    made.mounter.release(tree.digest, "a")
                made.server.go()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    assert cat.communicate(timeout=20)[0] == random_file("tree", 1, MIB)


def test_programs_get_the_capabilities_of_their_file(native):
    capability = b"\1\0\0\2" + (1 << 10).to_bytes(4, "little") + bytes(12)  # cap_net_bind_service=ep
    pack = TestPack("p")
    cat = Path("/bin/cat").resolve().read_bytes()
    root = Node(DIR, children={b"cat": file_node(pack, cat, 0o755, xattrs={b"security.capability": capability})})
    where = native.mount(native.node.install(root, [pack]))
    # By a relative path: the folders above are root's.
    done = subprocess.run(
        ["./cat", "/proc/self/status"],
        check=True,
        capture_output=True,
        text=True,
        cwd=where,
        user=4242,
        group=4242,
        extra_groups=[],
    )
    (effective,) = (line.split()[1] for line in done.stdout.splitlines() if line.startswith("CapEff:"))
    assert int(effective, 16) == 1 << 10
