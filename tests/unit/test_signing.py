"""What a signature binds, byte by byte, and that nothing else passes for it."""

import base64
import json
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from floe.cli.trusted import TrustedKeys
from floe.store import signing
from floe.store.errors import BadInputError, DamagedError, UntrustedError
from floe.store.ids import ModelRef, hexdigest
from floe.store.records import Move, Ref, Signature, TreeSignatures
from floe.store.signing import PublicKey, Signer, Statement, Trust
from floe.store.vouching import Vouching, claims

ONE, TWO = "1" * 64, "2" * 64
DIFF = "sha256:" + "d" * 64
NOW = "2026-01-02T03:04:05Z"
MODEL = Statement.model(ModelRef.parse("org/llama:8b"), ONE)
KINDS = (MODEL, Statement.layer(DIFF, ONE), Statement.tree(ONE))


def key(number):
    return Signer(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))


MINE, OTHER = key(1), key(2)
TRUST = Trust([MINE.public])


def test_the_signed_bytes_are_those_of_the_format():
    assert MODEL.signed_bytes(NOW) == (
        b"floe.signature.v1\0"
        b'{"kind":"model","name":"org/llama:8b","signed":"2026-01-02T03:04:05Z","target":"' + b"1" * 64 + b'"}'
    )
    assert Statement.tree(ONE).signed_bytes(NOW) == (
        b'floe.signature.v1\0{"kind":"tree","name":"","signed":"2026-01-02T03:04:05Z","target":"' + b"1" * 64 + b'"}'
    )
    # RFC 8032 is deterministic: the same key and statement give these bytes wherever they are made.
    assert MINE.sign(MODEL, NOW) == MINE.sign(MODEL, NOW)
    assert MINE.public.id == hexdigest(MINE.public.raw)


@pytest.mark.parametrize("statement", KINDS, ids=lambda s: s.kind)
def test_what_a_trusted_key_signed_is_trusted_and_nothing_else(statement):
    good = MINE.sign(statement, NOW)
    TRUST.check(statement, [good])
    with pytest.raises(UntrustedError, match="is not signed"):
        TRUST.check(statement, [])
    with pytest.raises(UntrustedError, match="not trusted here"):
        TRUST.check(statement, [OTHER.sign(statement, NOW)])
    with pytest.raises(UntrustedError, match="something else, or altered"):
        TRUST.check(statement, [replace(OTHER.sign(statement, NOW), key=MINE.public.id)])


@pytest.mark.parametrize("signed", KINDS, ids=lambda s: s.kind)
@pytest.mark.parametrize(
    "other",
    [
        *KINDS,
        Statement.model(ModelRef.parse("org/llama:8b"), TWO),
        Statement.model(ModelRef.parse("org/llama:8c"), ONE),
        Statement.model(ModelRef.parse("llama:8b"), ONE),
        Statement.layer("sha256:" + "e" * 64, ONE),
        Statement.layer(DIFF, TWO),
        Statement.tree(TWO),
        Statement("model", DIFF, ONE),
        Statement("layer", "org/llama:8b", ONE),
        Statement("", "org/llama:8b", ONE),
    ],
    ids=str,
)
def test_a_signature_of_one_thing_is_none_of_another(signed, other):
    signature = MINE.sign(signed, NOW)
    assert MINE.public.made(signature, other) is (signed == other)


def test_every_altered_field_and_byte_is_noticed():
    good = MINE.sign(MODEL, NOW)
    raw = base64.b64decode(good.signature)
    assert len(raw) == signing.SIGNATURE_BYTES
    altered = [bytes([*raw[:at], raw[at] ^ bit, *raw[at + 1 :]]) for at in range(64) for bit in (1, 0x80)]
    cut = [raw[:length] for length in (0, 1, 32, 63)] + [raw + b"\0", raw + raw]
    for changed in (*altered, *cut):
        wrong = replace(good, signature=base64.b64encode(changed).decode())
        assert not MINE.public.made(wrong, MODEL)
    for text in (
        "",
        "=",
        "A",
        good.signature[:-1],
        good.signature + "!",
        " " + good.signature,
        "é",
        good.signature * 99,
    ):
        assert not MINE.public.made(replace(good, signature=text), MODEL)
    for signed in ("", "2026-01-02T03:04:06Z", NOW + " "):
        assert not MINE.public.made(replace(good, signed=signed), MODEL)
    for name in ("", good.key[:-1], OTHER.public.id, good.key.upper()):
        assert not MINE.public.made(replace(good, key=name), MODEL)
    assert MINE.public.made(good, MODEL)


def test_one_of_many_is_enough_and_rotation_leaves_no_gap():
    old, new = key(3), key(4)
    ref = Ref(ONE, NOW)
    first = Vouching(signer=old).sign_ref(MODEL, ref)
    both = Vouching(signer=new).sign_ref(MODEL, first)
    assert [s.key for s in both.signatures] == [old.public.id, new.public.id]
    # Again it changes nothing, so that nothing is written.
    assert Vouching(signer=old).sign_ref(MODEL, both) == both
    before, during, after = (Trust(s.public for s in signers) for signers in ([old], [old, new], [new]))
    before.check(MODEL, first.signatures)
    before.check(MODEL, both.signatures)
    during.check(MODEL, both.signatures)
    after.check(MODEL, both.signatures)
    with pytest.raises(UntrustedError):
        after.check(MODEL, first.signatures)
    assert during.signers(MODEL, both.signatures) == [old.public.id, new.public.id]


def test_junk_among_signatures_neither_helps_nor_grows():
    junk = tuple(Signature("0" * 64, "junk", str(number)) for number in range(40))
    signed = Vouching(signer=MINE).sign_ref(MODEL, Ref(ONE, NOW, junk))
    assert len(signed.signatures) == signing.MAX_SIGNATURES
    TRUST.check(MODEL, signed.signatures)
    # A spoilt one of our own is replaced, not kept beside the good one.
    spoilt = replace(MINE.sign(MODEL, NOW), signed="2020-01-01T00:00:00Z")
    again = Vouching(signer=MINE).sign_ref(MODEL, Ref(ONE, NOW, (spoilt,)))
    assert len(again.signatures) == 1
    TRUST.check(MODEL, again.signatures)
    assert [(s.key, counts) for s, counts in claims(TRUST, MODEL, [junk[0], *again.signatures])] == [
        ("0" * 64, False),
        (MINE.public.id, True),
    ]


def test_without_trust_nothing_is_asked_and_without_a_signer_nothing_is_signed():
    Vouching().check(MODEL, [])
    assert Vouching().sign_ref(MODEL, Ref(ONE, NOW)) == Ref(ONE, NOW)
    with pytest.raises(UntrustedError):
        Vouching(Trust([])).check(MODEL, [MINE.sign(MODEL, NOW)])


def test_an_unsigned_ref_is_what_it_ever_was_and_a_signed_one_reads_back():
    assert Ref(ONE, NOW).encode() == (
        b'{"format":"floe.ref","manifest":"%s","updated":"2026-01-02T03:04:05Z","version":1}' % (b"1" * 64)
    )
    signed = Ref(ONE, NOW, (MINE.sign(MODEL, NOW),))
    assert Ref.decode(signed.encode(), "k") == signed
    # What a reader of before this field sees of it.
    old = {key: value for key, value in json.loads(signed.encode()).items() if key != "signatures"}
    assert Ref.decode(json.dumps(old).encode(), "k") == Ref(ONE, NOW)
    tree = TreeSignatures(ONE, (MINE.sign(Statement.tree(ONE), NOW),))
    assert TreeSignatures.decode(tree.encode(), "k") == tree


@pytest.mark.parametrize("value", ["x", [1], [{}], [{"key": 1, "signature": "", "signed": ""}], None, {"key": "a"}])
def test_signatures_of_another_shape_are_damage(value):
    data = json.dumps({**json.loads(Ref(ONE, NOW).encode()), "signatures": value}).encode()
    with pytest.raises(DamagedError, match="signatures"):
        Ref.decode(data, "refs/k")


def test_what_a_tag_named_reads_back_and_an_older_reader_sees_a_ref():
    moved = Ref(ONE, NOW, by="ann@host", before=(Move("2" * 64, "2026-01-01T00:00:00Z", "ben@host"), Move(ONE, NOW)))
    assert Ref.decode(moved.encode(), "k") == moved
    old = {key: value for key, value in json.loads(moved.encode()).items() if key not in ("by", "before")}
    assert Ref.decode(json.dumps(old).encode(), "k") == Ref(ONE, NOW)


@pytest.mark.parametrize("value", ["x", [1], [{"manifest": ONE}], [{"manifest": "x", "updated": NOW}], None])
def test_moves_of_another_shape_are_damage(value):
    data = json.dumps({**json.loads(Ref(ONE, NOW).encode()), "before": value}).encode()
    with pytest.raises(DamagedError, match="before"):
        Ref.decode(data, "refs/k")


def test_public_keys_as_text():
    text = str(MINE.public)
    assert PublicKey.parse(text) == PublicKey.parse(f" {text} of the build farm\n") == MINE.public
    for wrong in (
        "",
        "ed25519:",
        text[:-1],
        text[:-4],
        text + "AAAA",
        text.removeprefix("ed25519:"),
        f"rsa:{text[8:]}",
    ):
        with pytest.raises(BadInputError, match="is not a public key"):
            PublicKey.parse(wrong)


def test_a_signer_shows_nothing_of_its_key():
    assert repr(MINE) == f"Signer({MINE.public.id[:16]})"


def test_the_setting_reads_back_from_its_own_text():
    keys = TrustedKeys.parse([str(MINE.public), "/etc/floe/trusted"])
    assert keys.sources == (str(MINE.public), "/etc/floe/trusted")
    assert TrustedKeys.parse(str(keys)) == keys
    assert TrustedKeys.parse(str(TrustedKeys())) == TrustedKeys.parse("none") == TrustedKeys()
    for wrong in ("", "relative/path", ",", "/a,,/b", [], [""], [1], 7, None, ["/a,b"]):
        with pytest.raises(BadInputError):
            TrustedKeys.parse(wrong)
