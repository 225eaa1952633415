"""Policies of models: from the file's tables or a line of TOML, and which one counts."""

import pytest

from floe.cli.policies import Policies
from floe.cli.settings import load
from floe.store.errors import BadInputError
from floe.store.policy import Policy, policy_for

FILE = """
[[model_policy]]
name = "llama/*"
completion = "always"
pin = true
share = "40GiB"

[[model_policy]]
name = "*"
completion = "idle"
"""
PARSED = Policies((Policy("llama/*", "always", pin=True, share=40 << 30), Policy("*", "idle")))


def test_tables_of_the_file(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(FILE)
    assert load({}, {}, str(path)).model_policy == PARSED


def test_the_same_in_one_line():
    line = '[{name = "llama/*", completion = "always", pin = true, share = "40GiB"}, {name="*", completion="idle"}]'
    assert load({"model_policy": line}, {}, "").model_policy == PARSED
    assert load({}, {"FLOE_MODEL_POLICY": line}, "").model_policy == PARSED


@pytest.mark.parametrize("policies", [Policies(), PARSED, Policies((Policy("a-[bc]?"),))])
def test_its_text_is_what_it_was_made_from(policies):
    assert load({"model_policy": str(policies)}, {}, "").model_policy == policies


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        ('name = "*"', "not a list of tables"),
        ("[1]", "not a list of tables"),
        ("[{]", "not a list of tables"),
        ("[{pin = true}]", "table 1 has no name"),
        ('[{name = "*"}, {name = "a", pins = true}]', r"table 2 \(a\) has an unknown key 'pins'"),
        ('[{name = "llama:8b"}]', "'llama:8b' is no pattern"),
        ('[{name = ""}]', "no pattern"),
        ('[{name = "*", completion = "on"}]', "completion 'on' is not one of off, idle, always"),
        ('[{name = "*", pin = "yes"}]', "pin 'yes'"),
        ('[{name = "*", share = "40%"}]', "share '40%' is not a size"),
        ('[{name = "*", share = 0}]', "a share of 0 bytes"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tables, told):
    with pytest.raises(BadInputError, match=told) as caught:
        load({}, {"FLOE_MODEL_POLICY": tables}, "")
    assert str(caught.value).startswith("FLOE_MODEL_POLICY: ")


def test_the_first_that_matches_counts_for_all_tags():
    policies = PARSED.policies
    assert policy_for("llama/8b", policies) is policies[0]
    assert policy_for("llama", policies) is policies[1]
    assert policy_for("llama/8b", policies[1:]) is policies[1]
    assert policy_for("iris", policies[:1]) is None
    assert policy_for(None, policies) is None
