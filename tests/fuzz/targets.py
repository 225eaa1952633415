"""What is fuzzed: a parser each, with the property that any bytes must have, and seeds to begin with.

A target takes bytes and returns, or raises a FloeError, which it swallows; anything else is a finding. What was parsed keeps
the invariants that the rest of Floe relies on, and what can be written again reads back the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import stat
import struct
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import zstandard
from fuzz import fuserequests
from support import bento
from support.odd_tree import odd_tree
from support.trees import TestPack

from floe.cli import settings
from floe.fuse.control import ControlServer
from floe.ingest.bento import hub
from floe.ingest.bento.info import parse_bento, parse_model
from floe.ingest.entries import Node, walk
from floe.ingest.erofs_writer import build_image
from floe.ingest.oci import compression, hosts, layers, media, tarheader
from floe.ingest.oci.dockerarchive import DockerArchiveSource
from floe.ingest.oci.references import DockerArchiveRef, parse_image_ref
from floe.ingest.oci.source import resolve
from floe.protos import packfs_control
from floe.snapshotter import filters
from floe.snapshotter.modelsahead import models_in
from floe.store import erofs, layout, records, stub
from floe.store.erofs_check import check_image
from floe.store.erofs_inodes import Inodes
from floe.store.erofs_reader import read_image
from floe.store.errors import FloeError
from floe.store.frames import FrameTable
from floe.store.hotlayout import LayoutRecord
from floe.store.ids import ModelRef, digest, hexdigest, is_hexdigest, is_oci_digest
from floe.store.index.redis import chunkmap, keys
from floe.store.index.redis.address import RedisAddress
from floe.store.nodes import CHUNK, FileContent
from floe.store.packindex import (
    BLOCK,
    CODEC_RAW,
    MAX_CONTENT,
    MAX_FRAME,
    ChunkEntry,
    FrameEntry,
    PackIndex,
    decode_chunk_table,
    encode_chunk_table,
)
from floe.store.profile import Profile, Touch, merge
from floe.store.treeobject import decode_tree, encode_tree

HEX, OCI = "ab" * 32, "sha256:" + "cd" * 32
WHEN = "2026-01-01T00:00:00Z"


@dataclasses.dataclass(frozen=True)
class Target:
    """`check` gets inputs of at most `limit` bytes."""

    check: Callable[[bytes], object]
    seeds: Callable[[], Iterable[bytes]]
    limit: int = 1 << 16

    def run(self, data: bytes) -> None:
        """One input; raises for a finding."""
        with contextlib.suppress(FloeError):
            self.check(data[: self.limit])


# --- trees


def _with_checksum(data: bytes) -> bytes:
    """An image whose superblock's checksum is right, so that what lies behind it is reached."""
    image = bytearray(data)
    if len(image) >= BLOCK:
        at = erofs.SUPERBLOCK_OFFSET + 4
        image[at : at + 4] = erofs.superblock_checksum(image).to_bytes(4, "little")
    return bytes(image)


def tree(data: bytes) -> None:
    """What a node checks before the kernel sees it; whatever passes can be read in every other way, and rewritten."""
    image = _with_checksum(data)
    inodes = None
    with contextlib.suppress(FloeError):
        inodes = Inodes(image)
        _look_up(inodes, inodes.inode(inodes.superblock.root_nid), 40)
    try:
        check_image(image)
    except FloeError:
        with contextlib.suppress(FloeError):
            read_image(image)  # must not go astray either
        return
    root = read_image(image)
    assert inodes is not None
    packs = dict(inodes.packs)
    for _, node in walk(root):
        assert b"" not in node.children
        for name in node.children:
            assert name not in (b".", b"..")
            assert b"/" not in name
        for chunk in node.content.chunks if node.content else ():
            assert chunk is None or chunk.block + -(-chunk.length // BLOCK) <= packs[chunk.pack_id]
    check_image(build_image(root, packs))


def _look_up(inodes: Inodes, directory: Any, left: int) -> int:
    for entry in inodes.entries(directory):
        left -= 1
        if left <= 0:
            break
        inodes.lookup(directory, entry.name)
        inode = inodes.inode(entry.nid)
        inodes.xattrs(inode)
        if stat.S_ISREG(inode.mode):
            for piece in inodes.extents(inode, 0, 64 << 20):
                assert piece.length > 0
        elif stat.S_ISLNK(inode.mode):
            inodes.link(inode)
        elif stat.S_ISDIR(inode.mode) and entry.name not in (b".", b".."):
            left = _look_up(inodes, inode, left)
    return left


def small_tree() -> tuple[Node, dict[str, int]]:
    """A tree with a bit of everything, in few kilobytes."""
    full, small = TestPack("full"), TestPack("small")
    root = odd_tree(full, small)
    for name in (b"vast", b"many3000", b"many300", b"large attributes", b"subdirs", b"d" * 60):
        del root.children[name]
    return root, {pack.id: pack.blocks for pack in (full, small)}


def _tree_seeds() -> Iterable[bytes]:
    root, packs = small_tree()
    yield build_image(root, packs)
    yield build_image(Node(stat.S_IFDIR | 0o755), {})
    keep = (b"big", b"hard1", b"hard2", b"link", b"acl", b"many1", b"sub")
    few = {name: root.children[name] for name in keep}
    del root.children[b"sub"].children[b"hard3"]
    yield build_image(Node(stat.S_IFDIR | 0o755, children=few), packs)


def tree_object(data: bytes) -> None:
    """The envelope: with the digest of what is inside, where that can be had, and with another."""
    if data[12:13] == b"\0":
        image = decode_tree(data, hexdigest(data[64:]))
        assert decode_tree(encode_tree(image), hexdigest(image)) == image
    elif len(data) > 64:
        with contextlib.suppress(zstandard.ZstdError):
            image = zstandard.ZstdDecompressor().decompressobj().decompress(data[64:])[: 1 << 20]
            assert decode_tree(data, hexdigest(image)) == image
    with contextlib.suppress(FloeError):
        decode_tree(data, HEX)


def _tree_object_seeds() -> Iterable[bytes]:
    yield encode_tree(b"x" * 9000)
    yield encode_tree(bytes(range(64)))


# --- packs


def pack_index(data: bytes) -> None:
    """A pack index by its own id, as one who writes the bucket could make it."""
    index = PackIndex.decode(data, hexdigest(data))
    assert 0 < index.content_size <= MAX_CONTENT
    assert BLOCK <= index.frame_size <= MAX_FRAME
    table = FrameTable(index)
    total = 0
    for number, frame in enumerate(index.frames):
        length = index.content_length(number)
        assert 0 < length <= index.frame_size
        assert 0 < frame.stored <= length
        assert frame.codec != CODEC_RAW or frame.stored == length
        assert table.entry(number) == frame
        total += length
    assert total == index.content_size
    assert index.encode()[:16] == data[:16]
    assert PackIndex.decode(index.encode(), index.pack_id) == index


def _pack_index_seeds() -> Iterable[bytes]:
    yield PackIndex(4096, 4096, (FrameEntry(4096, 0, digest(b"a")),)).encode()
    yield PackIndex(8192, 12288, (FrameEntry(8192, 0, digest(b"a")), FrameEntry(17, 1, digest(b"b")))).encode()
    yield PackIndex(1 << 20, 3 << 20, tuple(FrameEntry(5, 1, digest(b"%d" % n)) for n in range(3))).encode()


def chunk_table(data: bytes) -> None:
    """A chunk table of a pack of 64 blocks."""
    index = PackIndex(1 << 18, 64 * BLOCK, (FrameEntry(9, 1, digest(b"a")),), digest(data))
    table = decode_chunk_table(data, index, HEX)
    for chunk in table:
        assert 0 < chunk.length <= CHUNK
        assert chunk.block * BLOCK + chunk.length <= index.content_size
    assert encode_chunk_table(table)[8:16] == data[8:16]


def _chunk_table_seeds() -> Iterable[bytes]:
    yield encode_chunk_table([])
    yield encode_chunk_table([ChunkEntry(digest(b"a"), 4096, 0), ChunkEntry(digest(b"b"), 5, 63)])


# --- JSON

_KINDS = (
    records.Manifest, records.StoreRecord, records.Ref, records.ChainRecord, records.ImageRecord,
    records.AttachmentRecord, LayoutRecord,
)  # fmt: skip


def record(data: bytes) -> None:
    """The store's JSON objects: the first byte says which kind is expected."""
    kind = _KINDS[data[0] % len(_KINDS)] if data else records.Ref
    found = kind.decode(data[1:], "key")
    assert kind.decode(found.encode(), "key") == found
    if isinstance(found, records.Manifest):
        assert is_hexdigest(found.tree.digest)
        assert all(is_hexdigest(pack.id) for pack in found.packs)
    elif isinstance(found, records.ImageRecord):
        assert all(map(is_oci_digest, (*found.diff_ids, *found.chain_ids)))


def _record_seeds() -> Iterable[bytes]:
    pack = records.PackEntry(HEX, 4096, 100, 1 << 20)
    found = (
        records.Manifest(
            "model", records.TreeEntry(HEX, 5), (pack,), records.Sizes(1, 2, 3), "dir", WHEN, {"k": "\N{SNOWMAN}"}
        ),
        records.StoreRecord("uuid", WHEN),
        records.Ref(HEX, WHEN),
        records.ChainRecord(OCI, OCI),
        records.ImageRecord(OCI, ("b", "a"), "linux/amd64", (OCI,), (OCI,), 9, WHEN),
        records.AttachmentRecord(OCI, "source", ({"name": "m", "path": "/m"},), WHEN),
        LayoutRecord("models/a", (HEX,)),
    )
    for number, each in enumerate(found):
        yield bytes([number]) + each.encode()


def oci_json(data: bytes) -> None:
    """OCI manifests, indexes and configurations, and the marker of a stub."""
    text = data[1:]
    way = data[0] % 4 if data else 0
    if way == 0:
        found = media.parse_manifest(text, media.OCI_MANIFEST, "m")
        blobs = found.manifests if isinstance(found, media.ImageIndex) else (found.config, *found.layers)
        assert all(is_oci_digest(blob.digest) and blob.size >= 0 for blob in blobs)
        if isinstance(found, media.ImageManifest):
            media.check_image(found, "m")
    elif way == 1:
        config = media.parse_config(text, "c")
        assert all(map(is_oci_digest, config.diff_ids))
    elif way == 2:
        marker = stub.Marker.decode(text, "m")
        assert stub.Marker.decode(marker.encode(), "m") == marker
    else:
        packfs_control.decode(text)
        server = object.__new__(ControlServer)
        server._status, server._inflight = dict, lambda packs: (len(packs), [])
        server._mounted = server._expected = server._unexpected = lambda *_: None
        assert json.dumps(server._answer(text))


def _oci_seeds() -> Iterable[bytes]:
    blob = {"mediaType": media.OCI_LAYER, "digest": OCI, "size": 3, "annotations": {"a": "b"}}
    config = {"mediaType": media.OCI_CONFIG, "digest": OCI, "size": 3}
    yield b"\0" + json.dumps({"schemaVersion": 2, "config": config, "layers": [blob, blob]}).encode()
    entry = {"mediaType": media.OCI_MANIFEST, "digest": OCI, "size": 3, "platform": {"os": "linux"}}
    yield b"\0" + json.dumps({"mediaType": media.OCI_INDEX, "manifests": [entry]}).encode()
    value = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [OCI]}}
    yield b"\1" + json.dumps(value).encode()
    yield b"\2" + stub.Marker(HEX, "/m", "m:1", HEX).encode()
    yield b"\3" + packfs_control.encode({"op": "mounted", "tree": HEX, "packs": [HEX]})
    yield b"\3" + packfs_control.encode({"op": "expected", "tree": HEX, "bytes": 5})


# --- profiles


def profile(data: bytes) -> None:
    """A start-up profile around any body: 12 bytes of counts, then the body."""
    head = struct.Struct("<8sHHIIIII32s")
    with contextlib.suppress(FloeError):
        Profile.decode(data, "p")
    if len(data) < 12:
        return
    counts, body = struct.unpack_from("<III", data), data[12:]
    header = head.pack(b"FLOEPROF", 1, 0, len(body), *counts, 0, digest(body))
    found = Profile.decode(header + zstandard.ZstdCompressor(level=1).compress(body), "p")
    assert Profile.decode(found.encode(), "p") == found
    found.hot_frames(), found.hot_pieces()
    assert merge(found, Profile(1)) == merge(Profile(1), found)


def _profile_seeds() -> Iterable[bytes]:
    made = Profile(2, "models/a", b"opt/", {(0, 1): Touch(3, 1)}, {(b"a", 0): Touch(1, 2), (b"b/c", 7): Touch(5, 1)})
    for each in (made, Profile()):
        raw = each.encode()
        yield raw
        yield raw[16:28] + zstandard.ZstdDecompressor().decompress(raw[64:])


# --- layers


class _Sink:
    """Takes contents, keeps nothing, and gives out places in one pack."""

    def __init__(self) -> None:
        self.pack = TestPack("p")

    def add_stream(self, readable: Any, size: int) -> FileContent:
        left, read = size, bytearray()
        while left:
            piece = readable.read(min(left, 1 << 16))
            assert 0 < len(piece) <= left
            left -= len(piece)
            read += piece[: max(0, (1 << 16) - len(read))]
            if size - left > 8 << 20:
                raise _TooMuchError("enough")
        return FileContent(size, layers.chunk_bits(size), (None,) * -(-size >> layers.chunk_bits(size)))


class _TooMuchError(FloeError):
    """The input is well-formed and long, which is nothing to look at."""


def layer(data: bytes) -> None:
    """A layer's blob, as it is or (first byte odd) with the checksums of its headers set right."""
    blob = data[1:]
    if data[:1] and data[0] & 1:
        blob = _with_tar_checksums(blob)
    pieces = (blob[at : at + 1000] for at in range(0, len(blob), 1000))
    root = layers.read_layer(compression.decompress(pieces, "blob"), _Sink(), "layer").root
    for _, node in walk(root):
        for name in node.children:
            assert name not in (b"", b".", b"..")
            assert b"/" not in name
            assert b"\0" not in name
    check_image(build_image(root, {}))


def _with_tar_checksums(data: bytes) -> bytes:
    blob = bytearray(data)
    for at in range(0, len(blob) - 511, 512):
        if blob[at + 257 : at + 262] == b"ustar":
            blob[at + 148 : at + 156] = b" " * 8
            blob[at + 148 : at + 156] = b"%06o\0 " % (sum(blob[at : at + 512]) & 0o777777)
    return bytes(blob)


def _layer_seeds() -> Iterable[bytes]:
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        raw = io.BytesIO()
        with tarfile.open(fileobj=raw, mode="w", format=form) as tar:
            for name, kind, link in (
                ("d", tarfile.DIRTYPE, ""), ("d/f", tarfile.REGTYPE, ""), ("d/h", tarfile.LNKTYPE, "d/f"),
                ("s", tarfile.SYMTYPE, "d"), ("s/in", tarfile.REGTYPE, ""), ("c", tarfile.CHRTYPE, ""),
                ("d/.wh.x", tarfile.REGTYPE, ""), ("d/.wh..wh..opq", tarfile.REGTYPE, ""),
                ("n" * 120, tarfile.REGTYPE, ""), ("l", tarfile.SYMTYPE, "t" * 140),
            ):  # fmt: skip
                entry = tarfile.TarInfo(name)
                entry.type, entry.linkname, entry.mtime = kind, link, 5
                entry.size = 3 if kind == tarfile.REGTYPE else 0
                if form == tarfile.PAX_FORMAT and name == "d/f":
                    entry.pax_headers = {"SCHILY.xattr.user.a": "b", "mtime": "5.25", "uid": "3000000000"}
                tar.addfile(entry, io.BytesIO(b"abc"))
        yield b"\1" + raw.getvalue()
        yield b"\0" + zstandard.ZstdCompressor().compress(raw.getvalue())
    yield b"\1" + _sparse({"GNU.sparse.map": "0,1,5,2", "GNU.sparse.size": "9", "GNU.sparse.numblocks": "2"}, b"abc")
    one = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "4096", "GNU.sparse.name": "f"}
    yield b"\1" + _sparse(one, b"1\n1000\n3\n".ljust(tarheader.RECORD, b"\0") + b"abc")


def _sparse(headers: dict[str, str], data: bytes) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo("sparse")
        entry.size, entry.pax_headers = len(data), headers
        tar.addfile(entry, io.BytesIO(data))
    return raw.getvalue()


def docker_archive(data: bytes) -> None:
    """A file of `docker save`: its index, its manifest, and every blob that it names."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.write(_with_tar_checksums(data))
        file.flush()
        with contextlib.closing(DockerArchiveSource(DockerArchiveRef(file.name))) as source:
            image = resolve(source)
            for blob in image.manifest.layers:
                for _ in source.open_blob(blob):
                    pass


def _docker_seeds() -> Iterable[bytes]:
    config = {"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": []}}
    entry = {"mediaType": media.OCI_INDEX, "digest": OCI, "size": 3}
    for listed in ({}, {"index.json": {"manifests": [entry, entry]}}):
        raw = io.BytesIO()
        files = {"manifest.json": [{"Config": "c.json", "Layers": [], "RepoTags": ["a:1"]}], "c.json": config, **listed}
        with tarfile.open(fileobj=raw, mode="w") as tar:
            for name, value in files.items():
                text = json.dumps(value).encode()
                info = tarfile.TarInfo(name)
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text))
        yield raw.getvalue()


# --- what users, containerd and administrators say


def labels(data: bytes) -> None:
    """Labels and filters over gRPC: a filter, a zero byte, then a label's value."""
    first, _, second = data.partition(b"\0")
    text, value = first.decode(errors="replace"), second.decode(errors="replace")
    found = {stub.ANNOTATION: value, stub.MODELS_AHEAD: value, "a.b": text}
    trees = models_in(found)
    assert len(trees) <= stub.AHEAD_MAX + 1
    assert all(map(is_hexdigest, trees))
    with contextlib.suppress(FloeError):
        assert is_hexdigest(stub.check_annotation(value))
    matches = filters.parse_filters([text])
    assert matches(filters.info_fields(value, text, "view", found)) in (True, False)


def _label_seeds() -> Iterable[bytes]:
    yield b'name==x,labels."a.b"~=/y.*z/\0' + HEX.encode()
    yield b'kind!=active,parent~="^a\\x41\\u00e9$"\0' + f"{HEX},{'12' * 32},x".encode()
    yield b"labels.a\0"


def names(data: bytes) -> None:
    """Names of models and images, keys of refs, addresses of indexes: nothing in them leads out of its place."""
    text = data.decode(errors="surrogateescape")
    with contextlib.suppress(FloeError):
        key = layout.model_ref_key(ModelRef.parse(text))
        assert os.path.normpath(key) == key
        assert key.count("/") == 4
        assert str(layout.parse_model_ref_key(key)) == str(ModelRef.parse(text))
    with contextlib.suppress(FloeError):
        layout.model_ref_key(layout.parse_model_ref_key(text))
    for make in (layout.tree_key, layout.layer_ref_key):
        with contextlib.suppress(FloeError):
            assert ".." not in make(text)
    with contextlib.suppress(FloeError):
        str(parse_image_ref(text))
    with contextlib.suppress(FloeError):
        repr(RedisAddress.parse(text))


def _name_seeds() -> Iterable[bytes]:
    yield from (b"llama:8b", b"org/name:tag", b"refs/models/_/a/b", b"registry.example:5000/a/b:c", b"oci:/a:b")
    yield from (b"redis://:secret@host:6379/0?prefix=x", b"rediss://a:1,b:2?cluster=1", OCI.encode(), HEX.encode())


def hosts_toml(data: bytes) -> None:
    """A registry's hosts.toml."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "hosts.toml"
        path.write_bytes(data)
        found = hosts._read(path)
        for endpoint in hosts._Reader("r.example", path, plain_http=False).endpoints(found or {}):
            assert endpoint.address.startswith(("http://", "https://"))
            assert "@" not in endpoint.address


def _host_seeds() -> Iterable[bytes]:
    yield (
        b'server = "https://a"\n[host."http://m:1/p"]\ncapabilities = ["pull"]\nca = ["c"]\nclient = [["a","b"]]\n'
        b'skip_verify = true\noverride_path = true\ndial_timeout = "1m5s"\n[host."http://m:1/p".header]\nx = ["1"]\n'
    )


def settings_toml(data: bytes) -> None:
    """Floe's own settings, from a file and from variables."""
    text = data.decode(errors="replace")
    with contextlib.suppress(FloeError):
        key = settings.PREFIX + "MODEL_POLICY"
        settings.load({}, {key: text}, "")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "config.toml"
        path.write_bytes(data)
        found = settings.load({}, {}, str(path))
        assert found.as_flags()


def bento_yaml(data: bytes) -> None:
    """What BentoML says of Bentos and models: names become paths and variables, so they must be as BentoML has them."""
    with contextlib.suppress(FloeError):
        model = parse_model(data, "model.yaml")
        assert ModelRef.parse(str(model.tag))
    found = parse_bento(data, "bento.yaml")
    for name, text, _ in found.envs:
        assert "=" not in name
        assert "\0" not in name + text
    for named in found.models:
        assert ModelRef.parse(str(named.tag))
        parts = hub.folder_name(named).split("/") if named.from_hub else str(named.tag).split(":")
        assert not {"", ".", ".."} & set(parts)
        assert len(parts) == (1 if named.from_hub else 2)


def _bento_seeds() -> Iterable[bytes]:
    for name in bento.SPECS.values():
        yield (bento.DATA / name).read_bytes()
    yield bento.with_models(2, bento.hub_entry("Acme/Tiny")).encode()
    yield b"name: a\nversion: b\nmodels: [c:d]\ndocker: {env: [A=b]}\nenvs: [{name: C, value: d, stage: build}]\n"


def _settings_seeds() -> Iterable[bytes]:
    yield b'store = "s3://b/p"\ncache_size = "50%"\nreadahead = 0\nstore_timeout = 1.5\nloop = "never"\n'
    yield b'[[model_policy]]\nname = "llama/*"\npin = true\nshare = "40GiB"\n'
    yield b'[{name = "a*", completion = "idle", pin = true}]'


def redis_replies(data: bytes) -> None:
    """What a shared index answers: the first byte says how long the pieces are that the rest is cut into."""
    size = data[0] % 64 + 1 if data else 1
    pieces = [data[at : at + size] for at in range(1, len(data), size)]
    generation = (pieces or [b""])[0][:8]
    table = dict(zip(pieces[::2], pieces[1::2], strict=False))
    known, stale = chunkmap.sort_packs([table], generation)
    assert all(map(is_hexdigest, known.packs.values()))
    assert all(len(first) == keys.PREFIX_BYTES for first in (*known.packs, *stale))
    for value in pieces:
        for first, block in keys.places(value):
            assert len(first) == keys.PREFIX_BYTES
            assert 0 <= block < 1 << 24
        chunkmap._recorded(value)


def _redis_seeds() -> Iterable[bytes]:
    pack = bytes(range(32))
    generation = b"generatn"
    yield bytes([7]) + generation + pack
    yield bytes([31]) + generation.ljust(32, b"\0") + pack[:8].ljust(32) + pack[8:] + generation
    yield bytes([63]) + b'{"run": 5}'


TARGETS = {
    "fuse_request": Target(fuserequests.check, fuserequests.seeds, 4096),
    "tree": Target(tree, _tree_seeds, 1 << 17),
    "tree_object": Target(tree_object, _tree_object_seeds),
    "pack_index": Target(pack_index, _pack_index_seeds),
    "chunk_table": Target(chunk_table, _chunk_table_seeds),
    "record": Target(record, _record_seeds),
    "profile": Target(profile, _profile_seeds),
    "oci_json": Target(oci_json, _oci_seeds),
    "layer": Target(layer, _layer_seeds),
    "docker_archive": Target(docker_archive, _docker_seeds),
    "labels": Target(labels, _label_seeds, 4096),
    "names": Target(names, _name_seeds, 4096),
    "hosts_toml": Target(hosts_toml, _host_seeds, 4096),
    "settings_toml": Target(settings_toml, _settings_seeds, 4096),
    "bento_yaml": Target(bento_yaml, _bento_seeds, 4096),
    "redis_replies": Target(redis_replies, _redis_seeds, 4096),
}
