"""bento.yaml and model.yaml, as versions of BentoML have written them, and what is neither."""

from datetime import datetime, timezone

import pytest
from support.bento import COMMIT, DATA, SPECS, hub_entry, with_models

from floe.ingest.bento.info import Tag, parse_bento, parse_model
from floe.store.errors import DamagedError, UnsupportedError


def parse(text):
    return parse_bento(text.encode(), "bento.yaml")


def test_spec_2():
    info = parse((DATA / SPECS[2]).read_text())
    assert (str(info.tag), info.spec, info.bentoml_version) == ("front:v1", 2, "1.4.40")
    # Of the Bento and of both services, each once.
    assert [str(model) for model in info.models] == ["own:b2", "shared:1"]
    assert info.envs == (("GREETING", "hello", "all"),)
    assert info.created == datetime(2026, 11, 26, 14, 46, 8, 539431, timezone.utc)


def test_spec_1():
    info = parse((DATA / SPECS[1]).read_text())
    assert (str(info.tag), info.spec, info.bentoml_version) == ("old_svc:v1", 1, "1.1.11")
    assert [str(model) for model in info.models] == ["oldie:7"]
    assert info.envs == (("A", "b c", "all"),)


def test_before_1_0():
    info = parse("name: Iris\nversion: 3KZP2x\nmodels:\n- iris:abc\n- iris:1e5\n")
    assert (str(info.tag), info.spec) == ("iris:3kzp2x", 1)
    assert [model.tag for model in info.models] == [Tag("iris", "abc"), Tag("iris", "1e5")]
    assert info.created.year == 1970


@pytest.mark.parametrize("version", ["1", "1.10", "0x10", "2024-01-01", "true", "1e5", "'null'"])
def test_versions_are_texts(version):
    assert parse(f"name: a\nversion: {version}\n").tag.version == version.strip("'")
    assert parse_model(f"name: a\nversion: {version}\n".encode(), "x").tag.version == version.strip("'")


def test_a_model_of_the_hub():
    info = parse(with_models(2, hub_entry("Acme/Tiny-Model")))
    model = info.models[0]
    assert (model.hub_id, model.commits, model.from_hub) == ("acme/tiny-model", (COMMIT,), True)
    assert str(model) == f"acme/tiny-model@{COMMIT}"
    assert len(info.models) == 3


def test_commits_of_one_repository_are_one_model():
    other = "e" * 40
    for order in ((COMMIT, other), (other, COMMIT), (COMMIT, other, COMMIT)):
        entries = "".join(hub_entry("Acme/Tiny-Model", revision=revision) for revision in order)
        info = parse(with_models(2, entries))
        assert [str(model) for model in info.models] == [f"acme/tiny-model@{COMMIT},{other}", "own:b2", "shared:1"]


def test_envs_may_be_listed_by_docker_options():
    info = parse(
        "name: a\nversion: b\ndocker: {env: [A=1, 'B=x=y']}\nenvs: [{name: A, value: 2, stage: build}, {name: C}]\n"
    )
    assert info.envs == (("A", "2", "build"), ("B", "x=y", "all"), ("C", "", "all"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no mapping"),
        ("- a\n", "is no mapping"),
        ("name: [", "is not YAML"),
        ("name: a\nversion: !!python/object:os.system {}\n", "is not YAML"),
        ("name: a\nversion: !!timestamp x\n", "is not YAML"),
        ("[" * 20_000, "is not YAML"),
        ("a: &a [*a]\nname: a\nversion: b\nmodels: *a\n", "names a model by something"),
        ("version: b\n", "a name or version is no text"),
        ("name: ../x\nversion: b\n", "no name or version"),
        ("name: a\nversion: .\n", "no name or version"),
        ("name: a\nversion: latest/x\n", "no name or version"),
        (f"name: {'a' * 64}\nversion: b\n", "no name or version"),
        ("name: a\nversion: b\nmodels: {}\n", "'models' that is no list"),
        ("name: a\nversion: b\nservices: x\n", "'services' that is no list"),
        ("name: a\nversion: b\nmodels: [{tag: null}]\n", "tag is no text"),
        ("name: a\nversion: b\nmodels: [../../etc:x]\n", "no name or version"),
        ("name: a\nversion: b\nmodels: [a]\n", "no name or version"),
        ("name: a\nversion: b\nenvs: [{name: 'A=B'}]\n", "no name of an environment variable"),
        ("name: a\nversion: b\ncreation_time: yesterday\n", "is no time"),
        (
            "name: a\nversion: b\nx: &s\n  models: [" + "a:b, " * 200 + "]\nservices: [" + "*s, " * 200 + "]\n",
            "names models more than 16384 times",
        ),
        (with_models(2, hub_entry("../x")), "no name or version|is no model of"),
        (with_models(2, hub_entry("a/b/c")), "is no model of"),
    ],
)
def test_what_is_no_bento(text, message):
    with pytest.raises(DamagedError, match=message) as caught:
        parse(text)
    assert "bento.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nversion: b\nspec: 3\n", "is of spec '3'; this Floe reads 1 and 2"),
        ("name: a\nversion: b\nmodels: [{tag: 'a:b', registry: elsewhere}]\n", "from the registry 'elsewhere'"),
        (with_models(2, hub_entry("a/b", revision="main")), "revision 'main', which is no commit"),
    ],
)
def test_what_this_floe_does_not_know(text, message):
    with pytest.raises(UnsupportedError, match=message) as caught:
        parse(text)
    assert caught.value.hint
