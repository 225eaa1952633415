"""What `floe warm` is about: a model or an indexed image, resolved to trees once, so that a tag that moves changes nothing."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from floe.cli import image
from floe.cli.names import parse_model
from floe.store.errors import BadInputError, NotFoundError

if TYPE_CHECKING:
    from floe.store.catalog import Catalog
    from floe.store.records import ImageRecord, Manifest


@dataclass(frozen=True)
class Target:
    """`name` as resolved, `digest` of its manifest, its `trees`, bottom first, and `content_bytes` of all their files.

    `missing`: diff ids of layers that the store does not have: nodes unpack those in the ordinary way.
    """

    kind: str
    name: str
    digest: str
    trees: tuple[str, ...]
    content_bytes: int
    missing: tuple[str, ...] = ()


def resolve(catalog: Catalog, text: str) -> Target:
    """The model or image called `text`. NotFoundError when there is neither, BadInputError when it may be both or has nothing to fetch."""
    catalog.check_store()
    model, record = _model(catalog, text), _image(catalog, text)
    if model is not None and record is not None:
        raise BadInputError(
            f"{text!r} names a model and an image", hint="give the model as NAME@DIGEST, or the image by its full name"
        )
    if model is not None:
        name, digest, manifest = model
        return Target("model", name, digest, (manifest.tree.digest,), manifest.sizes.content)
    if record is None:
        raise NotFoundError(
            f"the store has neither a model nor an indexed image called {text!r}",
            hint="`floe model ls` and `floe image ls` list them",
        )
    return _of_image(catalog, record)


def known(catalog: Catalog, text: str) -> bool:
    """Whether `resolve` would find something."""
    try:
        resolve(catalog, text)
    except NotFoundError:
        return False
    return True


def named(text: str) -> Target:
    """What is called `text` and is no longer in the store: nodes that pinned it know the name."""
    with suppress(BadInputError):
        text = str(parse_model(text)[0])
    return Target("model", text, text, (), 0)


def _model(catalog: Catalog, text: str) -> tuple[str, str, Manifest] | None:
    try:
        ref, _ = parse_model(text)
        digest, manifest = catalog.resolve_model(ref)
    except (BadInputError, NotFoundError):
        return None
    return str(ref), digest, manifest


def _image(catalog: Catalog, text: str) -> ImageRecord | None:
    try:
        return image.find(catalog, text)
    except NotFoundError:
        return None


def _of_image(catalog: Catalog, record: ImageRecord) -> Target:
    found = image.trees_of(catalog, record)
    name = record.names[0] if record.names else record.manifest_digest
    if not found:
        raise BadInputError(f"the store has no layer of {name}", hint=f"index it again: floe image index {name}")
    content = 0
    for of, _, _ in found:
        layer = catalog.layer(of) if of in record.diff_ids else None
        content += layer[1].sizes.content if layer is not None else 0
    attachment = catalog.attachment(record.manifest_digest)
    models = attachment.models if attachment is not None else ()
    content += sum(catalog.get_manifest(model["manifest"]).sizes.content for model in models)
    known = {of for of, _, _ in found}
    # Stubs of attached models are layers that nobody stores.
    missing = [diff_id for diff_id in dict.fromkeys(record.diff_ids) if diff_id not in known][: -len(models) or None]
    trees = tuple(dict.fromkeys(tree for _, tree, _ in found))
    return Target("image", name, record.manifest_digest, trees, content, tuple(missing))
