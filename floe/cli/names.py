"""Model names as people give them on the command line."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from floe.store.errors import BadInputError
from floe.store.ids import ModelRef, check_text

ORIGINAL_NAME = "floe.original-name"
_LABEL_KEY = re.compile(r"[A-Za-z0-9]([-._/A-Za-z0-9]*[A-Za-z0-9])?")


def parse_model(text: str) -> tuple[ModelRef, dict[str, str]]:
    """`text` as a reference, and the labels that keep how a Hugging Face name (`Org/Name`) was written.

    Hugging Face's capitals are lowered; a name without `org/` is not one of its names and must be right as it is.
    BadInputError for anything else that ModelRef.parse refuses.
    """
    cut = min((text.index(mark) for mark in "@:" if mark in text), default=len(text))
    name, rest = text[:cut], text[cut:]
    lowered = name.lower()
    if lowered == name:
        return ModelRef.parse(text), {}
    if "/" not in name:
        try:
            ModelRef.parse(text)
        except BadInputError as error:
            raise BadInputError(str(error), hint=error.hint + _perhaps(lowered + rest)) from error
    return ModelRef.parse(lowered + rest), {ORIGINAL_NAME: name}


def _perhaps(text: str) -> str:
    """A proposal, if it is a name at all."""
    try:
        ModelRef.parse(text)
    except BadInputError:
        return ""
    return f"; perhaps {text!r}"


def parse_tagged(text: str) -> tuple[ModelRef, dict[str, str]]:
    """The same where only NAME[:TAG] makes sense: what is pushed decides the digest."""
    ref, labels = parse_model(text)
    if ref.digest:
        raise BadInputError(f"cannot push to the digest in {text!r}", hint="give NAME or NAME:TAG")
    return ref, labels


def parse_label(text: str) -> tuple[str, str]:
    """`KEY=VALUE`; BadInputError when KEY is empty, holds odd characters or begins with Floe's own `floe.`."""
    key, equals, value = text.partition("=")
    if not equals or _LABEL_KEY.fullmatch(key) is None:
        raise BadInputError(
            f"{text!r} is not a label", hint="write KEY=VALUE; KEY of letters, digits and inner - . _ /"
        )
    if key.startswith("floe."):
        raise BadInputError(f"label {key!r} begins with 'floe.', which Floe keeps for itself")
    return key, check_text(value, f"label {key!r}:")


def parse_placed_model(text: str) -> tuple[ModelRef, str]:
    """`NAME[:TAG]=PATH` of `floe image attach`: a model and the absolute path at which a container finds it."""
    name, equals, path = text.partition("=")
    if not equals:
        raise BadInputError(f"--model {text!r} says no path", hint="write NAME[:TAG]=/path/in/the/container")
    ref, _ = parse_model(name)
    parts = PurePosixPath(path).parts
    if not path.startswith("/") or ".." in parts or len(parts) < 2 or "\0" in path:
        raise BadInputError(f"{path!r} is no place for a model", hint="give an absolute path such as /opt/model")
    return ref, check_text(str(PurePosixPath("/", *parts[1:])), "path")
