"""Settings that are lists of tables: in the file as such, in a variable or a flag the same as one line of TOML."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from floe.store.errors import BadInputError

NONE = "none"  # for no tables


def tables(value: object, parse_toml: Callable[[str], dict[str, Any]], hint: str) -> list[dict[str, Any]]:
    """A list of tables as the file has it, or its text. BadInputError, with this hint."""
    if isinstance(value, str):
        try:
            value = parse_toml(f"tables = {value}")["tables"]
        except ValueError as error:
            raise BadInputError(f"{value!r} is not a list of tables: {error}", hint=hint) from error
    if not isinstance(value, list) or not all(isinstance(table, dict) for table in value):
        raise BadInputError(f"{value!r} is not a list of tables", hint=hint)
    return value


def named(number: int, table: dict[str, Any], keys: Collection[str]) -> str:
    """What messages call a table, by the first of `keys`, which are all that it may have. BadInputError for another."""
    name = table.get(next(iter(keys)))
    where = f"table {number} ({name})" if isinstance(name, str) else f"table {number}"
    for key in table:
        if key not in keys:
            raise BadInputError(f"{where} has an unknown key {key!r}", hint=f"known: {', '.join(keys)}")
    return where
