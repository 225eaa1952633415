import pytest

from floe.cli.names import parse_label, parse_model, parse_placed_model, parse_tagged
from floe.store.errors import BadInputError
from floe.store.ids import ModelRef

DIGEST = "ab" * 32


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("iris", ModelRef("iris", "latest")),
        ("iris:v1", ModelRef("iris", "v1")),
        ("org/name:v1", ModelRef("org/name", "v1")),
        (f"iris@{DIGEST}", ModelRef("iris", None, DIGEST)),
    ],
)
def test_names_already_right_have_no_label(text, ref):
    assert parse_model(text) == (ref, {})


@pytest.mark.parametrize(
    ("text", "ref", "original"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/llama-3.1-8b:latest", "meta-llama/Llama-3.1-8B"),
        ("Qwen/Qwen2.5-0.5B:v2", "qwen/qwen2.5-0.5b:v2", "Qwen/Qwen2.5-0.5B"),
        (f"Org/Name@{DIGEST}", f"org/name@{DIGEST}", "Org/Name"),
    ],
)
def test_hugging_face_names_are_lowered_and_kept(text, ref, original):
    found, labels = parse_model(text)
    assert str(found) == ref
    assert labels == {"floe.original-name": original}


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "Iris",
        "iris:",
        "iris:V1",
        "a/b/c",
        "-iris",
        "iris-",
        "ir is",
        "a" * 64,
        "iris@123",
        "Org/Na me",
        "../x",
    ],
)
def test_bad_names(text):
    with pytest.raises(BadInputError):
        parse_model(text)


def test_a_capital_without_an_organisation_is_refused_with_what_may_be_meant():
    with pytest.raises(BadInputError) as caught:
        parse_model("Iris:v1")
    assert "'iris:v1'" in caught.value.hint


def test_nothing_is_pushed_to_a_digest():
    with pytest.raises(BadInputError, match="digest"):
        parse_tagged(f"iris@{DIGEST}")
    assert parse_tagged("iris") == (ModelRef("iris"), {})


def test_labels():
    assert parse_label("license=Apache-2.0") == ("license", "Apache-2.0")
    assert parse_label("a.b/c=x=y") == ("a.b/c", "x=y")
    assert parse_label("empty=") == ("empty", "")


@pytest.mark.parametrize("text", ["license", "=x", "sp ace=x", "floe.original-name=x"])
def test_bad_labels(text):
    with pytest.raises(BadInputError):
        parse_label(text)


def test_a_model_and_its_place():
    assert parse_placed_model("Org/Name:v1=/opt//model/") == (ModelRef("org/name", "v1"), "/opt/model")


@pytest.mark.parametrize(
    "text", ["iris", "iris=", "iris=opt", "iris=/", "iris=/a/../b", "=/a", "iris=/a\0b", "iris=//"]
)
def test_bad_places(text):
    with pytest.raises(BadInputError):
        parse_placed_model(text)
