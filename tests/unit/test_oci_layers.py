"""Every kind of tar entry to nodes, and archives that are none."""

import contextlib
import gzip
import io
import os
import stat
import struct
import tarfile
import tracemalloc
import zlib

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from floe.ingest.oci import compression, tarheader
from floe.ingest.oci.compression import decompress
from floe.ingest.oci.inherit import inherit
from floe.ingest.oci.layers import is_whiteout, read_layer
from floe.store.errors import DamagedError, FloeError, UnsupportedError
from floe.store.nodes import CHUNK, Chunk, FileContent, Node, chunk_bits, find, walk

ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *e)
    for e in [(1, 6, 2**32 - 1), (2, 5, 7), (4, 4, 2**32 - 1), (16, 7, 2**32 - 1), (32, 0, 2**32 - 1)]
)


class Sink:
    """Keeps contents by the digest slot of their only chunk."""

    def add_stream(self, readable, size):
        data = b"".join(iter(lambda: readable.read(1000), b""))
        assert len(data) == size
        return FileContent(size, chunk_bits(size), (Chunk(data, size),))


def content(node):
    if node.content is None:
        return b""
    grid = 1 << node.content.chunkbits
    size = node.content.size
    return b"".join(
        bytes(min(grid, size - i * grid)) if c is None else c.digest for i, c in enumerate(node.content.chunks)
    )


def read(raw, step=700):
    return read_layer(iter([raw[i : i + step] for i in range(0, len(raw), step)]), Sink(), "layer 1 of X")


def entry(name, data=b"", **fields):
    pax = fields.pop("pax", {})
    info = tarfile.TarInfo(name)
    for key, value in {"size": len(data), **fields}.items():
        setattr(info, key, value)
    info.pax_headers = pax
    return info, data


def tar(*entries, kind=tarfile.PAX_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for info, data in entries:
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def directory(name, **fields):
    return entry(name, type=tarfile.DIRTYPE, mode=fields.pop("mode", 0o755), **fields)


def symlink(name, target):
    return entry(name, type=tarfile.SYMTYPE, linkname=target)


def hard_link(name, target, **fields):
    return entry(name, type=tarfile.LNKTYPE, linkname=target, **fields)


def tree(*entries, **options):
    return read(tar(*entries, **options)).root


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_of_any_length_and_bytes(kind):
    long, raw, umlaut = "d" * 90 + "/" + "n" * 255, os.fsdecode(b"raw-\xff\xfe"), "käse"
    root = tree(entry(long, b"1"), entry(raw, b"2"), entry(umlaut, b"3"), symlink("s", "t" * 300), kind=kind)
    assert content(find(root, long.encode())) == b"1"
    assert content(find(root, b"raw-\xff\xfe")) == b"2"
    assert content(find(root, umlaut.encode())) == b"3"
    assert find(root, b"s").link == b"t" * 300


def test_ustar_prefix():
    root = tree(entry("p" * 100 + "/" + "f" * 90, b"x"), kind=tarfile.USTAR_FORMAT)
    assert content(find(root, b"p" * 100 + b"/" + b"f" * 90)) == b"x"


def test_modes_owners_and_times():
    big = 2**32 - 2
    root = tree(
        entry("f", b"x", mode=0o6755, uid=big, gid=70000, pax={"mtime": "-1.25"}),
        entry("g", mtime=5, pax={"mtime": "1700000000.123456789123"}),
        directory("d", mode=0o1777, mtime=9),
        entry("d/inside", mtime=10),
    )
    f, g, d = find(root, b"f"), find(root, b"g"), find(root, b"d")
    assert (f.mode, f.uid, f.gid) == (stat.S_IFREG | 0o6755, big, 70000)
    assert (f.mtime, f.mtime_ns) == (-2, 750_000_000)
    assert (g.mtime, g.mtime_ns) == (1_700_000_000, 123_456_789)
    assert (d.mode, d.mtime) == (stat.S_IFDIR | 0o1777, 9)


def test_base_256_numbers():
    root = tree(entry("f", uid=2**31, gid=2**21, mtime=-5), kind=tarfile.GNU_FORMAT)
    node = find(root, b"f")
    assert (node.uid, node.gid, node.mtime) == (2**31, 2**21, -5)


def test_devices_and_fifos():
    root = tree(
        entry("null", type=tarfile.CHRTYPE, mode=0o666, devmajor=1, devminor=3),
        entry("disk", type=tarfile.BLKTYPE, devmajor=259, devminor=70000),
        entry("fifo", type=tarfile.FIFOTYPE, mode=0o600),
    )
    null, disk, fifo = (find(root, name) for name in (b"null", b"disk", b"fifo"))
    assert (null.mode, null.rdev) == (stat.S_IFCHR | 0o666, os.makedev(1, 3))
    assert (stat.S_IFMT(disk.mode), disk.rdev) == (stat.S_IFBLK, os.makedev(259, 70000))
    assert fifo.mode == stat.S_IFIFO | 0o600


def test_xattrs_are_raw_bytes():
    value = os.fsdecode(bytes(range(256)))
    layer = read(
        tar(
            entry(
                "f",
                pax={
                    "SCHILY.xattr.security.capability": value,
                    "SCHILY.xattr.user.x=y".replace("=", "_"): "",
                    "SCHILY.xattr.system.odd": "1",
                },
            ),
            symlink("s", "f"),
        )
    )
    assert find(layer.root, b"f").xattrs == {b"security.capability": bytes(range(256)), b"user.x_y": b""}
    assert layer.warnings == [
        "entry 'f' of layer 1 of X: xattr 'system.odd' is left out: such a file cannot take it from a layer"
    ]


def test_acls_follow_the_mode():
    pax = {"SCHILY.xattr.system.posix_acl_access": os.fsdecode(ACL)}
    root = tree(entry("f", mode=0o640, pax=pax))
    value = find(root, b"f").xattrs[b"system.posix_acl_access"]
    assert [e[1] for e in struct.iter_unpack("<HHI", value[4:])] == [6, 5, 4, 4, 0]
    with pytest.raises(DamagedError, match="access ACL"):
        tree(entry("f", pax={"SCHILY.xattr.system.posix_acl_access": "junk"}))


def test_hard_links_share_a_node():
    root = tree(
        entry("a/f", b"x", mode=0o600),
        symlink("l", "a"),
        hard_link("b", "l/f", mode=0o640, uid=5),
        hard_link("c", "/b"),
    )
    assert find(root, b"a/f") is find(root, b"b") is find(root, b"c")
    assert find(root, b"b").uid == 0  # the last entry's


@pytest.mark.parametrize("target", ["missing", "f/x"])
def test_hard_links_to_nothing(target):
    with pytest.raises(UnsupportedError, match=f"'h' of layer 1 of X is a hard link to '{target}'"):
        tree(entry("f"), hard_link("h", target))


def test_hard_link_to_a_directory():
    with pytest.raises(DamagedError, match="hard link to a directory"):
        tree(directory("d"), hard_link("h", "d"))


def test_whiteouts_take_overlay_form():
    root = tree(
        directory("d"), entry("d/.wh.gone"), entry("o/.wh..wh..opq"), entry(".wh..wh.plnk/1.2"), entry(".wh..wh.aufs")
    )
    assert is_whiteout(find(root, b"d/gone"))
    assert stat.S_IMODE(find(root, b"d/gone").mode) == 0
    assert find(root, b"o").xattrs == {b"trusted.overlay.opaque": b"y"}
    assert {path for path, _ in walk(root)} == {b"", b"d", b"d/gone", b"o"}
    # Deleted and made anew: nothing of the old one may show.
    for again in ((entry(".wh.d"), directory("d")), (directory("d"), entry(".wh.d")), (entry(".wh.d"), entry("d/x"))):
        assert find(tree(*again), b"d").xattrs == {b"trusted.overlay.opaque": b"y"}
    assert find(tree(entry("f", b"1"), entry(".wh.f")), b"f").is_file
    for bad in (".wh.", ".wh..", ".wh..."):
        with pytest.raises(DamagedError, match="whiteout of no name"):
            tree(entry(bad))


def test_later_entries_replace_earlier_ones():
    root = tree(
        directory("d", mode=0o700, pax={"SCHILY.xattr.user.a": "1"}), entry("d/f", b"1"), directory("d/", mode=0o711, pax={"SCHILY.xattr.user.b": "2"}),
        entry("f", b"old"), entry("./f", b"new"), entry("x", b"x"), directory("x"), entry("x/y"), directory("z"), entry("z/y"), entry("z", b"file"),
    )  # fmt: skip
    assert content(find(root, b"d/f")) == b"1"
    assert find(root, b"d").xattrs == {b"user.a": b"1", b"user.b": b"2"}
    assert stat.S_IMODE(find(root, b"d").mode) == 0o711
    assert content(find(root, b"f")) == b"new"
    assert find(root, b"x/y").is_file
    assert content(find(root, b"z")) == b"file"


def test_entries_behind_symlinks_stay_inside():
    root = tree(
        symlink("up", "../../.."),
        symlink("abs", "/etc"),
        entry("up/a", b"1"),
        entry("abs/b", b"2"),
        symlink("loop", "loop"),
    )
    assert content(find(root, b"a")) == b"1"
    assert content(find(root, b"etc/b")) == b"2"
    with pytest.raises(DamagedError, match="too many symlinks"):
        tree(symlink("loop", "loop"), entry("loop/x"))
    with pytest.raises(DamagedError, match="no directory"):
        tree(entry("f"), entry("f/x"))


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a/..", "//x"])
def test_names_that_lead_out_are_refused(name):
    with pytest.raises(DamagedError, match=r"entry '.*' of layer 1 of X has"):
        tree(entry(name, b"x"))
    with pytest.raises((DamagedError, UnsupportedError), match="layer 1 of X"):
        tree(entry("a"), hard_link("h", "../a"))


def test_implicit_directories_take_attributes_from_below():
    lower = tree(
        directory(
            "tmp",
            mode=0o1777,
            uid=3,
            mtime=7,
            pax={"SCHILY.xattr.user.a": "1"},
        ),
        entry("f"),
    )
    find(lower, b"tmp").xattrs[b"trusted.overlay.opaque"] = b"y"
    upper = read(tar(entry("tmp/x"), entry("new/y"), entry("f/z"), entry("later/x"), directory("later", mode=0o700)))
    assert {path for path, _ in upper.implicit} == {b"tmp", b"new", b"f"}
    inherit(upper.implicit, [lambda: Node(stat.S_IFDIR), lambda: lower], "layer 2 of X")
    tmp = find(upper.root, b"tmp")
    assert (tmp.mode, tmp.uid, tmp.mtime, tmp.xattrs) == (stat.S_IFDIR | 0o1777, 3, 7, {b"user.a": b"1"})
    assert find(upper.root, b"new").mode == find(upper.root, b"f").mode == stat.S_IFDIR | 0o755


@pytest.mark.parametrize("link", ["usr/lib", "/usr/lib", "usr/../hop", "../../usr/lib"])
def test_directories_without_an_entry_take_after_what_a_lower_symlink_leads_to(link):
    """mkparent in containerd's archive/tar.go looks through symlinks, within one lower layer at a time."""
    lower = read(
        tar(
            directory("usr"),
            directory("usr/lib", mode=0o750, uid=5, pax={"SCHILY.xattr.user.a": "1"}),
            directory("usr/lib/sub", mode=0o711),
            symlink("hop", "usr/lib"),
            symlink("lib", link),
        )
    ).root
    upper = read(tar(entry("lib/sub/foo")))
    inherit(upper.implicit, [lambda: lower], "layer 2 of X")
    lib = find(upper.root, b"lib")
    assert (lib.mode, lib.uid, lib.xattrs) == (stat.S_IFDIR | 0o750, 5, {b"user.a": b"1"})
    assert find(upper.root, b"lib/sub").mode == stat.S_IFDIR | 0o711


def test_a_lower_symlink_is_not_followed_into_another_layer():
    bottom = tree(directory("usr/lib", mode=0o750), directory("lib", mode=0o700), directory("d", mode=0o711))
    top = tree(symlink("lib", "usr/lib"), symlink("d", "d"), entry("f"))
    upper = read(tar(entry("lib/x"), entry("d/x"), entry("f/sub/x")))
    inherit(upper.implicit, [lambda: top, lambda: bottom], "layer 2 of X")
    assert find(upper.root, b"lib").mode == stat.S_IFDIR | 0o700  # dangling in `top`: `bottom` is asked for lib itself
    assert find(upper.root, b"d").mode == stat.S_IFDIR | 0o711
    assert find(upper.root, b"f/sub").mode == stat.S_IFDIR | 0o755


def test_hard_links_to_hidden_names_of_aufs():
    root = tree(
        entry(".wh..wh.plnk/12.3", b"data", mode=0o600, uid=4),
        hard_link("a", ".wh..wh.plnk/12.3", mode=0o640, uid=4),
        hard_link("d/b", "./.wh..wh.plnk/12.3", mode=0o640, uid=4),
    )
    a = find(root, b"a")
    assert (content(a), a.mode, a.uid) == (b"data", stat.S_IFREG | 0o640, 4)
    assert find(root, b"d/b") is a
    assert {path for path, _ in walk(root)} == {b"", b"a", b"d", b"d/b"}
    with pytest.raises(UnsupportedError, match="hard link"):
        tree(hard_link("a", ".wh..wh.plnk/12.3"))


def sparse_10(name, size, places, data):
    text = "".join(f"{n}\n" for n in (len(places), *(v for place in places for v in place))).encode()
    text += bytes(-len(text) % 512)
    return entry(f"GNUSparseFile.0/{name}", text + data, pax={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name, "GNU.sparse.realsize": str(size)})  # fmt: skip


def sparse_01(name, size, places, data):
    flat = ",".join(str(v) for place in places for v in place)
    return entry("x", data, pax={"GNU.sparse.map": flat, "GNU.sparse.numblocks": str(len(places)), "GNU.sparse.name": name, "GNU.sparse.size": str(size)})  # fmt: skip


PLACES = [(3, 5), (CHUNK * 2 + 10, 4), (CHUNK * 3, 0)]


@pytest.mark.parametrize("make", [sparse_10, sparse_01])
def test_sparse_files(make):
    size = CHUNK * 3
    root = tree(make("small", 10, [(3, 5)], b"hello"), make("large", size, PLACES, b"helloabcd"), entry("after", b"z"))
    assert content(find(root, b"small")) == b"\0\0\0hello\0\0"
    large = content(find(root, b"large"))
    assert len(large) == size
    assert (large[3:8], large[CHUNK * 2 + 10 : CHUNK * 2 + 14]) == (b"hello", b"abcd")
    assert large.count(0) == size - 9
    assert find(root, b"large").content.chunks[1] is None
    assert content(find(root, b"after")) == b"z"


def test_a_header_of_an_old_go_is_refused_and_times_of_gnu_s_are_not():
    """GNU's magic, and where its times belong the first part of a long path: the file would come under another name."""
    header = bytearray(tarfile.TarInfo("file").tobuf(tarfile.GNU_FORMAT))

    def read_with(at, text):
        changed = bytearray(header)
        changed[at : at + len(text)] = text
        changed[148:156] = b" " * 8
        changed[148:156] = b"%06o\0 " % sum(changed[:512])
        return read(bytes(changed) + bytes(1024)).root

    with pytest.raises(UnsupportedError, match="old Go"):
        read_with(345, b"usr/lib/" + b"d" * 60)
    assert list(read_with(345, b"14000000000\0" + b"14000000001\0").children) == [b"file"]


def test_sparse_files_of_old_gnu_tar(tmp_path):
    with (tmp_path / "f").open("wb") as file:
        for number in range(60):
            file.seek(number * 100_000)
            file.write(b"%d" % number)
        file.truncate(7_000_000)
    for form in ("gnu", "pax", "posix --sparse-version=0.0", "posix --sparse-version=0.1"):
        os.system(f"tar --format={form} -S -cf {tmp_path}/t -C {tmp_path} f")
        raw = (tmp_path / "t").read_bytes()
        assert len(raw) < 1_000_000
        assert content(find(read(raw).root, b"f")) == (tmp_path / "f").read_bytes()


@pytest.mark.parametrize("bad", [[(3, 50)], [(5, 3), (3, 2)], [(3, 4)]])
def test_sparse_maps_that_lie(bad):
    with pytest.raises(DamagedError, match="sparse file"):
        tree(sparse_10("f", 10, bad, b"hello"))


def test_a_sparse_map_of_many_records_is_read_across_them():
    places = [(number * 7919, 1) for number in range(5000)]
    data = os.urandom(5000)
    found = content(find(tree(sparse_10("f", 5000 * 7919, places, data)), b"f"))
    assert bytes(found[at] for at, _ in places) == data
    assert found.count(0) == len(found) - 5000 + data.count(0)


@pytest.mark.parametrize("head", [b"1048577\n", b"", b"1" * 600 + b"\n", b"3\n" + b"9" * 600])
def test_a_sparse_map_without_end_is_refused_while_it_is_read(head):
    raw = entry("GNUSparseFile.0/f", head + b"1\n" * 4_000_000, pax={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "f", "GNU.sparse.realsize": "9"})  # fmt: skip
    archive = tar(raw)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedError, match="layer 1 of X"):
            read(archive, step=1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("make", [sparse_10, sparse_01])
def test_a_sparse_map_takes_little_memory(make, monkeypatch):
    places = [(0, 9), *((1000, 0) for _ in range(99_999))]
    archive = tar(make("f", 1000, places, b"x" * 9))
    tracemalloc.start()
    try:
        read(archive, step=1 << 20)
        # 16 bytes a place, and the pieces of the archive itself; a tuple of tuples took 150.
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    monkeypatch.setattr(tarheader, "PLACES_MAX", 99_999)
    with pytest.raises(DamagedError, match="99999"):
        read(archive)


def test_a_huge_sparse_file_costs_nothing():
    root = tree(sparse_10("f", 1 << 40, [(1 << 39, 5)], b"hello"))
    chunks = find(root, b"f").content.chunks
    assert len(chunks) == 1 << 18
    assert sum(chunk is not None for chunk in chunks) == 1
    with pytest.raises(UnsupportedError):
        tree(sparse_10("f", 1 << 60, [], b""))


def test_unknown_types_and_bad_values():
    with pytest.raises(UnsupportedError, match="unknown type b'Z'"):
        tree(entry("f", type=b"Z"))
    with pytest.raises(DamagedError, match="owner"):
        tree(entry("f", pax={"uid": str(2**32)}))
    with pytest.raises(UnsupportedError, match="device"):
        tree(entry("f", type=tarfile.CHRTYPE, devmajor=5000))
    with pytest.raises(DamagedError, match="symlink to nothing"):
        tree(symlink("s", ""))
    for pax in ({"mtime": "x"}, {"size": "-1"}, {"path": "a\0b"}):
        with pytest.raises(DamagedError):
            tree(entry("f", pax=pax))


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_truncation_is_found(pack):
    raw = tar(entry("f", os.urandom(5000)), entry("g", os.urandom(5000)))
    whole = pack(raw)
    for cut in (1, 700, 3000, 7000):
        short = whole[: len(whole) - cut] if pack is not bytes else raw[: 600 + cut]
        with pytest.raises(DamagedError, match=r"layer 1 of X is (cut short|truncated)"):
            read_layer(decompress([short], "layer 1 of X"), Sink(), "layer 1 of X")


@pytest.mark.parametrize("with_isal", [True, False])
def test_compression_in_members_and_frames(with_isal, monkeypatch):
    if not with_isal:  # where there is none for the processor
        monkeypatch.setattr(compression, "_inflater", zlib.decompressobj)
    raw = tar(entry("f", bytes(3_000_000)), entry("g", os.urandom(5000)))
    gz = gzip.compress(raw[:1000]) + gzip.compress(raw[1000:]) + bytes(300)
    zst = zstandard.compress(raw[:1000]) + b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + zstandard.compress(raw[1000:])
    for packed in (gz, zst, raw):
        for step in (1, 4096, len(packed)):
            pieces = [packed[i : i + step] for i in range(0, len(packed), step)]
            assert b"".join(decompress(pieces, "x")) == raw
    for bad in (gz + b"x", zst + b"x", gz[:-2000] + b"damage" + gz[-1994:]):
        with pytest.raises(DamagedError):
            b"".join(decompress([bad], "x"))


BASE = tar(
    directory("d", pax={"mtime": "1.5", "SCHILY.xattr.user.a": "b"}), entry("d/f", b"x" * 700), hard_link("h", "d/f"), symlink("s", "d"),
    entry("s/.wh.x"), sparse_10("p", 5000, [(0, 3), (4000, 2)], b"abcde"), entry("n" * 150, b"1"),
)  # fmt: skip
HEADERS = [at for at in range(0, len(BASE), 512) if BASE[at + 257 : at + 262] == b"ustar"]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(BASE) - 1), st.integers(0, 255)), max_size=6), st.integers(0, len(BASE)))
def test_no_bytes_break_the_reader(changes, cut):
    raw = bytearray(BASE)
    for at, value in changes:
        raw[at] = value
    for at in HEADERS:  # with checksums that fit, so that the fields behind them are reached
        raw[at + 148 : at + 156] = b" " * 8
        raw[at + 148 : at + 156] = b"%06o\0 " % sum(raw[at : at + 512])
    with contextlib.suppress(FloeError):
        read(bytes(raw[: len(raw) - cut // 2]))
    with contextlib.suppress(FloeError):
        b"".join(decompress([bytes(raw)], "x"))
