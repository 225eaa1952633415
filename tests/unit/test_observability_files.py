"""Alerting rules and the dashboard as files: they parse, and name what is documented."""

import re
from pathlib import Path

import pytest
from support import promfiles

ROOT = Path(__file__).parents[2]
OPERATIONS = (ROOT / "docs/OPERATIONS.md").read_text()


def documented():
    """Each metric with its labels, out of the table."""
    table = OPERATIONS[OPERATIONS.index("| metric | labels |") :].split("\n\n")[0].splitlines()[2:]
    cells = [[re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:3]] for line in table]
    return {name: set(labels) for (name,), labels in cells}


def labels_of(name):
    """The labels of a sample, and its metric's documentation; None: there is none."""
    known = documented()
    for suffix in ("_bucket", "_sum", "_count"):
        metric = name.removesuffix(suffix)
        if metric != name and metric in known:
            return known[metric] | ({"le"} if suffix == "_bucket" else set())
    return known.get(name)


def test_rules_have_all_that_prometheus_and_people_need():
    found = promfiles.rules()
    assert len(found) > 10
    assert len({rule["alert"] for rule in found}) == len(found)
    headings = {
        re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        for text in re.findall(r"^#+ (.*)$", OPERATIONS, re.MULTILINE)
    }
    for rule in found:
        assert re.fullmatch(r"Floe[A-Z]\w+", rule["alert"])
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert page == "docs/OPERATIONS.md"
        assert anchor in headings, rule["alert"]
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))


def test_the_alarms_in_the_documentation_are_the_rules():
    table = OPERATIONS[OPERATIONS.index("| alarm |") :].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [rule["alert"] for rule in promfiles.rules()]


def test_panels_lie_beside_each_other_and_have_queries():
    board = promfiles.dashboard()
    assert board["title"] == "Floe"
    taken = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or panel["targets"], panel["title"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


@pytest.mark.parametrize(("where", "query"), promfiles.queries())
def test_queries_name_metrics_that_are_documented_and_labels_that_they_have(where, query):
    names = promfiles.metrics_of(query)
    assert names
    for name in names:
        assert labels_of(name) is not None, name
    for name, matchers in re.findall(r"(floe_\w+)\{([^}]*)\}", query):
        for label in re.findall(r"(\w+)\s*[=!]", matchers):
            assert label in labels_of(name) | {"instance"}, f"{name}: {label}"


@pytest.mark.parametrize(("where", "query"), promfiles.queries())
def test_queries_are_promql(where, query):
    parser = pytest.importorskip("promql_parser", reason="promql-parser, of the extra `dev`, is not installed")
    parser.parse(query)
