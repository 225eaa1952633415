"""containerd's filter expressions."""

import pytest

from floe.snapshotter.filters import info_fields, parse_filters
from floe.store.errors import BadInputError

SNAPSHOTS = {
    "a": info_fields("a", "", "active", {}),
    "v": info_fields("v", "p", "view", {"l": "3", "containerd.io/gc.root": "x"}),
    "p": info_fields("p", "", "committed", {"containerd.io/snapshot.ref": "sha256:ab", 'quo"te': "a,b"}),
    "n/1/sha256:ab cd": info_fields("n/1/sha256:ab cd", "n/0/p q", "committed", {"l": "1", "a.b": "c"}),
}


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ([], "a v p n"),
        ([""], "a v p n"),
        (["name==a"], "a"),
        (["name!=a"], "v p n"),
        (["name~=^[av]$"], "a v"),
        (["name~=/^[av]$/"], "a v"),
        (["name~=|b c|"], "n"),
        (["name~=("], ""),
        (["kind==committed"], "p n"),
        (["kind==view,labels.l==3"], "v"),
        (["kind==view", "name==a"], "a v"),
        (['parent==""'], "a p"),
        (['parent!=""'], "v n"),
        (['parent=="n/0/p q"'], "n"),
        (['name=="n/1/sha256:ab cd"'], "n"),
        (["labels.l"], "v n"),
        (["labels.l!=3"], "a p n"),
        (["labels"], ""),
        (["labels.a.b==c"], "n"),
        (['labels."containerd.io/gc.root"'], "v"),
        (['labels."containerd.io/snapshot.ref"==sha256:ab,parent==""'], "p"),
        (['labels."quo\\"te"=="a,b"'], "p"),
        (['labels."quo\\x22te"=="a\\u002cb"'], "p"),
        (["unknown"], ""),
        (["unknown!=x"], "a v p n"),
        ([" name == a, kind == active"], "a"),
    ],
)
def test_matching(filters, expected):
    matches = parse_filters(filters)
    assert [name[0] for name, fields in SNAPSHOTS.items() if matches(fields)] == expected.split()


# What Go's regexp answers; Python's re reads each of these otherwise, or not at all.
@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("x$", "x\n", False),
        ("^[[:alpha:]]+$", "abc", True),
        (r"^\pL$", "é", True),
        (r"x\z", "x", True),
        (r"x\Z", "x", False),
        (r"\d", "٣", False),
        (r"^\w$", "é", False),
        ("a(?=b)", "ab", False),
        (r"(a)\1", "aa", False),
        ("a++", "aa", False),
        ("(?:", "(?:", False),
    ],
)
def test_regular_expressions_are_go_s(pattern, name, expected):
    assert parse_filters([f"name~=|{pattern}|".replace("\\", "\\\\")])(info_fields(name, "", "view", {})) is expected


def test_no_regular_expression_takes_for_ever():
    matches = parse_filters(["name~=/(a|a)+$/", "name~=/(a*)*b$/"])
    # Python's re would take longer than the age of the universe.
    assert not matches(info_fields("a" * 2000 + "!", "", "view", {}))


@pytest.mark.parametrize(
    "text",
    [
        "name==",
        "==a",
        "name=a",
        "name===a",
        "name<a",
        "name==a,",
        ",name==a",
        "name==a b",
        "name ",
        "name==a ,kind==active",
        "name==.a",
        'name=="a',
        'name=="a\n"',
        'name=="\\q"',
        'name=="\\xg0"',
        'name=="\\400"',
        'name=="\\U00110000"',
        "name==/a/",
        "name~=/a\\.b/",
        "labels.",
        'labels."a',
        "/name/==a",
        "'name'==a",
        'name=="a"b',
    ],
)
def test_malformed(text):
    with pytest.raises(BadInputError, match="malformed"):
        parse_filters(["name==a", text])
