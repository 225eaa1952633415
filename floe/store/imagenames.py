"""Names of indexed images: which record one stands for, and which gives it up to another. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from floe.store.errors import BadInputError, NotFoundError
from floe.store.imagepolicy import split_name
from floe.store.records import ImageRecord

_MIN_PREFIX = 4  # hex digits of a digest that may stand for it


def find(text: str, digest: str, known: Sequence[ImageRecord], url: str) -> ImageRecord:
    """The record called `text`, or whose digest begins with `digest`, of those `known` in the store at `url`.

    A name that was indexed again stands for the latest record of each platform. NotFoundError when nothing matches;
    BadInputError, listing the candidates, when several images do.
    """
    found = _latest(record for record in known if text in record.names)
    start = digest.removeprefix("sha256:")
    if not found and len(start) >= _MIN_PREFIX:
        found = [record for record in known if record.manifest_digest.startswith(f"sha256:{start}")]
    if not found:
        raise no_image(text, url)
    if len(found) > 1:
        listed = ", ".join(f"{r.manifest_digest} ({r.platform})" for r in found)
        raise BadInputError(f"{text!r} stands for {len(found)} images: {listed}", hint="give the digest")
    return found[0]


def displaces(record: ImageRecord, known: ImageRecord) -> bool:
    """Whether `record`, just indexed, takes names over from `known`."""
    return (
        known.manifest_digest != record.manifest_digest
        and known.platform == record.platform
        and known.indexed <= record.indexed
        and not set(known.names).isdisjoint(record.names)
    )


def left_of(known: ImageRecord, taken: Iterable[str]) -> tuple[str, ...]:
    """The names of `known` when those `taken` stand for another image.

    The image is in its repositories by its digest, until these delete it: where no other name says so, that one does.
    """
    taken = set(taken)
    left = {name for name in known.names if name not in taken}
    by_name = {name: _repository(name) for name in known.names}
    told = {by_name[name] for name in left}
    left.update(
        f"{repository}@{known.manifest_digest}"
        for name, repository in by_name.items()
        if name in taken and repository and repository not in told
    )
    return tuple(sorted(left))


def _repository(name: str) -> str:
    """`HOST/REPOSITORY` of a full name; "" for what no registry has: folders and archives."""
    repository = split_name(name)[0]
    host, slash, _ = repository.partition("/")
    return repository if slash and host and not host.endswith(":") else ""


def _latest(records: Iterable[ImageRecord]) -> list[ImageRecord]:
    """The most recently indexed record of each platform."""
    latest: dict[str, ImageRecord] = {}
    for record in records:
        known = latest.get(record.platform)
        if known is None or known.indexed < record.indexed:
            latest[record.platform] = record
    return list(latest.values())


def no_image(text: str, url: str) -> NotFoundError:
    """What to say of an image that no record is of."""
    return NotFoundError(f"no indexed image {text} in {url}", hint="`floe image ls` lists the images")
