"""Little that claims to be much: refused before memory or time is spent on it."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import stat
import string
import struct
import tarfile

import pytest
import zstandard
from support.memory import at_most

from floe.ingest.erofs_writer import plan_image
from floe.ingest.oci import compression, layers, links
from floe.ingest.oci.dockerarchive import DockerArchiveSource
from floe.ingest.oci.inherit import inherit
from floe.ingest.oci.layout import blob_name
from floe.ingest.oci.media import OCI_INDEX
from floe.ingest.oci.references import DockerArchiveRef
from floe.store import treeobject
from floe.store.errors import DamagedError, TransitDamageError, UnsupportedError
from floe.store.frames import decode_frame
from floe.store.ids import digest, hexdigest
from floe.store.jsontext import BYTES_MAX
from floe.store.nodes import FileContent, Node
from floe.store.objects.file import FileStore
from floe.store.objects.keys import WHOLE_MAX
from floe.store.packindex import MAX_FRAMES, FrameEntry, PackIndex
from floe.store.profile import FRAMES_MAX, Profile
from floe.store.records import Manifest
from floe.store.treeobject import MAX_IMAGE, decode_tree, encode_tree

MIB = 1 << 20
HEX = "ab" * 32


def zeros(size: int) -> bytes:
    """One zstd frame of so many zeros, which it says."""
    packer = zstandard.ZstdCompressor().compressobj(size=size)
    piece = bytes(MIB)
    return b"".join([*(packer.compress(piece[: min(MIB, size - at)]) for at in range(0, size, MIB)), packer.flush()])


@pytest.mark.parametrize("size", [65 * MIB, 200 * MIB, MAX_IMAGE + 1, 1 << 60])
def test_a_tree_that_unpacks_to_absurdly_much(size):
    body = zeros(size) if size <= 200 * MIB else zeros(MIB)
    tree = struct.pack("<8sHHB3xQ32s8x", b"FLOETREE", 1, 0, 1, size, bytes(32)) + body
    assert len(tree) < 64 << 10
    with at_most(MIB), pytest.raises(DamagedError, match="claims to hold"):
        decode_tree(tree, HEX)


def test_a_tree_whose_frame_says_more_than_its_header():
    tree = struct.pack("<8sHHB3xQ32s8x", b"FLOETREE", 1, 0, 1, 4096, bytes(32)) + zeros(100 * MIB)
    with at_most(MIB), pytest.raises(DamagedError):
        decode_tree(tree, HEX)


def test_what_the_writer_makes_is_never_taken_for_a_bomb(monkeypatch):
    monkeypatch.setattr(treeobject, "_FREE", MIB)
    image = bytes(8 * MIB)
    stored = encode_tree(image)
    assert len(stored) > len(image)  # as it is
    assert decode_tree(stored, hexdigest(image)) == image


@pytest.mark.parametrize("size", [5 * MIB, 0xFFFFFFFF])
def test_a_profile(size):
    header = struct.pack("<8sHHIIIII32s", b"FLOEPROF", 1, 0, size, 1, 0, 0, 0, bytes(32))
    body = zeros(5 * MIB)
    with at_most(MIB), pytest.raises(DamagedError):
        Profile.decode(header + body, "key")
    many = struct.pack("<8sHHIIIII32s", b"FLOEPROF", 1, 0, 4 * MIB, 1, FRAMES_MAX + 1, 0, 0, bytes(32))
    with at_most(MIB), pytest.raises(DamagedError):
        Profile.decode(many + body, "key")


def test_a_frame():
    stored = zeros(200 * MIB)
    with at_most(MIB), pytest.raises(TransitDamageError):
        decode_frame(stored, FrameEntry(len(stored), 1, bytes(32)), MIB)


def test_a_manifest():
    text = b'{"format":"floe.manifest","version":1,"labels":{"a":"' + b"x" * BYTES_MAX + b'"}}'
    with at_most(MIB), pytest.raises(DamagedError):
        Manifest.decode(text, "key")


def test_a_pack_index_of_frames_as_small_as_can_be():
    frames = MAX_FRAMES + 1
    data = struct.pack(
        "<8sHHIIIQQ32s32s24x", b"FLOEPIDX", 1, 0, 4096, frames, 0, frames * 4096, frames, bytes(32), bytes(32)
    )
    data += struct.pack("<IB3x32s", 1, 1, digest(b"")) * frames
    with at_most(MIB), pytest.raises(DamagedError, match="do not fit"):
        PackIndex.decode(data, hexdigest(data))


def test_a_frame_of_which_more_is_stored_than_it_holds():
    for stored, codec in ((0xFFFFFFFF, 1), (4097, 0), (4095, 0), (0, 1)):
        data = PackIndex(4096, 4096, (FrameEntry(stored, codec, digest(b"")),)).encode()
        with pytest.raises(DamagedError, match="do not fit"):
            PackIndex.decode(data, hexdigest(data))


def test_an_object_that_is_too_large_to_be_read_whole(tmp_path):
    store = FileStore(tmp_path)
    store.put("trees/ab/" + HEX, b"x")
    with (tmp_path / "trees/ab" / HEX).open("r+b") as file:
        file.truncate(WHOLE_MAX + 1)
    for read in (store.get, store.get_versioned):
        with at_most(MIB), pytest.raises(DamagedError, match="read whole"):
            read("trees/ab/" + HEX)
    assert store.get("trees/ab/" + HEX, 0, 1) == b"x"
    assert WHOLE_MAX >= MAX_IMAGE + treeobject.HEADER_BYTES


# --- layers


class Sink:
    """Takes contents and keeps nothing."""

    def add_stream(self, readable, size):
        left = size
        while left:
            left -= len(readable.read(min(left, MIB)))
        return FileContent(size, layers.chunk_bits(size), (None,) * -(-size >> layers.chunk_bits(size)))


def headers(count: int, **fields: object):
    """A tar of so many files or others that hold nothing, in pieces."""
    for number in range(count):
        entry = tarfile.TarInfo(f"f{number}")
        for name, value in fields.items():
            setattr(entry, name, value)
        yield entry.tobuf(tarfile.PAX_FORMAT)


def read(pieces):
    return layers.read_layer(iter(pieces), Sink(), "the layer")


def test_a_layer_of_headers_alone(monkeypatch):
    monkeypatch.setattr(layers, "INODES_MAX", 2000)
    read(headers(2000))
    blob = gzip.compress(b"".join(headers(10_000)))
    assert len(blob) < MIB
    taken = []
    pieces = (taken.append(at) or blob[at : at + 4096] for at in range(0, len(blob), 4096))
    with at_most(16 * MIB), pytest.raises(UnsupportedError, match="more than 2000 entries"):
        read(compression.decompress(pieces, "the blob"))
    assert len(taken) * 4096 < len(blob) / 3  # the rest is not even unpacked


def test_names_that_stand_for_many_directories(monkeypatch):
    monkeypatch.setattr(layers, "INODES_MAX", 10_000)
    deep = "/".join(["a"] * 2000)
    with at_most(32 * MIB), pytest.raises(UnsupportedError, match="entries"):
        read(entry for number in range(20) for entry in headers(1, name=f"{number}/{deep}"))
    with pytest.raises(UnsupportedError, match="a name of"):
        read(headers(1, name="a/" * 4000 + "b"))


def test_names_that_each_stand_for_megabytes_of_names(monkeypatch):
    monkeypatch.setattr(layers, "METADATA_MAX", 8 * MIB)
    deep = "/".join(["a"] * 2000)
    with at_most(32 * MIB), pytest.raises(UnsupportedError, match="8 MiB of names"):
        read(entry for number in range(4) for entry in headers(1, name=f"{number}/{deep}"))


def through(links: int, target: str, *names: str, **fields: object):
    """A tar of symlinks to `target` inside of each other, and files with these `names`."""
    for number in range(1, links + 1):
        yield from headers(1, name="/".join(["l"] * number), type=tarfile.SYMTYPE, linkname=target)
    for name in names:
        yield from headers(1, name=name, **fields)


def test_symlinks_that_lead_deeper_than_any_name():
    with at_most(32 * MIB), pytest.raises(UnsupportedError, match="a directory with a name of"):
        read(through(3, "/".join(["a"] * 2046), "l/l/l/x"))


FAR = "/".join(["..", "a"] * 800)  # from `a` to `a`


@pytest.mark.parametrize("fields", [{}, {"type": tarfile.LNKTYPE, "linkname": "a/" + "l/" * 30 + "x"}])
def test_names_that_lead_through_endless_symlinks(monkeypatch, fields):
    monkeypatch.setattr(links, "STEPS_MAX", 1 << 17)
    names = [f"f{n}" if fields else "a/" + "l/" * 30 + f"{n}/x" for n in range(4)]
    files = itertools.chain.from_iterable(headers(1, name=name, **fields) for name in names)
    linked = headers(1, name="a/l", type=tarfile.SYMTYPE, linkname=FAR)
    taken = []
    entries = (taken.append(at) or entry for at, entry in enumerate([*headers(1, name="a/x"), *linked, *files]))
    with at_most(32 * MIB), pytest.raises(UnsupportedError, match="symlinks of more than 131072 parts"):
        read(entries)
    assert len(taken) == 5  # the third name: each takes 48,000 steps


def test_directories_that_lower_layers_have_behind_endless_symlinks(monkeypatch):
    lower = read([*headers(1, name="a/x"), *headers(1, name="a/l", type=tarfile.SYMTYPE, linkname=FAR)]).root
    upper = read(headers(1, name="a/" + "l/" * 30 + "x")).implicit
    monkeypatch.setattr(links, "STEPS_MAX", 1 << 17)
    with at_most(32 * MIB), pytest.raises(UnsupportedError, match="the layer has names that lead through symlinks"):
        inherit(upper, [lambda: lower], "the layer")


def test_an_honest_layer_behind_symlinks_is_far_from_the_bounds(monkeypatch):
    """Files behind a symlink and elsewhere by turns, so that it is followed for each: as 250,000 under the real bounds."""
    monkeypatch.setattr(links, "STEPS_MAX", links.STEPS_MAX // 100)
    monkeypatch.setattr(layers, "METADATA_MAX", layers.METADATA_MAX // 100)
    pieces = [*headers(1, name="lib64", type=tarfile.SYMTYPE, linkname="usr/lib64")]
    for number in range(2500):
        pieces += [*headers(1, name=f"lib64/package-{number}/module.so"), *headers(1, name=f"opt/{number}/x")]
    assert len(read(pieces).implicit) == 5003


def test_attributes_without_end(monkeypatch):
    monkeypatch.setattr(layers, "METADATA_MAX", 8 * MIB)
    attributes = {f"SCHILY.xattr.user.{number}": "x" * 60_000 for number in range(10)}
    with at_most(32 * MIB), pytest.raises(UnsupportedError, match="8 MiB"):
        read(headers(1000, pax_headers=attributes))


def attributes(count: int, **fields: object):
    """A tar of one file or other that has so many attributes of four letters, without values."""
    letters = itertools.islice(itertools.product(string.ascii_lowercase, repeat=4), count)
    names = {f"SCHILY.xattr.user.{''.join(name)}": "" for name in letters}
    return [*headers(1, pax_headers=names, **fields)]


def test_attributes_that_are_nothing_but_many(monkeypatch):
    monkeypatch.setattr(layers, "METADATA_MAX", 8 * MIB)
    pieces = attributes(100_000)
    with at_most(32 * MIB), pytest.raises(UnsupportedError, match="8 MiB of names and attributes"):
        read(pieces)


def test_attributes_that_an_inode_has_no_room_for():
    tree = read(attributes(40_000, name="n" * 200)).root
    with at_most(8 * MIB):
        warnings = plan_image(tree, {}).warnings
    (warning,) = warnings
    assert "7234 of its extended attributes left out: all of them together" in warning


def test_attributes_of_an_honest_layer_count_as_what_they_are(monkeypatch):
    label = {"SCHILY.xattr.security.selinux": "system_u:object_r:lib_t:s0", "SCHILY.xattr.user.a": "1"}
    counted = sum(len(f"f{n}") + len("security.selinuxuser.a1") + 26 for n in range(1000))
    monkeypatch.setattr(layers, "METADATA_MAX", counted)
    read(headers(1000, pax_headers=label))


def test_attributes_of_one_directory_under_many_names(monkeypatch):
    lower = read(attributes(20_000, name="d", type=tarfile.DIRTYPE)).root
    lower.children.update((b"%d" % number, Node(stat.S_IFLNK | 0o777, link=b"d")) for number in range(100))
    upper = read(entry for number in range(100) for entry in headers(1, name=f"{number}/x")).implicit
    monkeypatch.setattr(layers, "METADATA_MAX", 8 * MIB)
    with at_most(32 * MIB), pytest.raises(UnsupportedError, match="the layer takes more than 8 MiB of attributes"):
        inherit(upper, [lambda: lower], "the layer")


def test_holes_without_end(monkeypatch):
    monkeypatch.setattr(layers, "CONTENT_MAX", 1 << 36)
    sparse = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 35), "GNU.sparse.numblocks": "1"}
    with at_most(8 * MIB), pytest.raises(UnsupportedError, match="holds files of"):
        read(headers(1000, pax_headers=sparse))


def test_a_header_that_claims_a_long_header():
    entry = tarfile.TarInfo("x")
    entry.type, entry.size = tarfile.XHDTYPE, 1 << 33
    with at_most(MIB), pytest.raises(DamagedError, match="extended header"):
        read([entry.tobuf(tarfile.USTAR_FORMAT)] if entry.size < 8**11 else [entry.tobuf(tarfile.GNU_FORMAT)])


def test_indexes_that_list_each_other_many_times_over(tmp_path):
    """Four indexes, each a list of 10,000 times the next: ten to the sixteenth manifests, for who reads them all."""
    blobs, listed = {}, b'{"manifests":[]}'
    for _ in range(4):
        found = "sha256:" + hashlib.sha256(listed).hexdigest()
        blobs[blob_name(found)] = listed
        entry = {"mediaType": OCI_INDEX, "digest": found, "size": len(listed)}
        listed = json.dumps({"mediaType": OCI_INDEX, "manifests": [entry] * 10_000}).encode()
    config = {"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": []}}
    files = {
        "index.json": listed,
        "manifest.json": json.dumps([{"Config": "c", "Layers": [], "RepoTags": ["a:1"]}]).encode(),
        "c": json.dumps(config).encode(),
        **blobs,
    }
    path = tmp_path / "saved.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with contextlib.closing(DockerArchiveSource(DockerArchiveRef(str(path)))) as source:
        assert source.manifest()
