"""An indexed layer, mounted by the kernel, shows what containerd's overlayfs snapshotter unpacks from it."""

import contextlib
import io
import os
import stat
import struct
import tarfile

import pytest
from support import images
from support.containerd import Containerd, each_version
from support.erofs_mount import fsck, mounted
from support.trees import disk_facts

from floe.ingest.oci.image import index_image
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.frames import decode_frame
from floe.store.index import open_index
from floe.store.objects import open_store
from floe.store.packindex import PackIndex
from floe.store.treeobject import decode_tree

NAME = "floe.test/nasty:1"
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)  # cap_net_bind_service+ep
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, perm, who)
    for tag, perm, who in [(1, 6, 2**32 - 1), (2, 5, 7), (4, 4, 2**32 - 1), (16, 7, 2**32 - 1), (32, 0, 2**32 - 1)]
)
IMPLICIT = {b"tmp", b"home/user", b"home", b"brand", b"brand/new"}


def base(tar):
    images.add(tar, "tmp", mode=0o1777, kind=tarfile.DIRTYPE)
    images.add(tar, "tmp/old", b"old")
    images.add(tar, "home", mode=0o755, kind=tarfile.DIRTYPE)
    images.add(tar, "home/user", mode=0o750, uid=1000, gid=1000, kind=tarfile.DIRTYPE, xattrs={"user.a": "b"})
    images.add(tar, "etc", mode=0o755, kind=tarfile.DIRTYPE)
    images.add(tar, "etc/gone", b"x")


def nasty(tar):
    def put(name, data=b"", **fields):
        info = tarfile.TarInfo(name)
        info.size, info.mtime = len(data), images.MTIME
        for key, value in fields.items():
            setattr(info, key, value)
        tar.addfile(info, io.BytesIO(data))

    def text(value):
        return os.fsdecode(value)

    put("./", type=tarfile.DIRTYPE, mode=0o700)
    put("tmp/new", b"new")
    put("home/user/file", b"f", uid=1000, gid=1000)
    put("brand/new/file", b"f")
    put("etc", type=tarfile.DIRTYPE, mode=0o755, pax_headers={"mtime": "1600000000.987654321"})
    put("etc/.wh.gone", uid=0)
    put("opaque", type=tarfile.DIRTYPE, mode=0o755)
    put("opaque/.wh..wh..opq")
    put("opaque/new", b"n")
    put("empty", mode=0o600)
    put("big", bytes(range(256)) * 40_000, mode=0o6755, uid=4_000_000_000, gid=70_000)
    put("holes", bytes(9_000_000) + b"end")
    put("a-link", type=tarfile.LNKTYPE, linkname="big", mode=0o6755, uid=4_000_000_000, gid=70_000)
    put("symlink", type=tarfile.SYMTYPE, linkname="../nowhere/" + "x" * 200, uid=5)
    put("symlink-too", type=tarfile.LNKTYPE, linkname="symlink", uid=5)
    put("null", type=tarfile.CHRTYPE, mode=0o666, devmajor=1, devminor=3)
    put("disk", type=tarfile.BLKTYPE, mode=0o660, devmajor=259, devminor=300)
    put("fifo", type=tarfile.FIFOTYPE, mode=0o622)
    put("d/" * 60 + "n" * 255, b"deep")
    put(text(b"raw-\xff\xfe\x01"), b"raw")
    put("käse-日本", b"utf")
    put("capable", b"#!", mode=0o755, pax_headers={"SCHILY.xattr.security.capability": text(CAPABILITY)})
    put("attrs", b"x", mode=0o644, pax_headers={"SCHILY.xattr.user.bytes": text(bytes(range(256))), "SCHILY.xattr.trusted.t": "1", "SCHILY.xattr.user.empty": ""})  # fmt: skip
    put("acl", b"x", mode=0o640, pax_headers={"SCHILY.xattr.system.posix_acl_access": text(ACL)})
    put("aclplain", type=tarfile.DIRTYPE, mode=0o750, pax_headers={"SCHILY.xattr.system.posix_acl_default": text(ACL)})
    put("twice", b"first", mode=0o600)
    put("twice", b"second", mode=0o644, pax_headers={"mtime": "1700000000.000000001"})
    put("was-dir/x", b"x")
    put("was-dir", b"file")
    put("via", type=tarfile.SYMTYPE, linkname="/opaque")
    put("via/through", b"t")
    put("lost-cap", type=tarfile.LNKTYPE, linkname="capable", mode=0o755)


@pytest.fixture
def catalog(tmp_path):
    with contextlib.closing(Catalog(open_store(f"file://{tmp_path}/store"), open_index(None))) as made:
        yield made


@contextlib.contextmanager
def mounted_layer(catalog, manifest, tmp_path):
    """The layer's tree, on packs written out whole."""
    devices = []
    for pack in manifest.packs:
        index = PackIndex.decode(catalog.store.get(layout.pack_index_key(pack.id)), pack.id)
        stored = memoryview(catalog.store.get(layout.pack_key(pack.id)))
        path = tmp_path / pack.id
        with path.open("wb") as file:
            for number, frame in enumerate(index.frames):
                at = index.stored_offsets[number]
                file.write(decode_frame(stored[at : at + frame.stored], frame, index.content_length(number)).content)
        devices.append(path)
    image = tmp_path / "tree.erofs"
    image.write_bytes(decode_tree(catalog.store.get(layout.tree_key(manifest.tree.digest)), manifest.tree.digest))
    with mounted(image, devices, tmp_path / "mnt") as target:
        yield target


def comparable(facts):
    """Without what unpacking cannot keep: times of what was made on the way, and the root's."""
    kept = {}
    for path, fact in facts.items():
        times = path not in IMPLICIT and not (stat.S_ISCHR(fact[0]) and fact[5] == 0)
        times = times and not path.startswith(b"d/") and path != b"d"
        if path:
            kept[path] = (*fact[:3], fact[3] if times or stat.S_ISREG(fact[0]) else 0, *fact[4:])
    return kept


@each_version()
def test_a_nasty_layer_equals_containerds(version, catalog, tmp_path):
    built = images.build_oci(tmp_path / "image", [base, nasty], tag=NAME)
    result = index_image(catalog, built.source, spool_dir=tmp_path)
    assert len(result.warnings) == 1
    assert "xattr 'trusted.t' is left out" in result.warnings[0]
    containerd = Containerd(version, tmp_path)
    try:
        containerd.import_image(images.oci_archive(built.directory, tmp_path / "image.tar"))
        unpacked = containerd.root / "io.containerd.snapshotter.v1.overlayfs" / "snapshots" / "2" / "fs"
        expected = comparable(disk_facts(unpacked))
    finally:
        containerd.stop()
    digest = result.layers[1].manifest
    with mounted_layer(catalog, catalog.get_manifest(digest), tmp_path) as target:
        found = comparable(disk_facts(target))
    assert sorted(found) == sorted(expected)
    assert {path: (found[path], expected[path]) for path in found if found[path] != expected[path]} == {}
    assert os.makedev(0, 0) == expected[b"etc/gone"][5]


def test_times_before_1970_survive(catalog, tmp_path):
    """Where containerd would clamp them to 1970."""

    def old(tar):
        info = tarfile.TarInfo("old")
        info.pax_headers = {"mtime": "-1000000000.25"}
        tar.addfile(info)

    built = images.build_oci(tmp_path / "image", [old])
    result = index_image(catalog, built.source, spool_dir=tmp_path)
    with mounted_layer(catalog, catalog.get_manifest(result.layers[0].manifest), tmp_path) as target:
        assert (target / "old").stat().st_mtime_ns == -1_000_000_000_250_000_000


def test_fsck_finds_no_fault(catalog, tmp_path):
    built = images.build_oci(tmp_path / "image", [nasty])
    result = index_image(catalog, built.source, spool_dir=tmp_path)
    manifest = catalog.get_manifest(result.layers[0].manifest)
    with mounted_layer(catalog, manifest, tmp_path):
        pass
    fsck(tmp_path / "tree.erofs", [tmp_path / pack.id for pack in manifest.packs])
