"""Digests, chain ids and model names."""

import hashlib

import pytest

from floe.store import layout
from floe.store.errors import BadInputError
from floe.store.ids import ModelRef, chain_ids, check_hexdigest, check_oci_digest, digest, hexdigest

A, B, C = ("sha256:" + letter * 64 for letter in "abc")


def test_the_digest_is_blake3():
    # The empty input's value in BLAKE3's published test vectors.
    assert hexdigest(b"") == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert digest(memoryview(b"")).hex() == hexdigest(b"")


def test_chain_ids_are_those_of_the_oci_image_spec():
    assert chain_ids([]) == []
    assert chain_ids([A]) == [A]
    # printf '%s' "<A> <B>" | sha256sum, and so on
    two = "sha256:" + hashlib.sha256(f"{A} {B}".encode()).hexdigest()
    three = "sha256:" + hashlib.sha256(f"{two} {C}".encode()).hexdigest()
    assert chain_ids([A, B, C]) == [A, two, three]


@pytest.mark.parametrize("text", ["", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "a" * 64 + "\n", "sha256:" + "a" * 64])
def test_what_is_no_digest(text):
    with pytest.raises(BadInputError):
        check_hexdigest(text)


@pytest.mark.parametrize("text", ["", "a" * 64, "sha512:" + "a" * 64, "sha256:" + "A" * 64, A + "0", "sha256:../../x"])
def test_what_is_no_oci_digest(text):
    with pytest.raises(BadInputError):
        check_oci_digest(text)


@pytest.mark.parametrize(
    ("text", "name", "tag"),
    [
        ("bert", "bert", "latest"),
        ("bert:v1", "bert", "v1"),
        ("org/bert:v1.0_x-y", "org/bert", "v1.0_x-y"),
        ("0", "0", "latest"),
        ("a" * 63 + ":" + "b" * 63, "a" * 63, "b" * 63),
    ],
)
def test_model_names(text, name, tag):
    ref = ModelRef.parse(text)
    assert (ref.name, ref.tag, ref.digest) == (name, tag, None)
    assert ModelRef.parse(str(ref)) == ref
    assert layout.parse_model_ref_key(layout.model_ref_key(ref)) == ref


def test_a_model_by_digest():
    ref = ModelRef.parse("org/bert@" + "1" * 64)
    assert (ref.name, ref.tag, ref.digest) == ("org/bert", None, "1" * 64)
    assert str(ref) == "org/bert@" + "1" * 64
    with pytest.raises(BadInputError, match="digest"):
        layout.model_ref_key(ref)


@pytest.mark.parametrize(
    "text",
    [
        "", ":", ":v1", "bert:", "Bert", "bert:V1", "-bert", "bert-", ".bert", "be rt", "a/b/c", "/b", "a/", "a//b", "_",
        "_/bert", "..", "../x", "a/..", "bert:../x", "bert@", "bert@sha256:" + "1" * 64, "bert@123", "a" * 64,
        "b:" + "a" * 64, "bert:v1:v2", "bert\n", "bért", "@" + "1" * 64,
    ],
)  # fmt: skip
def test_what_is_no_model_name(text):
    with pytest.raises(BadInputError):
        ModelRef.parse(text)


def test_the_tags_of_no_two_models_share_a_key_or_a_folder_with_an_object():
    refs = [ModelRef.parse(text) for text in ("a:b", "a/b:c", "b:a", "a:latest", "a/a:a", "a:a", "b/a:b")]
    keys = [layout.model_ref_key(ref) for ref in refs]
    assert len(set(keys)) == len(keys)
    assert not [(k, other) for k in keys for other in keys if other.startswith(f"{k}/")]


@pytest.mark.parametrize(
    "key", ["refs/models/a", "refs/models/a/b", "refs/models/_/a/b/c", "refs/models/_/A/b", "x/y/z/w"]
)
def test_keys_that_are_no_models(key):
    with pytest.raises(BadInputError):
        layout.parse_model_ref_key(key)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (layout.pack_key, "packs/11/"),
        (layout.pack_index_key, "indexes/11/"),
        (layout.chunk_table_key, "chunks/11/"),
        (layout.tree_key, "trees/11/"),
        (layout.manifest_key, "manifests/11/"),
    ],
)
def test_keys_of_objects_named_by_digest(make, key):
    assert make("1" * 64) == key + "1" * 64
    for bad in ("1" * 63, "../" + "1" * 61, ""):
        with pytest.raises(BadInputError):
            make(bad)


@pytest.mark.parametrize(
    ("make", "folder"),
    [
        (layout.layer_ref_key, "refs/layers"),
        (layout.chain_ref_key, "refs/chains"),
        (layout.image_ref_key, "refs/images"),
        (layout.attachment_ref_key, "refs/attachments"),
    ],
)
def test_keys_of_refs_named_by_oci_digest(make, folder):
    assert make(A) == f"{folder}/sha256/{'a' * 64}"
    with pytest.raises(BadInputError):
        make("sha256:../../x")
