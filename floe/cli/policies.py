"""Policies of models as settings give them: tables of the file, the same as one line of TOML in a variable or a flag."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from floe.cli.sizes import Size
from floe.cli.tables import NONE, named, tables
from floe.store.errors import BadInputError
from floe.store.policy import COMPLETION, Policy

_KEYS = ("name", "completion", "pin", "share")
_NAME = re.compile(r"[-._/a-z0-9*?\[\]!]+")


@dataclass(frozen=True)
class Policies:
    """In the order in which they were given; its text is what `parse` takes."""

    policies: tuple[Policy, ...] = ()

    def __str__(self) -> str:
        return "[" + ", ".join(map(_line, self.policies)) + "]" if self.policies else NONE

    @classmethod
    def parse(cls, value: object, parse_toml: Callable[[str], dict[str, Any]]) -> Policies:
        """From the file's list of tables, or from text. BadInputError says which table is wrong and how."""
        if value == NONE:
            return cls()
        return cls(tuple(_policy(number, table) for number, table in enumerate(tables(value, parse_toml, _hint()), 1)))


def _policy(number: int, table: dict[str, Any]) -> Policy:
    where, name = named(number, table, _KEYS), table.get("name")
    if not isinstance(name, str):
        raise BadInputError(f"{where} has no name", hint='give name = "ORG/NAME", or a pattern such as "llama/*"')
    if _NAME.fullmatch(name) is None:
        hint = "a policy is for all tags of a model: write its name without one" if ":" in name or "@" in name else ""
        raise BadInputError(
            f"{where}: {name!r} is no pattern of model names", hint=hint or "use lower case, and * or ?"
        )
    completion, pin, share = table.get("completion"), table.get("pin", False), table.get("share")
    if completion is not None and completion not in COMPLETION:
        raise BadInputError(f"{where}: completion {completion!r} is not one of {', '.join(COMPLETION)}")
    if not isinstance(pin, bool):
        raise BadInputError(f"{where}: pin {pin!r} is neither true nor false")
    if share is not None:
        try:
            share = Size.parse(share, percent=False).of(0)
        except BadInputError as error:
            raise BadInputError(f"{where}: share {error}", hint=error.hint) from error
        if share == 0:
            raise BadInputError(f"{where}: a share of 0 bytes", hint="leave share out for no bound")
    return Policy(name, completion, pin, share)


def _line(policy: Policy) -> str:
    """One policy as an inline table. JSON's strings are TOML's."""
    found = [f"name = {json.dumps(policy.name)}"]
    if policy.completion is not None:
        found.append(f"completion = {json.dumps(policy.completion)}")
    if policy.pin:
        found.append("pin = true")
    if policy.share is not None:
        found.append(f"share = {policy.share}")
    return "{" + ", ".join(found) + "}"


def _hint() -> str:
    return 'write [{name = "llama/*", completion = "idle", pin = true, share = "40GiB"}]'
