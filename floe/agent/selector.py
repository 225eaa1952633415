"""Names and labels of nodes, and which nodes an order is for. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from floe.store.errors import BadInputError

ALL = "all"
NONE = "none"
_NAME = re.compile(r"[A-Za-z0-9]([-._A-Za-z0-9]{0,251}[A-Za-z0-9])?")
_KEY = re.compile(r"[A-Za-z0-9]([-._/A-Za-z0-9]{0,251}[A-Za-z0-9])?")
_VALUE = re.compile(r"[-._A-Za-z0-9]{0,63}")
_LABELS_MAX = 64


def parse_node_name(value: object) -> str:
    """A node's name: up to 253 letters, digits and inner - . _ as host names have them. BadInputError."""
    if not isinstance(value, str) or _NAME.fullmatch(value) is None:
        raise BadInputError(f"{value!r} is no name of a node", hint="use letters, digits and inner - . _")
    if value == ALL:
        raise BadInputError(f"a node cannot be called {ALL!r}", hint="--nodes all means all of them")
    return value


@dataclass(frozen=True)
class Labels:
    """What a node says of itself, by key, in the order given; its text is what `parse` takes."""

    pairs: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return ",".join(f"{key}={value}" if value else key for key, value in self.pairs) or NONE

    @property
    def by_key(self) -> Mapping[str, str]:
        """The values."""
        return dict(self.pairs)

    @classmethod
    def parse(cls, value: object) -> Labels:
        """From `KEY=VALUE,KEY,...` or a table of the file; `none` for none. BadInputError says which part is wrong."""
        if isinstance(value, Mapping):
            pairs = [(str(key), item) for key, item in value.items()]
        elif isinstance(value, str) and value:
            parts = [] if value == NONE else value.split(",")
            pairs = [(key.strip(), item.strip()) for key, _, item in (part.partition("=") for part in parts)]
        else:
            raise BadInputError(f"{value!r} is not a list of labels", hint="write KEY=VALUE,KEY or none")
        for key, item in pairs:
            if _KEY.fullmatch(key) is None or not isinstance(item, str) or _VALUE.fullmatch(item) is None:
                shown = f"{key}={item}"
                raise BadInputError(
                    f"{shown!r} is no label", hint="KEY of letters, digits and inner - . _ /, VALUE without the slash"
                )
        if len(dict(pairs)) != len(pairs) or len(pairs) > _LABELS_MAX:
            raise BadInputError(f"a label is given twice, or more than {_LABELS_MAX} of them")
        return cls(tuple(pairs))


@dataclass(frozen=True)
class Selector:
    """The nodes that match one of `terms`: `all`, a node's name, a label's key, or `KEY=VALUE`."""

    terms: tuple[str, ...]

    def __str__(self) -> str:
        return ",".join(self.terms)

    @classmethod
    def parse(cls, text: str) -> Selector:
        """From what a user typed, several with commas between them. BadInputError."""
        terms = tuple(dict.fromkeys(term.strip() for term in text.split(",")))
        for term in terms:
            key, equals, value = term.partition("=")
            if _KEY.fullmatch(key) is None or (equals and _VALUE.fullmatch(value) is None):
                raise BadInputError(
                    f"{term!r} names no nodes", hint="give all, a node's name, a label's key, or KEY=VALUE"
                )
        return cls(terms)

    def matches(self, node: str, labels: Mapping[str, str]) -> bool:
        """Whether a node of that name and with these labels is meant."""
        return any(self._matches(term, node, labels) for term in self.terms)

    @staticmethod
    def _matches(term: str, node: str, labels: Mapping[str, str]) -> bool:
        key, equals, value = term.partition("=")
        if equals:
            return labels.get(key) == value
        return term in (ALL, node) or term in labels
