"""The queries of the files for Prometheus and Grafana, each with where it stands."""

import json
import re
from pathlib import Path

import yaml

FOLDER = Path(__file__).parents[2] / "install/observability"
# What Grafana puts in; any range does to parse a query.
_VARIABLES = {"$__rate_interval": "5m", "$instance": ".*"}
_NAME = re.compile(r"\bfloe_\w+")


def rules():
    return [rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for rule in group["rules"]]


def dashboard():
    return json.loads((FOLDER / "dashboard.json").read_text())


def queries():
    """(where, PromQL), Grafana's variables filled in."""
    found = [(rule["alert"], rule["expr"]) for rule in rules()]
    for panel in dashboard()["panels"]:
        found += [(panel["title"], target["expr"]) for target in panel.get("targets", ())]
    for name, value in _VARIABLES.items():
        found = [(where, text.replace(name, value)) for where, text in found]
    variables = [found["query"]["query"] for found in dashboard()["templating"]["list"] if found["type"] == "query"]
    return found + [("variables", re.sub(r"label_values\((\w+),.*", r"\1", text)) for text in variables]


def metrics_of(text):
    """The metrics that a query names."""
    return set(_NAME.findall(text))
