"""Policies of images as settings give them: tables of the file, the same as one line of TOML in a variable or a flag."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from floe.cli.sizes import Size
from floe.cli.tables import NONE, named, tables
from floe.store.errors import BadInputError
from floe.store.imagepolicy import ImageRule

_KEYS = ("name", "tags", "platforms", "min_size", "max_size", "never")
_NAME = re.compile(r"[-._/:a-z0-9A-Z*?\[\]!]+")
_TAG = re.compile(r"[-._a-zA-Z0-9*?\[\]!]+")
_PLATFORM = re.compile(r"[a-z0-9]+(/[a-z0-9_]+){1,2}")
_HINT = 'write [{name = "registry.example/prod/*", tags = ["v*"], platforms = ["linux/amd64"], max_size = "40GiB"}]'


@dataclass(frozen=True)
class ImagePolicies:
    """In the order in which they were given; its text is what `parse` takes."""

    rules: tuple[ImageRule, ...] = ()

    def __str__(self) -> str:
        return "[" + ", ".join(map(_line, self.rules)) + "]" if self.rules else NONE

    @classmethod
    def parse(cls, value: object, parse_toml: Callable[[str], dict[str, Any]]) -> ImagePolicies:
        """From the file's list of tables, or from text. BadInputError says which table is wrong and how."""
        if value == NONE:
            return cls()
        return cls(tuple(_rule(number, table) for number, table in enumerate(tables(value, parse_toml, _HINT), 1)))


def _rule(number: int, table: dict[str, Any]) -> ImageRule:
    where, name = named(number, table, _KEYS), table.get("name")
    if not isinstance(name, str) or _NAME.fullmatch(name) is None or "/" not in name.replace("*", "/"):
        raise BadInputError(
            f"{where}: {name!r} is no pattern of HOST/REPOSITORY",
            hint='give name = "docker.io/library/*"; what stands for all is "*"',
        )
    never = table.get("never", False)
    if not isinstance(never, bool):
        raise BadInputError(f"{where}: never {never!r} is neither true nor false")
    sizes = [_size(table, key, where) for key in ("min_size", "max_size")]
    if sizes[1] is not None and (sizes[0] or 0) > sizes[1]:
        raise BadInputError(f"{where}: min_size is more than max_size")
    return ImageRule(
        name,
        _texts(table, "tags", _TAG, where),
        _texts(table, "platforms", _PLATFORM, where),
        sizes[0] or 0,
        sizes[1],
        never,
    )


def _texts(table: dict[str, Any], key: str, form: re.Pattern[str], where: str) -> tuple[str, ...]:
    found = table.get(key, [])
    if not isinstance(found, list) or not all(isinstance(one, str) and form.fullmatch(one) for one in found):
        example = '["linux/amd64"]' if key == "platforms" else '["v*"]'
        raise BadInputError(f"{where}: {key} {found!r} is no list of {key}", hint=f"write {key} = {example}")
    return tuple(found)


def _size(table: dict[str, Any], key: str, where: str) -> int | None:
    if key not in table:
        return None
    try:
        return Size.parse(table[key], percent=False).of(0)
    except BadInputError as error:
        raise BadInputError(f"{where}: {key} {error}", hint=error.hint) from error


def _line(rule: ImageRule) -> str:
    """One rule as an inline table. JSON's strings and lists of them are TOML's."""
    found = [f"name = {json.dumps(rule.name)}"]
    found += [f"{key} = {json.dumps(list(getattr(rule, key)))}" for key in ("tags", "platforms") if getattr(rule, key)]
    if rule.min_size:
        found.append(f"min_size = {rule.min_size}")
    if rule.max_size is not None:
        found.append(f"max_size = {rule.max_size}")
    if rule.never:
        found.append("never = true")
    return "{" + ", ".join(found) + "}"
