"""containerd's filter expressions: `name==x,labels."a.b"~=y`. Pure.

Grammar and meaning: containerd's filters package. Selectors joined by a comma must all match; of several filters any.
A selector without an operator asks for presence. `!=` also matches what is absent. A regular expression that does not
compile matches nothing, as in containerd; anything else malformed is a BadInputError.

Regular expressions are RE2's, as Go's are: the same syntax, and a time that grows with the length of what is searched,
where Python's `re` may take for ever and holds up all other threads meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import re2

from floe.store.errors import BadInputError

Fields: TypeAlias = Callable[[tuple[str, ...]], "str | None"]
Filter: TypeAlias = Callable[[Fields], bool]

_FIELD = re.compile(r"[A-Za-z0-9_]+")
_OPERATOR = re.compile(r"[=!~]+")
_OPERATORS = ("==", "!=", "~=")
_VALUE = re.compile(r"[^\s,]+")
_SPACE = re.compile(r"\s*")
_ESCAPE = re.compile(
    r"\\(?:(?P<simple>[abfnrtv\\\"/|])|x(?P<x>[0-9a-fA-F]{2})|u(?P<u>[0-9a-fA-F]{4})|U(?P<U>[0-9a-fA-F]{8})|(?P<octal>[0-7]{3}))"
)
_SIMPLE = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\"}
_OPTIONS = re2.Options()
_OPTIONS.log_errors = False  # to stderr
_QUOTES = '"/|'
_MAX_RUNE = 0x10FFFF


def info_fields(name: str, parent: str, kind: str, labels: Mapping[str, str]) -> Fields:
    """How a snapshot shows itself to a filter: the value at a field path, None when it is absent.

    `kind` is "active", "view" or "committed".
    """

    def value(path: tuple[str, ...]) -> str | None:
        if path[0] == "labels":
            return labels.get(".".join(path[1:]))
        return {"name": name, "parent": parent, "kind": kind}.get(path[0])

    return value


def parse_filters(texts: Iterable[str]) -> Filter:
    """One filter out of `texts`, of which any must match; no texts match everything. BadInputError when malformed."""
    filters = [_Parser(text).parse() for text in texts]
    if not filters:
        return lambda _fields: True
    return lambda fields: any(matches(fields) for matches in filters)


class _Parser:
    """Recursive descent over one expression; `position` is a character index into `text`."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def parse(self) -> Filter:
        if self.text == "":
            return lambda _fields: True
        selectors = [self._selector()]
        while self.position < len(self.text):
            if self.text[self.position] != ",":
                raise self._error("unexpected input")
            self.position += 1
            selectors.append(self._selector())
        return lambda fields: all(matches(fields) for matches in selectors)

    def _selector(self) -> Filter:
        path = [self._field()]
        while self._peek() == ".":
            self.position += 1
            path.append(self._field())
        where = tuple(path)
        if self._peek() in ("", ","):
            return lambda fields: fields(where) is not None
        operator = self._operator()
        wanted = self._value(_QUOTES if operator == "~=" else '"')
        if operator == "==":
            return lambda fields: fields(where) == wanted
        if operator == "!=":
            return lambda fields: fields(where) != wanted
        try:
            pattern = re2.compile(wanted, _OPTIONS)
        except re2.error:
            return lambda _fields: False
        return lambda fields: pattern.search(fields(where) or "") is not None

    def _peek(self) -> str:
        return self.text[self.position : self.position + 1]

    def _skip_space(self) -> None:
        match = _SPACE.match(self.text, self.position)
        self.position = match.end() if match else self.position

    def _take(self, pattern: re.Pattern[str], what: str) -> str:
        match = pattern.match(self.text, self.position)
        if match is None:
            raise self._error(f"expected {what}")
        self.position = match.end()
        return match.group()

    def _field(self) -> str:
        self._skip_space()
        if self._peek() == '"':
            return self._quoted('"')
        return self._take(_FIELD, "a field")

    def _operator(self) -> str:
        self._skip_space()
        operator = self._take(_OPERATOR, "an operator (==, !=, ~=)")
        if operator not in _OPERATORS:
            raise self._error(f"unsupported operator {operator!r}")
        return operator

    def _value(self, quotes: str) -> str:
        self._skip_space()
        quote = self._peek()
        if quote and quote in _QUOTES:
            return self._quoted(quotes)
        value = self._take(_VALUE, "a value")
        if value[0] in ".=!~" or not value.isprintable():
            raise self._error("expected a value or a quoted string")
        return value

    def _quoted(self, quotes: str) -> str:
        quote = self._peek()
        if quote not in quotes:
            raise self._error(f"the quote {quote} is allowed in regular expressions only")
        self.position += 1
        parts: list[bytes] = []
        while (char := self._peek()) != quote:
            if char in ("", "\n"):
                raise self._error("quoted string not terminated")
            if char == "\\":
                parts.append(self._escape(quote))
            else:
                parts.append(char.encode())
                self.position += 1
        self.position += 1
        return b"".join(parts).decode(errors="replace")

    def _escape(self, quote: str) -> bytes:
        match = _ESCAPE.match(self.text, self.position)
        if match is None:
            raise self._error("illegal escape sequence")
        simple = match["simple"]
        if simple is not None:
            if simple in _QUOTES and simple != quote:
                raise self._error("illegal escape sequence")
            self.position = match.end()
            return _SIMPLE.get(simple, simple).encode()
        number = int(match["x"] or match["u"] or match["U"] or match["octal"], 8 if match["octal"] else 16)
        if number > (_MAX_RUNE if match["u"] or match["U"] else 0xFF):
            raise self._error("illegal escape sequence")
        self.position = match.end()
        # \x and octal name a byte, \u and \U a character.
        return chr(number).encode(errors="replace") if match["u"] or match["U"] else bytes([number])

    def _error(self, what: str) -> BadInputError:
        before, after = self.text[: self.position], self.text[self.position :]
        return BadInputError(
            f"filter {self.text!r} is malformed: {what}, at {before!r} >|< {after!r}",
            hint='write filters as name==x, parent==x, kind==active or labels."key"==value, joined by commas',
        )
