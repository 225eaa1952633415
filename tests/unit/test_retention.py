"""Which tags the rules of a store keep. Pure."""

import pytest

from floe.store import layout
from floe.store.errors import DamagedError
from floe.store.ids import ModelRef
from floe.store.records import Ref, canonical_json
from floe.store.retention import Retention, Rule

DIGEST = "0" * 64


def refs(*names):
    """Tags, each moved a day after the one before."""
    days = enumerate(names, 1)
    return {
        layout.model_ref_key(ModelRef.parse(name)): Ref(DIGEST, f"2026-01-{day:02}T00:00:00Z") for day, name in days
    }


def expired(rules, models):
    return sorted(str(layout.parse_model_ref_key(key)) for key in Retention(tuple(rules)).expired(models))


MODELS = refs("a:v1", "a:v2", "org/b:v1", "a:latest", "a:v3", "org/b:v2")


@pytest.mark.parametrize(
    ("rules", "gone"),
    [
        ([], []),
        ([Rule("a", 2)], ["a:v1", "a:v2"]),
        ([Rule("a", 9)], []),
        ([Rule("a", 0, ("v[12]",))], ["a:latest", "a:v3"]),
        ([Rule("a", 1, ("latest",))], ["a:v1", "a:v2"]),
        ([Rule("org/*", 1)], ["org/b:v1"]),
        ([Rule("a", 9), Rule("*", 1)], ["org/b:v1"]),
        ([Rule("b", 0)], []),
    ],
)
def test_what_goes(rules, gone):
    assert expired(rules, MODELS) == gone


def test_the_record_is_read_as_it_was_written_and_what_is_wrong_is_refused():
    record = Retention((Rule("a", 2, ("v*",)), Rule("*", 0)))
    assert Retention.decode(record.encode(), "gc/retention") == record
    for rules in ([{"name": "a", "keep_last": -1, "keep": []}], [{"name": "a", "keep": []}], {}, [3]):
        data = canonical_json({"format": "floe.retention", "version": 1, "rules": rules})
        with pytest.raises(DamagedError):
            Retention.decode(data, "gc/retention")
