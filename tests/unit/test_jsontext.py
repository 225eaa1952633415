"""JSON from the store: what two readers may read differently is refused, and so is what would cost much."""

import pytest

from floe.store.errors import DamagedError
from floe.store.fields import ITEMS_MAX
from floe.store.jsontext import BYTES_MAX, DEPTH_MAX, parse, shown
from floe.store.records import AttachmentRecord, ChainRecord, Ref

HEX = "ab" * 32


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"\xff", b'{"a":1,"a":2}', b'[{"b":{"c":1,"c":1}}]', b"NaN", b"[-Infinity]", b"12345678901234567890",
        b"[" * (DEPTH_MAX + 2) + b"]" * (DEPTH_MAX + 2), b"[" * 100_000, b'{"a":' * 100_000, b'"' + b"a" * BYTES_MAX,
    ],
)  # fmt: skip
def test_what_is_refused(text):
    with pytest.raises(ValueError):
        parse(text)


def test_what_is_read():
    deep = b"[" * DEPTH_MAX + b"]" * DEPTH_MAX
    assert parse(deep)
    assert parse(b'{"a":[1,-2,1.5,null,"\xc3\xa9"]}') == {"a": [1, -2, 1.5, None, "é"]}
    with pytest.raises(ValueError):
        parse(b"[1,2,3]", 6)
    assert len(shown(["x" * 1000])) < 70


@pytest.mark.parametrize("field", ['"format":{}', '"version":{}', '"manifest":{}', '"updated":{}'])
@pytest.mark.parametrize("value", ["[" * 900 + "]" * 900, '{"a":' * 30 + "1" + "}" * 30, "true", "1e999", "9" * 5000])
def test_no_value_of_any_field_breaks_a_record(field, value):
    fields = {"format": '"floe.ref"', "version": "1", "manifest": f'"{HEX}"', "updated": '"now"'}
    name = field.split('"')[1]
    fields[name] = value
    text = "{" + ",".join(f'"{key}":{each}' for key, each in fields.items()) + "}"
    with pytest.raises(Exception) as caught:
        Ref.decode(text.encode(), "key")
    assert type(caught.value).__name__ in ("DamagedError", "UnsupportedError")
    assert len(str(caught.value)) < 300


def test_lists_of_a_record_are_bounded():
    model = '{"name":"m","path":"/m"}'
    for count, good in ((ITEMS_MAX, True), (ITEMS_MAX + 1, False)):
        text = (
            '{"format":"floe.attachment","version":1,"target":"sha256:' + HEX + '","source":"s","created":"c","models":['
            + ",".join([model] * count) + "]}"
        )  # fmt: skip
        if good:
            assert len(AttachmentRecord.decode(text.encode(), "k").models) == count
        else:
            with pytest.raises(DamagedError, match="at most"):
                AttachmentRecord.decode(text.encode(), "k")


def test_a_version_that_only_looks_like_ours_is_refused():
    for version in ("1.0", "true"):
        text = f'{{"format":"floe.chain","version":{version},"diff_id":"sha256:{HEX}","parent":null}}'
        with pytest.raises(Exception, match="format version"):
            ChainRecord.decode(text.encode(), "key")
