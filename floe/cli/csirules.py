"""Rules of the CSI driver as settings give them: tables of the file, the same as one line of TOML in a variable or a flag."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from floe.cli.tables import NONE, named, tables
from floe.csi.rules import Rule
from floe.store.errors import BadInputError

_KEYS = ("namespace", "models")
_NAMESPACE = re.compile(r"[-a-z0-9*?\[\]!]+")
_MODEL = re.compile(r"[-._/a-z0-9*?\[\]!]+")
_HINT = 'write [{namespace = "team-*", models = ["llama/*", "bert"]}]'


@dataclass(frozen=True)
class CsiRules:
    """In the order in which they were given; its text is what `parse` takes."""

    rules: tuple[Rule, ...] = ()

    def __str__(self) -> str:
        return "[" + ", ".join(map(_line, self.rules)) + "]" if self.rules else NONE

    @classmethod
    def parse(cls, value: object, parse_toml: Callable[[str], dict[str, Any]]) -> CsiRules:
        """From the file's list of tables, or from text. BadInputError says which table is wrong and how."""
        if value == NONE:
            return cls()
        found = tables(value, parse_toml, _HINT)
        if not found:  # by mistake, perhaps; and it would allow all
            raise BadInputError("a list of no rules", hint='write "none" where every pod may have every model')
        return cls(tuple(_rule(number, table) for number, table in enumerate(found, 1)))


def _rule(number: int, table: dict[str, Any]) -> Rule:
    where, namespace, models = named(number, table, _KEYS), table.get("namespace"), table.get("models")
    if not isinstance(namespace, str):
        raise BadInputError(f"{where} has no namespace", hint='give namespace = "NAME", or a pattern such as "team-*"')
    if _NAMESPACE.fullmatch(namespace) is None:
        raise BadInputError(f"{where}: {namespace!r} is no pattern of namespaces", hint="use lower case, and * or ?")
    if not isinstance(models, list) or not all(isinstance(model, str) for model in models):
        raise BadInputError(f"{where}: models is no list of texts", hint='for example ["llama/*"]; [] for none')
    for model in models:
        if _MODEL.fullmatch(model) is None:
            tagged = ":" in model or "@" in model
            hint = "a rule is for all tags of a model: write its name without one" if tagged else ""
            raise BadInputError(
                f"{where}: {model!r} is no pattern of model names", hint=hint or "use lower case, and * or ?"
            )
    return Rule(namespace, tuple(models))


def _line(rule: Rule) -> str:
    """One rule as an inline table. JSON's strings and lists of them are TOML's."""
    return f"{{namespace = {json.dumps(rule.namespace)}, models = {json.dumps(list(rule.models))}}}"
