"""The formats on disk: golden digests hold them still, and what is damaged or unknown is refused."""

import dataclasses
import json
import struct

import pytest

from floe.store.errors import BadInputError, DamagedError, UnsupportedError
from floe.store.ids import digest, hexdigest
from floe.store.packindex import (
    CHUNK_ENTRY_BYTES,
    CHUNKS_HEADER_BYTES,
    CODEC_RAW,
    CODEC_ZSTD,
    FRAME_ENTRY_BYTES,
    INDEX_HEADER_BYTES,
    ChunkEntry,
    FrameEntry,
    PackIndex,
    decode_chunk_table,
    encode_chunk_table,
)
from floe.store.records import (
    KIND_MODEL,
    AttachmentRecord,
    ChainRecord,
    ImageRecord,
    Manifest,
    PackEntry,
    Ref,
    Sizes,
    StoreRecord,
    TreeEntry,
    canonical_json,
)
from floe.store.treeobject import HEADER_BYTES, MAX_IMAGE, decode_tree, encode_tree

D1, D2 = "1" * 64, "2" * 64
A = "sha256:" + "a" * 64
CHUNKS = [ChunkEntry(digest(b"one"), 4096, 0), ChunkEntry(digest(b"two"), 5, 2)]
TABLE = encode_chunk_table(CHUNKS)
INDEX = PackIndex(
    8192, 12288, (FrameEntry(8192, CODEC_RAW, digest(b"a")), FrameEntry(17, CODEC_ZSTD, digest(b"b"))), digest(TABLE)
)
RECORDS = [
    Manifest(
        KIND_MODEL, TreeEntry(D1, 5), (PackEntry(D2, 4096, 100, 1 << 20),), Sizes(1, 2, 3), "dir", "2026-01-01T00:00:00Z", {"k": "é"}
    ),
    StoreRecord("uuid", "2026-01-01T00:00:00Z"),
    Ref(D1, "2026-01-01T00:00:00Z"),
    ChainRecord(A, None),
    ImageRecord(A, ("b", "a"), "linux/amd64", (A,), (A,), 9, "2026-01-01T00:00:00Z"),
    AttachmentRecord(A, "source", ({"name": "m", "path": "/m"},), "2026-01-01T00:00:00Z"),
]  # fmt: skip


def with_id(data):
    """Bytes and the pack id that vouches for them: what remains is for the parser to refuse."""
    return bytes(data), hexdigest(data)


def patched(data, offset, form, value):
    changed = bytearray(data)
    struct.pack_into(form, changed, offset, value)
    return bytes(changed)


# Pack index


def test_the_pack_index_is_as_documented():
    data = INDEX.encode()
    assert (INDEX_HEADER_BYTES, FRAME_ENTRY_BYTES) == (128, 40)
    assert len(data) == 128 + 2 * 40
    assert data[:8] == b"FLOEPIDX"
    assert struct.unpack_from("<HHIIIQQ", data, 8) == (1, 0, 8192, 2, 0, 12288, 8209)
    assert data[40:72] == digest(TABLE)
    assert data[72:128] == bytes(56)
    assert struct.unpack_from("<IB3x32s", data, 168) == (17, CODEC_ZSTD, digest(b"b"))
    assert INDEX.pack_id == hexdigest(data)


def test_the_pack_index_comes_back():
    found = PackIndex.decode(memoryview(INDEX.encode()), INDEX.pack_id)
    assert found == INDEX
    assert found.stored_offsets == (0, 8192, 8209)
    assert found.stored_size == 8209
    assert [found.content_length(n) for n in (0, 1)] == [8192, 4096]
    assert list(found.frame_range(0, 1)) == [0]
    assert list(found.frame_range(8191, 2)) == [0, 1]
    assert list(found.frame_range(8192, 4096)) == [1]


def test_every_flipped_byte_of_a_pack_index_is_noticed():
    data = INDEX.encode()
    for place in range(len(data)):
        with pytest.raises(DamagedError, match="does not match"):
            PackIndex.decode(patched(data, place, "B", data[place] ^ 1), INDEX.pack_id)


@pytest.mark.parametrize(
    ("offset", "form", "value", "error"),
    [
        (0, "8s", b"FLOECHNK", DamagedError),
        (8, "<H", 2, UnsupportedError),
        (10, "<H", 1, UnsupportedError),
        (12, "<I", 0, DamagedError),
        (12, "<I", 6144, DamagedError),
        (12, "<I", 2 << 20, DamagedError),
        (16, "<I", 3, DamagedError),
        (16, "<I", 0xFFFFFFFF, DamagedError),
        (24, "<Q", 0, DamagedError),
        (24, "<Q", 12287, DamagedError),
        (24, "<Q", 1 << 60, DamagedError),
        (32, "<Q", 8210, DamagedError),
        (72, "32s", b"key id", UnsupportedError),
        (132, "B", 2, UnsupportedError),
    ],
)
def test_a_pack_index_that_makes_no_sense_is_refused_though_its_digest_fits(offset, form, value, error):
    with pytest.raises(error, match="pack index"):
        PackIndex.decode(*with_id(patched(INDEX.encode(), offset, form, value)))


@pytest.mark.parametrize("size", [0, 1, 127, 128, 150, 207])
def test_a_cut_pack_index_is_refused(size):
    with pytest.raises(DamagedError):
        PackIndex.decode(*with_id(INDEX.encode()[:size]))
    with pytest.raises(DamagedError):
        PackIndex.decode(*with_id(INDEX.encode() + bytes(40)))


# Chunk table


def test_the_chunk_table_is_as_documented():
    assert (CHUNKS_HEADER_BYTES, CHUNK_ENTRY_BYTES) == (32, 40)
    assert TABLE[:32] == b"FLOECHNK" + struct.pack("<HHI", 1, 0, 2) + bytes(16)
    assert struct.unpack_from("<32sII", TABLE, 72) == (digest(b"two"), 5, 2)
    assert decode_chunk_table(TABLE, INDEX, INDEX.pack_id) == CHUNKS


@pytest.mark.parametrize(
    ("spoilt", "error"),
    [
        (TABLE[:-1], DamagedError),
        (TABLE + bytes(40), DamagedError),
        (b"", DamagedError),
        (patched(TABLE, 0, "8s", b"FLOEPIDX"), DamagedError),
        (patched(TABLE, 8, "<H", 2), UnsupportedError),
        (patched(TABLE, 10, "<H", 1), UnsupportedError),
        (patched(TABLE, 12, "<I", 3), DamagedError),
    ],
)
def test_a_bad_chunk_table_is_refused(spoilt, error):
    with pytest.raises(DamagedError, match="does not match"):
        decode_chunk_table(spoilt, INDEX, INDEX.pack_id)
    vouched = dataclasses.replace(INDEX, chunk_table_digest=digest(spoilt))
    with pytest.raises(error, match="chunk table"):
        decode_chunk_table(spoilt, vouched, INDEX.pack_id)


# Tree object


@pytest.mark.parametrize("image", [b"", b"x", bytes(100_000), bytes(range(256))])
def test_a_tree_comes_back(image):
    data = encode_tree(image)
    assert HEADER_BYTES == 64
    assert data[:8] == b"FLOETREE"
    assert struct.unpack_from("<HHB3xQ", data, 8) == (1, 0, int(len(image) == 100_000), len(image))
    assert decode_tree(memoryview(data), hexdigest(image)) == image


def test_a_tree_is_compressed_when_that_pays():
    assert len(encode_tree(bytes(100_000))) < 200
    assert len(encode_tree(bytes(range(256)))) == 64 + 256


@pytest.mark.parametrize("image", [bytes(100_000), bytes(range(256))])
def test_a_bad_tree_is_refused(image):
    data, name = encode_tree(image), hexdigest(image)
    for spoilt, error in (
        (b"", DamagedError),
        (data[:63], DamagedError),
        (data[:-1], DamagedError),
        (data + b"x", DamagedError),
        (patched(data, 0, "8s", b"FLOEFIRE"), DamagedError),
        (patched(data, len(data) - 1, "B", data[-1] ^ 1), DamagedError),
        (patched(data, 8, "<H", 2), UnsupportedError),
        (patched(data, 10, "<H", 1), UnsupportedError),
        (patched(data, 12, "B", 2), UnsupportedError),
        (patched(data, 16, "<Q", len(image) - 1), DamagedError),
        (patched(data, 16, "<Q", MAX_IMAGE + 1), DamagedError),
        (patched(data, 24, "32s", b"key id"), UnsupportedError),
    ):
        with pytest.raises(error, match=name):
            decode_tree(spoilt, name)
    with pytest.raises(DamagedError):
        decode_tree(data, D1)


# Records


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.FORMAT)
def test_a_record_comes_back(record):
    assert type(record).decode(record.encode(), "key") == record
    value = json.loads(record.encode())
    assert (value["format"], value["version"]) == (record.FORMAT, 1)
    assert canonical_json(value) == record.encode()


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.FORMAT)
def test_a_bad_record_is_refused_by_its_key(record):
    value = json.loads(record.encode())
    kind = type(record)
    first = next(name for name in value if name not in ("format", "version", "parent", "labels", "encryption"))
    for spoilt in (b"", b"{", b"[]", b"null", b"\xff", canonical_json({**value, "format": "floe.other"}),
                   canonical_json({k: v for k, v in value.items() if k != first}),
                   canonical_json({k: v for k, v in value.items() if k != "version"})):  # fmt: skip
        with pytest.raises(DamagedError, match="refs/the/key"):
            kind.decode(spoilt, "refs/the/key")
    with pytest.raises(UnsupportedError, match="refs/the/key has format version 2"):
        kind.decode(canonical_json({**value, "version": 2}), "refs/the/key")


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.FORMAT)
def test_keys_of_a_later_floe_are_ignored(record):
    value = json.loads(record.encode()) | {"later": [1, 2]}
    assert type(record).decode(canonical_json(value), "key") == record


def test_keys_of_a_later_floe_are_ignored_at_any_depth():
    value = json.loads(RECORDS[0].encode())
    for part in (value["tree"], value["packs"][0], value["sizes"]):
        part["later"] = 1
    assert Manifest.decode(canonical_json(value), "key") == RECORDS[0]


# Values that are right there, among those below.
ALLOWED = [("parent", None), ("encryption", None), ("labels", {}), ("signatures", [{}]), ("names", ["x"])] + [
    (name, text)
    for name in ("kind", "source", "created", "uuid", "updated", "platform", "indexed")
    for text in ("zz",)
] + [("size", 5)]  # fmt: skip


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.FORMAT)
@pytest.mark.parametrize("wrong", [5, -1, True, "zz", "\ud800", ["x"], [5], [["x"]], {"x": 5}, {}, [{}], None, 1.5])
def test_a_field_of_another_kind_is_refused_by_its_key(record, wrong):
    value = json.loads(record.encode())
    for name in value.keys() - {"format", "version"}:
        data = json.dumps({**value, name: wrong}).encode()
        if (name, wrong) in ALLOWED:
            type(record).decode(data, "refs/the/key")
            continue
        with pytest.raises((DamagedError, UnsupportedError)) as caught:
            type(record).decode(data, "refs/the/key")
        if name != "encryption":
            assert caught.type is DamagedError
            assert f"refs/the/key is a {record.FORMAT} record with a wrong field: " in str(caught.value)
            assert name in str(caught.value)


@pytest.mark.parametrize(
    ("record", "change", "named"),
    [
        (0, {"tree": {"digest": "zz", "size": 1}}, "tree.digest"),
        (0, {"tree": {"digest": D1}}, "tree has no 'size'"),
        (0, {"packs": [{"id": D2, "content_size": -1, "stored_size": 1, "frame_size": 1}]}, r"packs\[0\].content_size"),
        (0, {"labels": {"k": 1}}, "labels.k"),
        (2, {"manifest": "zz"}, "manifest is 'zz', not 64 hex digits"),
        (2, {"manifest": "Z" * 500}, r"manifest is 'Z+\.\.\."),
        (3, {"diff_id": D1}, "diff_id"),
        (3, {"parent": 5}, "parent"),
        (4, {"names": 5}, "names is 5"),
        (4, {"names": [5]}, r"names\[0\]"),
        (4, {"chain_ids": []}, "chain_ids has 0 items, diff_ids 1"),
        (5, {"models": [{"name": "m"}]}, r"models\[0\] has no 'path'"),
    ],
)
def test_a_wrong_field_is_named(record, change, named):
    value = json.loads(RECORDS[record].encode()) | change
    with pytest.raises(DamagedError, match=f"key .*{named}"):
        type(RECORDS[record]).decode(canonical_json(value), "key")


def test_json_nested_too_deep_is_no_record():
    with pytest.raises(DamagedError, match="key is not a"):
        Ref.decode(b"[" * 100_000, "key")


def test_text_that_is_not_utf_8_cannot_be_stored():
    with pytest.raises(BadInputError, match="not UTF-8"):
        canonical_json({"name": "a\udcff"})


def test_an_encrypted_manifest_is_refused():
    value = json.loads(RECORDS[0].encode()) | {"encryption": {"key": "x"}}
    with pytest.raises(UnsupportedError, match="encrypted"):
        Manifest.decode(canonical_json(value), "key")


def test_equal_values_have_one_spelling():
    assert canonical_json({"b": 1, "a": "é"}) == canonical_json({"a": "é", "b": 1}) == '{"a":"é","b":1}'.encode()
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))


# A changed digest here means a changed format: raise its VERSION and docs/FORMAT.md with it.
GOLDEN = {
    "floe.manifest": "0b4f986c92d61548e6cf832c5637262d7db70eaafb52838b02411c324e07e6ac",
    "floe.store": "f1130d0f0abf103bb90e9ff9e85607b095d0c6f7ad53d7b21ecbb954bcaeb091",
    "floe.ref": "6072fb658fdf165b38af2eb5e03f0e213a94a53dd6c8acecbc5051c5e120f818",
    "floe.chain": "d828d6a71d9e27a5ed1cf52631247693a5a258adcc22cc66ba332d7b149f1074",
    "floe.image": "db4ad1ad9cd38277189903cb8eb92a497da5aed3b222f56652535e8273c666b2",
    "floe.attachment": "fb26899920a59aabc5104cabd103ef3c2a94d6b4a79289fa9d369d572c389988",
    "index": "87cd5cdd4688681ddc239d26e57d0650293628c30a4971e24957e811c36c16bc",
    "table": "f8ea0e8fb58359b5f898fc7fd4c85ccfebf31174d03edeea5e6b4862f18aa65c",
    "tree": "d72aedb9c86f8277db975cc8200d17ebe3007a770ee5d01fff193046b8f07623",
}


def test_golden_digests():
    made = {r.FORMAT: r.digest for r in RECORDS}
    made |= {"index": INDEX.pack_id, "table": hexdigest(TABLE), "tree": hexdigest(encode_tree(bytes(range(256))))}
    assert made == GOLDEN
