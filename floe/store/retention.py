"""Rules by which old tags of models go, kept in the store so that every collector goes by the same. docs/FORMAT.md has the record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from floe.store import fields, layout
from floe.store.errors import BadInputError, NotFoundError, StoreMissingError
from floe.store.objects.base import ObjectStore
from floe.store.records import Record, Ref


@dataclass(frozen=True)
class Rule:
    """Of each model whose name fits the pattern `name`: the `keep_last` tags that were moved last stay.

    So do those that fit one of the patterns `keep`, which do not count.
    """

    name: str
    keep_last: int
    keep: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, value: object, name: str) -> Rule:
        """As the field `name` holds it; ValueError."""
        rule = fields.mapping(value, name, "name", "keep_last", "keep")
        return cls(
            fields.text(rule["name"], f"{name}.name"),
            fields.count(rule["keep_last"], f"{name}.keep_last"),
            fields.each(rule["keep"], f"{name}.keep", fields.text),
        )


@dataclass(frozen=True)
class Retention(Record):
    """All rules; of those that fit a model the first one counts, and without one all its tags stay."""

    FORMAT: ClassVar[str] = "floe.retention"
    REPAIR: ClassVar[str] = "delete it, then set the rules again: `floe model retention`"

    rules: tuple[Rule, ...] = ()

    @classmethod
    def _from_json(cls, value: dict[str, Any]) -> Retention:
        return cls(fields.each(value["rules"], "rules", Rule.from_json))

    def expired(self, models: Mapping[str, Ref]) -> dict[str, Ref]:
        """Those of the refs of models, by key, that no rule keeps."""
        by_name: dict[str, list[tuple[str, str, str]]] = {}
        for key, ref in models.items():
            try:
                found = layout.parse_model_ref_key(key)
            except BadInputError:  # nobody's
                continue
            by_name.setdefault(found.name, []).append((ref.updated, str(found.tag), key))
        gone: dict[str, Ref] = {}
        for name, tags in by_name.items():
            rule = next((rule for rule in self.rules if fnmatchcase(name, rule.name)), None)
            if rule is None:
                continue
            counted = [item for item in tags if not _fits(item[1], rule.keep)]
            for _, _, key in sorted(counted, reverse=True)[rule.keep_last :]:
                gone[key] = models[key]
        return gone


def read_retention(store: ObjectStore) -> Retention:
    """The rules of a store; none where none were set. DamagedError: nobody knows what is to stay."""
    try:
        return Retention.decode(store.get(layout.RETENTION_KEY), layout.RETENTION_KEY)
    except StoreMissingError:
        raise
    except NotFoundError:
        return Retention()


def _fits(tag: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(tag, pattern) for pattern in patterns)
