"""Which images an operator wants indexed, by repository, tag, platform and size. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class ImageRule:
    """For images whose `HOST/REPOSITORY` matches `name`, a shell pattern in which `*` also stands for `/`.

    `tags`: patterns, () for any tag and none. `platforms`: which are indexed, () for the indexer's own. `min_size`, `max_size`:
    bytes that an ordinary pull downloads; None for no bound. `never`: such images are left alone.
    """

    name: str
    tags: tuple[str, ...] = ()
    platforms: tuple[str, ...] = ()
    min_size: int = 0
    max_size: int | None = None
    never: bool = False

    def fits_size(self, size: int) -> bool:
        """Whether an image of `size` bytes is wanted."""
        return self.min_size <= size and (self.max_size is None or size <= self.max_size)


ALL = ImageRule("*")


def rule_for(image: str, rules: Iterable[ImageRule]) -> ImageRule | None:
    """The rule by which `image`, a full name with tag or digest, is indexed; None: it is not.

    The first rule that fits name and tag counts. Without any rule all images are indexed; with some, what none fits is not.
    """
    listed = list(rules)
    if not listed:
        return ALL
    name, tag = split_name(image)
    found = next((rule for rule in listed if fnmatchcase(name, rule.name) and _fits(tag, rule.tags)), None)
    return None if found is None or found.never else found


def split_name(image: str) -> tuple[str, str]:
    """`HOST/REPOSITORY` and the tag ("" without one) of a full name."""
    name = image.partition("@")[0]
    head, colon, tail = name.rpartition(":")
    return (head, tail) if colon and "/" not in tail else (name, "")


def _fits(tag: str, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatchcase(tag, pattern) for pattern in patterns)
