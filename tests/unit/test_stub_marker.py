"""The marker inside a stub layer."""

import json

import pytest

from floe.store.errors import BadInputError, DamagedError, UnsupportedError
from floe.store.stub import (
    AHEAD_MAX,
    ANNOTATION,
    MARKER,
    MODELS_AHEAD,
    Marker,
    check_annotation,
    models_ahead,
    parse_models_ahead,
)

MARKER_OF = Marker("a" * 64, "/models/m", "org/m:latest", "b" * 64)


def test_round_trip_and_spelling():
    data = MARKER_OF.encode()
    assert Marker.decode(data, "x") == MARKER_OF
    assert json.loads(data) == {
        "format": "floe.stub",
        "version": 1,
        "tree": "a" * 64,
        "path": "/models/m",
        "model": "org/m:latest",
        "manifest": "b" * 64,
    }
    assert (ANNOTATION, MARKER) == ("containerd.io/snapshot/floe.model", ".floe/model.json")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"format": "other"}, DamagedError),
        ({"version": 2}, UnsupportedError),
        ({"tree": "short"}, DamagedError),
        ({"tree": None}, DamagedError),
        ({"manifest": "x"}, DamagedError),
        ({"path": 1}, DamagedError),
    ],
)
def test_what_is_no_marker(change, error):
    data = json.dumps({**json.loads(MARKER_OF.encode()), **change}).encode()
    with pytest.raises(error, match="here"):
        Marker.decode(data, "here")


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b"null"])
def test_garbage(data):
    with pytest.raises(DamagedError):
        Marker.decode(data, "here")


def test_annotation():
    assert check_annotation("a" * 64) == "a" * 64
    with pytest.raises(BadInputError):
        check_annotation("m:latest")


def test_models_named_ahead_fit_into_a_label_and_come_once():
    trees = [f"{number:064x}" for number in range(AHEAD_MAX + 5)]
    value = models_ahead([trees[0], *trees, "None"])
    assert parse_models_ahead(value) == trees[:AHEAD_MAX]
    assert len(MODELS_AHEAD) + len(value) <= 4096
    assert parse_models_ahead("") == parse_models_ahead("x,y") == []
    assert MODELS_AHEAD == "containerd.io/snapshot/floe.models-ahead"
